"""Every file under conf/ composes and passes the typed validation; every saved diff passes the checks too."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from command_lines import NEEDED, composed
from omegaconf import DictConfig, OmegaConf

from saferlhf.config.checks_online import ONLINE_GROUPS
from saferlhf.config.paths import conf_dir
from saferlhf.config.task_schema import TASKS
from saferlhf.config.validate import DIFF_GROUPS, evaluate_config, pipeline_config, sweep_config, train_config
from saferlhf.errors import UserError
from saferlhf.pipeline.stages import Stages
from saferlhf.run.prepare import checked

CONF = conf_dir()
OPTIONS = [str(file.relative_to(CONF).with_suffix("")) for file in sorted(CONF.rglob("*.yaml")) if file.parent != CONF]
EVALUATE_GROUPS = ("suite", "protocol", "data", "trainer", "tracking", "evaluation", "judge")


def parts_of(option: str) -> tuple[str, str]:
    """Group and name; a diff may lie in a folder of its group, as experiment=paper/reward_7b."""
    if option.partition("/")[0] in DIFF_GROUPS:
        group, _, name = option.partition("/")
    else:
        group, _, name = option.rpartition("/")
    return group, name


def options_of(*groups: str) -> list[str]:
    return [option for option in OPTIONS if parts_of(option)[0] in groups]


def override(option: str) -> str:
    return "=".join(parts_of(option))


def filled(tree: DictConfig) -> DictConfig:
    """Values that must be given, given."""
    for key in OmegaConf.missing_keys(tree):
        OmegaConf.update(tree, key, "given")
    return tree


NOT_OF_RUNS = {*DIFF_GROUPS, "pipeline", "sweep", "suite", "protocol", "judge", "task"}
RUN_GROUPS = sorted({parts_of(option)[0] for option in OPTIONS} - NOT_OF_RUNS)


def rounds(*groups: str) -> list[list[str]]:
    """One option of each group at a time, until each has had its turn; composing them singly would take minutes."""
    by_group = [options_of(group) for group in groups]
    count = max(map(len, by_group))
    return [[options[turn % len(options)] for options in by_group] for turn in range(count)]


def check_names(config: object, options: list[str]) -> None:
    """Each group holds the option that was chosen."""
    for option in options:
        group, _, name = option.partition("/")
        if "/" not in name:
            chosen = getattr(config, group)
            assert (chosen if isinstance(chosen, dict) else vars(chosen)).get("name", name) == name


@pytest.mark.parametrize("options", rounds(*RUN_GROUPS), ids=lambda options: str(len(options)))
def test_choices_of_train(options: list[str]) -> None:
    tree = composed("task=reward", *map(override, options))
    check_names(train_config(filled(tree)), options)


@pytest.mark.parametrize("option", options_of("task"))
def test_a_task(option: str) -> None:
    config = checked(train_config(composed(override(option), *NEEDED.get(parts_of(option)[1], []))))
    assert type(config.task) is TASKS[config.task.name]
    assert config.name == config.task.name


@pytest.mark.parametrize("options", rounds(*EVALUATE_GROUPS), ids=lambda options: str(len(options)))
def test_choices_of_evaluate(options: list[str]) -> None:
    config = evaluate_config(filled(composed(*map(override, options), command="evaluate")))
    check_names(config, options)


def test_every_option_has_its_turn() -> None:
    seen = {option for options in rounds(*RUN_GROUPS) for option in options}
    seen |= {option for options in rounds(*EVALUATE_GROUPS) for option in options}
    assert seen | set(options_of("task", "pipeline", "sweep", *DIFF_GROUPS)) == set(OPTIONS)


@pytest.mark.parametrize("option", options_of("pipeline"))
def test_a_pipeline(option: str) -> None:
    tree = composed(override(option))
    # every stage that is defined, those that do not run by default too
    config = pipeline_config(tree.pipeline)
    config.stages = list(config.definitions)
    stages = Stages(
        config, compose=lambda words: checked(train_config(composed(*words))), overrides=[], prefix=config.name
    )
    assert set(stages.configs) == set(config.definitions)
    for stage in stages.asked:
        assert stages.configs[stage.name].name == f"{config.name}-{stage.name}"


@pytest.mark.parametrize("option", options_of("sweep"))
def test_a_sweep(option: str) -> None:
    words = command_of(CONF / f"{option}.yaml")
    assert override(option) in words and words[0] == "-m"
    tree = composed(*[word for word in words[1:] if "," not in word])
    assert sweep_config(tree.sweep).name == option.partition("/")[2]
    assert "sweep" not in vars(train_config(tree)), "it is no part of a run"


def command_of(file: Path) -> list[str]:
    """The words of the command in a diff's first comment line."""
    comments = [line for line in file.read_text().splitlines() if line.startswith("#") and "@package" not in line]
    words = shlex.split(comments[0].lstrip("# "))
    script = next(number for number, word in enumerate(words) if re.search(r"(train|evaluate)(\.py)?$", word))
    return words[script + 1 :]


@pytest.mark.parametrize("option", options_of(*DIFF_GROUPS))
def test_a_diff_runs_by_its_command(option: str) -> None:
    words = command_of(CONF / f"{option}.yaml")
    assert override(option) in words
    tree = composed(*words)
    assert not OmegaConf.missing_keys(tree), "the command leaves values open"
    config = checked(train_config(tree))
    assert config.name != config.task.name, "outputs of a diff are kept apart by a name of their own"


@pytest.mark.parametrize("option", options_of("debug"))
@pytest.mark.parametrize("task", TASKS)
def test_a_debug_choice_goes_with_every_task(option: str, task: str) -> None:
    assert (
        checked(train_config(composed(f"task={task}", override(option), *NEEDED.get(task, [])))).name
        == composed(override(option)).name
    )


def test_the_default_command_names_neither_task_nor_pipeline() -> None:
    tree = composed()
    assert tree.get("task") is None
    assert tree.get("pipeline") is None


def test_the_command_line_wins_over_what_a_task_chooses() -> None:
    for task, constraint in (("ppo", "none"), ("ppo_lag", "lagrangian")):
        plain = train_config(composed(f"task={task}"))
        assert (plain.constraint.name, plain.advantage.name, plain.task.name) == (constraint, "gae", task)
        words = [f"task={task}", "constraint=pid", "advantage=rloo", "roles=shared", "rollout=vllm", "task.epochs=3"]
        # in any order
        for typed in (words, words[::-1]):
            config = train_config(composed(*typed))
            assert (config.constraint.name, config.advantage.name, config.task.epochs) == ("pid", "rloo", 3)
            assert config.roles and config.rollout and (config.roles.name, config.rollout.name) == ("shared", "vllm")


def test_supervised_tasks_have_no_online_groups() -> None:
    config = train_config(composed("task=reward"))
    assert [getattr(config, group) for group in ONLINE_GROUPS] == [None] * len(ONLINE_GROUPS)
    for word in ("constraint=pid", "advantage=gae", "roles=shared", "rollout=native"):
        with pytest.raises(UserError, match="task=reward samples nothing"):
            checked(train_config(composed("task=reward", word)))


def test_the_command_line_wins_over_a_diff() -> None:
    assert composed("debug=fast").trainer.max_steps == 4
    assert composed("debug=fast", "trainer.max_steps=7", "name=mine").trainer.max_steps == 7
    assert composed("debug=fast", "name=mine").name == "mine"
