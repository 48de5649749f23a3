"""Composed trees against the schemas: what no schema knows, what has the wrong type, what is missing."""

from __future__ import annotations

import pytest
from command_lines import composed
from omegaconf import OmegaConf

from saferlhf.config import evaluate_schema, schema
from saferlhf.config.validate import (
    evaluate_config,
    in_plain_words,
    key_mend,
    known_keys,
    pipeline_config,
    suggestion,
    train_config,
    typed,
)
from saferlhf.errors import UserError


@pytest.mark.parametrize(
    ("node", "where", "what"),
    [
        ({"name": "x", "warmup_ratoi": 0.1}, "schedule.warmup_ratoi", "unknown key 'warmup_ratoi'"),
        ({"name": "x", "warmup_ratio": "much"}, "schedule.warmup_ratio", "'much' is not a number"),
        ({"name": "x", "warmup_ratio": None}, "schedule.warmup_ratio", "null is not possible"),
        ({"name": "x", "warmup_ratio": "???"}, "schedule.warmup_ratio", "a value is missing"),
        ({}, "schedule.name", "a value is missing"),
    ],
)
def test_a_node_that_does_not_fit(node: dict[str, object], where: str, what: str) -> None:
    with pytest.raises(UserError) as caught:
        typed(schema.ScheduleConfig, node, "schedule")
    assert (caught.value.what, caught.value.where) == (what, where)


def test_a_node_that_fits() -> None:
    config = typed(schema.ScheduleConfig, {"name": "cosine", "warmup_ratio": 0}, "schedule")
    assert config == schema.ScheduleConfig(name="cosine", warmup_ratio=0.0)
    assert isinstance(config.warmup_ratio, float)


def test_whole_numbers_stay_whole() -> None:
    with pytest.raises(UserError, match=r"'1.5' is not a whole number"):
        typed(schema.AdapterConfig, {"name": "lora", "rank": 1.5}, "adapter")
    with pytest.raises(UserError, match="'perhaps' is neither true nor false"):
        typed(schema.QuantizationConfig, {"name": "nf4", "double_quant": "perhaps"}, "quantization")
    with pytest.raises(UserError, match=r"not a list; write \[a,b\]"):
        typed(schema.OptimizerConfig, {"name": "adamw", "betas": 0.9}, "optimizer")
    with pytest.raises(UserError, match=r"not a mapping; write \{key: value\}"):
        typed(schema.DataConfig, {"name": "x", "source": "file", "columns": "prompt"}, "data")
    with pytest.raises(UserError, match="'strict' is not a mapping of keys"):
        typed(schema.DataConfig, {"name": "x", "source": "file", "policy": "strict"}, "data")


def test_a_plus_does_not_get_past_the_schema() -> None:
    """Hydra's own struct check is by-passed by `+key=value`, at any depth and at the top."""
    cases = {
        "+trainer.max_step=2": ("trainer.max_step", "did you mean 'max_steps'?"),
        "+data.policy.emtpy=drop": ("data.policy.emtpy", "did you mean 'empty'?"),
        "+task.margn=1": ("task.margn", "did you mean 'margin'?"),
        "+bakcbone=tiny": ("bakcbone", "did you mean 'backbone'?"),
        "+debg=fast": ("debg", "did you mean 'debug'?"),
    }
    for override, (where, mend) in cases.items():
        with pytest.raises(UserError) as caught:
            train_config(composed("task=reward", override))
        assert (caught.value.where, caught.value.mend) == (where, mend)
    with pytest.raises(UserError, match="did you mean 'mode' or 'model'"):
        evaluate_config(composed("model=x", "+modle=y", command="evaluate"))


def test_a_key_of_another_task_is_no_typing_error() -> None:
    with pytest.raises(UserError, match=r"unknown key 'margin'.*known: _target_, name, train_on_prompt"):
        train_config(composed("task=sft", "+task.margin=1"))


def test_a_run_needs_a_task() -> None:
    with pytest.raises(UserError, match=r"no task is named \(in task\); choose one: task=sft\|reward\|cost"):
        train_config(composed())
    tree = composed("task=reward")
    OmegaConf.update(tree, "task.name", "rewrd")
    with pytest.raises(UserError, match=r"unknown task 'rewrd'.*did you mean 'reward'"):
        train_config(tree)


def test_a_group_taken_away_is_missed() -> None:
    with pytest.raises(UserError, match=r"a value is missing \(in trainer\)"):
        train_config(composed("task=reward", "~trainer"))


def test_interpolations_are_resolved() -> None:
    config = train_config(composed("task=reward", "name=run-${seed}", "seed=3", "data.seed=${seed}"))
    assert (config.name, config.data.seed) == ("run-3", 3)


def test_a_mapping_without_a_schema_takes_any_key() -> None:
    config = train_config(composed("task=reward", "+tracking.tags.who=me", "+backbone.architecture.rope_theta=1e4"))
    assert config.tracking.tags == {"who": "me"}
    assert config.backbone.architecture is not None
    assert config.backbone.architecture["rope_theta"] == 10_000


def test_a_pipeline_that_does_not_fit() -> None:
    node = {"name": "mine", "stages": ["a"], "definitions": {"a": {"overides": []}}}
    with pytest.raises(UserError, match=r"unknown key 'overides'.*did you mean 'overrides'"):
        pipeline_config(node)


@pytest.mark.parametrize(
    ("dotted", "some"),
    [
        ("x", {"task", "pipeline", "debug", "experiment", "seed"}),
        ("trainer.x", {"max_steps", "devices"}),
        ("data.policy.x", {"empty", "overlap"}),
        ("task.x", {"margin", "train_on_prompt", "pair_weight"}),
        ("pipeline.x", {"stages", "parallel"}),
        ("pipeline.definitions.sft.x", {"overrides", "inputs"}),
    ],
)
def test_known_keys(dotted: str, some: set[str]) -> None:
    assert some <= set(known_keys(dotted))


def test_known_keys_of_unknown_parents() -> None:
    assert known_keys("nowhere.x") == []
    assert known_keys("backbone.architecture.x") == []
    assert "pipeline" not in known_keys("x", evaluate_schema.EvaluateConfig)


def test_suggestions() -> None:
    known = ["max_steps", "val_every_steps", "val_max_rows", "batch_size"]
    assert suggestion("max_step", known) == "did you mean 'max_steps'?"
    assert suggestion("val_rows", ["val_max_rows", "val_all_rows"]) == "did you mean 'val_max_rows' or 'val_all_rows'?"
    assert suggestion("zzz", known) == "known: max_steps, val_every_steps, val_max_rows, batch_size"
    assert key_mend("batch_size", known) == "another choice of this group has it, yours has not"


def test_other_complaints_stay_as_they_are() -> None:
    assert in_plain_words("something else") == "something else"
