"""`train.py -m`: from the words of the command line to a sweep.

`-m` of train.py is handled here, on Hydra's parser and composer, and not by a Sweeper and a Launcher of Hydra's plugin
interface, because that gives fewer surprises:

- a launcher of Hydra's is handed a batch and answers when all of it has ended, so that a sampler would wait for the
  slowest run before it asks again; here a worker that is free gets the next run at once;
- plugins live in a package `hydra_plugins` beside ours, are imported by every command and write folders of their own
  (`multirun.yaml`); here the sweep is one config group, checked like the others, with a run folder like the others;
- a run is `python -m saferlhf.cli train WORDS`, as a pipeline's stage is: Lightning's subprocess launcher, which runs
  the whole command again in each of its processes, repeats one run and never the sweep.

Hydra's own way is left where it is asked for: `hydra/launcher=...` (SLURM, see `elsewhere.py`), `hydra/sweeper=...`,
and sweeps of pipelines, which run one after the other since each fills the machine itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig

from saferlhf.config.arguments import WITH_VALUE, folder_flags, refuse_duplicates
from saferlhf.config.sweep_schema import GRID
from saferlhf.config.validate import sweep_config, train_config
from saferlhf.errors import UserError
from saferlhf.sweep.child import Compose
from saferlhf.sweep.runner import Sweep
from saferlhf.sweep.space import grid, is_about, read_space, without

MULTIRUN = ("-m", "--multirun")
OTHERS = ("--cfg", "-c", "--info", "-i", "--shell-completion", "-sc", "--run", "-r", "--hydra-help", "--version")
"""Flags that ask for something else than running; Hydra knows what to say of them beside -m."""
HYDRAS_SWEEPER = ("hydra/sweeper", "hydra.sweeper")
HYDRAS_LAUNCHER = ("hydra/launcher", "hydra.launcher")


@dataclass(frozen=True)
class SweepWords:
    """The (ordered) arguments of `train.py -m`, sorted.

    Attributes:
        flags: all but -m.
        run: overrides of the runs, swept ones among them.
        sweep: overrides of the sweep itself.
        hydra: Hydra's own.
    """

    flags: tuple[str, ...]
    run: tuple[str, ...]
    sweep: tuple[str, ...]
    hydra: tuple[str, ...]

    @property
    def base(self) -> list[str]:
        """Arguments of a single run that finds the configs: no group of theirs is chosen yet."""
        shown = [word for word in self.run if is_about(word, "verbose_errors")]
        return [*self.flags, *without(self.hydra, *HYDRAS_LAUNCHER), *shown]

    @property
    def launcher(self) -> bool:
        """Whether one of Hydra's launchers is to start the runs."""
        return any(is_about(word, *HYDRAS_LAUNCHER) for word in self.hydra)


def sweep_words(arguments: Sequence[str]) -> SweepWords | None:
    """The arguments as those of a sweep of ours; None where they ask for none, or for Hydra's own sweeper.

    Args:
        arguments: flags first, see `config.arguments.ordered`.
    """
    first = next((n for n, word in enumerate(arguments) if _begins_overrides(arguments, n)), len(arguments))
    flags, words = arguments[:first], arguments[first:]
    if not any(flag in MULTIRUN for flag in flags) or any(flag.partition("=")[0] in OTHERS for flag in flags):
        return None
    if any(is_about(word, *HYDRAS_SWEEPER) for word in words):
        return None
    return SweepWords(
        flags=tuple(flag for flag in flags if flag not in MULTIRUN),
        run=tuple(without(words, "sweep", "hydra")),
        sweep=tuple(_addable(word) for word in words if is_about(word, "sweep")),
        hydra=tuple(word for word in words if is_about(word, "hydra")),
    )


def sweep_of(
    words: SweepWords,
    *,
    compose_tree: Callable[[Sequence[str]], DictConfig],
    compose: Compose,
    config_loader: Any = None,
) -> Sweep | None:
    """The sweep that is asked for; None where the runs would be pipelines.

    Args:
        words: what was typed.
        compose_tree: from overrides to what Hydra composes of them.
        compose: from overrides to a run's checked config.
        config_loader: Hydra's, which knows the choices of `glob(*)`.

    Raises:
        UserError: a word is wrong.
    """
    refuse_duplicates([*words.run, *words.sweep])
    if any(is_about(word, "pipeline") for word in words.run):
        _check_pipelines(words)
        return None
    space = read_space(words.run, config_loader=config_loader)
    # an experiment may have chosen a sweep too
    tree = compose_tree([*space.words(space.first), *words.sweep])
    config = sweep_config(tree.sweep)
    if config.params:
        space = read_space(words.run, config.params, config_loader)
        tree = compose_tree([*space.words(space.first), *words.sweep])
    if tree.get("task") is None:
        _check_pipelines(words)
        return None
    if config.name == GRID:
        grid(space)  # what is no grid is told before its first value is found wrong
    return Sweep(config, space, train_config(tree), compose, folder_flags(words.flags))


def _addable(word: str) -> str:
    """Keys of `sweep.params` are any names: Hydra would want a plus before a new one."""
    return f"++{word}" if is_about(word, "sweep.params") and not word.startswith("+") else word


def _check_pipelines(words: SweepWords) -> None:
    if words.sweep:
        raise UserError("pipelines are swept one after the other", words.sweep[0], "leave it out, or name a task")


def _begins_overrides(arguments: Sequence[str], position: int) -> bool:
    """Whether the word at this position is the first override: no flag and no flag's value."""
    if arguments[position].startswith("-"):
        return False
    return position == 0 or arguments[position - 1] not in WITH_VALUE
