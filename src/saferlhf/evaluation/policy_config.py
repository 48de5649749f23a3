"""Which judges are asked about a policy, and what makes the numbers of its evaluation. Imports nothing heavy.

`judge=` is a choice of conf/judge, `judges=` more of them: locators of models (a moderator judges by its verdicts), or
mappings with the keys of conf/judge. Where nobody is named, the toy world's truth judges its own prompts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any

from saferlhf.config.evaluate_schema import EvaluateConfig
from saferlhf.config.identity import identity_tree
from saferlhf.config.rollout_schema import JudgeConfig, ModelJudgeConfig, TruthJudgeConfig, judge_config
from saferlhf.errors import UserError
from saferlhf.models.locator import content_id_of

TOYWORLD = "toyworld"


@dataclass(frozen=True)
class AskedJudge:
    """One judge that was named.

    Attributes:
        config: its keys; the name is empty where a model is to be called by its kind.
        plain: named by a locator alone, without a word on how it judges.
    """

    config: JudgeConfig
    plain: bool = False


def check_policy_keys(config: EvaluateConfig) -> None:
    """Keys of `suite=policy`: what they cannot be, and where they would be ignored.

    Raises:
        UserError: one line each.
    """
    for key in ("samples", "max_new_tokens"):
        value = getattr(config, key)
        if value is not None and value < 1:
            raise UserError(f"{value} is not a positive number", key, "give a whole number above zero")
    if not 0 <= config.temperature < math.inf:
        raise UserError(f"{config.temperature} is no temperature", "temperature", "give a number from zero up")
    if config.temperature == 0 and config.samples > 1:
        raise UserError("without sampling all samples are the same", "samples", "samples=1, or a temperature above 0")
    if config.mode == "compare" or (config.mode == "score" and _of_policies(config) and config.model):
        return
    in_place = config.mode == "score" and not config.model  # the judge stands in the place of a model
    for key in ("baseline", "reference", "judge", "judges", "harmful"):
        if getattr(config, key) is not None and not (in_place and key == "judge"):
            raise UserError(f"'{key}' belongs to the evaluation of a policy", key, "add suite=policy")


def _of_policies(config: EvaluateConfig) -> bool:
    """Whether policies are among what is to be measured."""
    if config.protocol is not None:
        return "policy" in config.protocol.measures
    return any(
        "policy" in found for found in (config.suite.measures, *(p.measures for p in config.suite.protocols.values()))
    )


def asked_judges(config: EvaluateConfig) -> list[AskedJudge]:
    """Who judges, in order; the first one that gives a quantity names it.

    Raises:
        UserError: nobody, what is no judge, two of one name, or ground truth for prompts it does not know.
    """
    found = [] if config.judge is None else [AskedJudge(judge_config(config.judge))]
    if config.judges is not None:
        found += _listed(config.judges)
    if not found and config.data.source == TOYWORLD:
        found = [AskedJudge(TruthJudgeConfig(name="truth", categories=True))]
    if not found:
        mend = "name some: judges=[outputs/reward,outputs/cost], or judge=remote"
        raise UserError("nobody is named to judge the responses", "judge", mend)
    for asked in found:
        if isinstance(asked.config, TruthJudgeConfig) and config.data.source != TOYWORLD:
            what = f"the truth is known of the toy world only, not of data={config.data.name}"
            raise UserError(what, "judge", "name another judge")
    names = [asked.config.name for asked in found if asked.config.name]
    if len(set(names)) < len(names):
        raise UserError(f"two judges of one name: {', '.join(names)}", "judges", "name them: judges={a: ..., b: ...}")
    return found


def policy_identity(config: EvaluateConfig) -> dict[str, Any]:
    """What makes the numbers beside model and rows: other models by content, and the keys of the evaluation."""

    def content(locator: str | None) -> str | None:
        if locator is None:
            return None
        return content_id_of(locator, output_root=Path(config.output_root), cache_dir=config.cache_dir)

    def judge(asked: AskedJudge) -> dict[str, Any]:
        return {"plain": asked.plain, **_plain(identity_tree(asked.config, lambda key, value: str(content(value))))}

    return {
        "baseline": content(config.baseline),
        "reference": content(config.reference),
        "judges": [judge(asked) for asked in asked_judges(config)],
        "samples": config.samples,
        "temperature": config.temperature,
        "max_new_tokens": config.max_new_tokens,
        "harmful": config.harmful,
    }


def _plain(value: Any) -> Any:
    """Scales of a remote judge and the like, which stay dataclasses inside a mapping, as plain data."""
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    return {key: _plain(item) for key, item in value.items()} if isinstance(value, Mapping) else value


def _listed(judges: Any) -> list[AskedJudge]:
    if isinstance(judges, Mapping):
        return [_one(node, str(name), f"judges.{name}") for name, node in judges.items()]
    if isinstance(judges, Sequence) and not isinstance(judges, str):
        return [_one(node, "", f"judges[{place}]") for place, node in enumerate(judges)]
    raise UserError(f"'{judges}' is no list", "judges", "as judges=[outputs/reward,outputs/cost]")


def _one(node: Any, name: str, where: str) -> AskedJudge:
    if isinstance(node, str) and node.strip():
        return AskedJudge(ModelJudgeConfig(name=name, model=node), plain=True)
    if not isinstance(node, Mapping):
        raise UserError(f"'{node}' names no judge", where, "give a locator, or keys of conf/judge as {kind: remote}")
    return AskedJudge(judge_config({"name": name or str(node.get("kind", "")), **node}, where))
