"""Before anything heavy loads: fill defaults, refuse the impossible, and find the run's folder by its identity."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from saferlhf.config.checks import check_config
from saferlhf.config.defaults import fill_defaults
from saferlhf.config.files import read_json
from saferlhf.config.identity import identity_tree, run_hash
from saferlhf.config.run_folder import RunFolder, fresh_folder, latest_folder
from saferlhf.config.schema import TrainConfig
from saferlhf.data.build import data_fingerprint
from saferlhf.data.checks import check_policy
from saferlhf.errors import UserError
from saferlhf.models.locator import content_id_of
from saferlhf.models.source import backbone_content_id


@dataclass(frozen=True)
class LocatedRun:
    """A checked config and where its run lives.

    Attributes:
        config: defaults filled in.
        folder: of the run; may not exist yet.
        hash: the run's identity.
        identity: the tree the hash was taken over.
    """

    config: TrainConfig
    folder: RunFolder
    hash: str
    identity: dict[str, Any]


def checked(config: TrainConfig) -> TrainConfig:
    """Defaults filled in, impossible combinations refused."""
    config = fill_defaults(config)
    check_config(config)
    check_policy(config.data.policy)
    return config


def locate_run(config: TrainConfig) -> LocatedRun:
    """Identity and folder of a checked config.

    Raises:
        UserError: a file or model it names does not exist, or `resume` names a run of another identity.
    """
    root = Path(config.output_root)

    def content_of(key: str, value: str) -> str:
        if key == "backbone.model":
            return backbone_content_id(config.backbone, output_root=root, cache_dir=config.cache_dir)
        if key == "init" or key.startswith(("roles.", "scorers.")):
            return content_id_of(value, output_root=root, cache_dir=config.cache_dir)
        return "by fingerprint"  # data paths: the files' content enters below

    tree = identity_tree(config, content_of)
    tree["data_fingerprint"] = data_fingerprint(config.data)
    digest = run_hash(tree)
    assert config.name is not None
    base = root / config.name / digest
    if config.resume == "auto":
        folder = latest_folder(base)
    elif config.resume == "never":
        folder = fresh_folder(base)
    else:
        folder = _named_folder(Path(config.resume), tree)
    return LocatedRun(config, RunFolder(folder), digest, tree)


def _named_folder(path: Path, tree: dict[str, Any]) -> Path:
    """The run folder that a path names (itself, or a checkpoint in it), if it is the same run."""
    checkpoint = path.suffix == ".ckpt"
    folder = path.parent.parent if checkpoint else path
    stored = read_json(folder / "identity.json")
    if stored is None or (checkpoint and not path.exists()):
        raise UserError(
            f"'{path}' is no run folder and no checkpoint in one", "resume", "resume=auto finds it by itself"
        )
    differing = _differences(stored, tree)
    if differing:
        raise UserError(
            f"that run had other values of {', '.join(differing[:5])}",
            f"resume={path}",
            "give the same values, or resume=never for a fresh run (init=LOCATOR starts from its weights)",
        )
    return folder


def _differences(old: Any, new: Any, prefix: str = "") -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(set(old) | set(new))
        return [d for key in keys for d in _differences(old.get(key), new.get(key), f"{prefix}{key}.")]
    return [] if old == new else [prefix.rstrip(".")]
