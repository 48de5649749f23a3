"""Combinations that cannot work are refused with the key and the mend; each has a neighbour that works."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
from command_lines import composed

from saferlhf.config.checks import check_config, check_evaluate
from saferlhf.config.defaults import fill_defaults
from saferlhf.config.evaluate_schema import EvaluateConfig
from saferlhf.config.schema import AnnotatorsConfig, TrainConfig
from saferlhf.config.validate import evaluate_config, train_config
from saferlhf.errors import UserError

BASES = {
    "tiny": ["task=reward"],
    "sft": ["task=sft"],
    "cost": ["task=cost"],
    "smollm2": ["task=reward", "backbone=smollm2"],
    "lora": ["task=reward", "backbone=smollm2", "adapter=lora"],
    "nf4": ["task=reward", "backbone=smollm2", "adapter=lora", "quantization=nf4"],
    "file": ["task=reward", "data=jsonl", "data.path=pairs.jsonl", "backbone=smollm2", "adapter=lora"],
    "cpu": ["task=reward", "backbone=smollm2", "trainer=cpu"],
    "gpu": ["task=reward", "backbone=smollm2", "trainer=gpu"],
}
_made: dict[str, TrainConfig] = {}


def base(name: str) -> TrainConfig:
    """A copy of a config that passes."""
    if name not in _made:
        _made[name] = fill_defaults(train_config(composed(*BASES[name])))
    return deepcopy(_made[name])


def changed(config: Any, **values: Any) -> Any:
    """The config with some dotted keys (`__` for the dot) set."""
    for dotted, value in values.items():
        node = config
        *parents, leaf = dotted.split("__")
        for parent in parents:
            node = getattr(node, parent)
        assert hasattr(node, leaf), dotted
        setattr(node, leaf, value)
    return config


@pytest.mark.parametrize("name", BASES)
def test_the_bases_pass(name: str) -> None:
    check_config(base(name))


IMPOSSIBLE = [
    # weights, quantisation, adapters
    ("smollm2", {"quantization__name": "nf4"}, "quantization=nf4", "adapter=lora"),
    ("tiny", {"quantization__name": "nf4", "adapter__name": "lora"}, "quantization=nf4", "backbone=smollm2"),
    ("tiny", {"adapter__name": "lora"}, "adapter=lora", "init=LOCATOR"),
    ("nf4", {"adapter__merge_on_export": True}, "adapter.merge_on_export", "quantization=none"),
    ("tiny", {"backbone__model": "some/model"}, "backbone", "null"),
    ("smollm2", {"backbone__model": None}, "backbone.model", "backbone.model="),
    ("tiny", {"init": " "}, "init", "init=LOCATOR"),
    # architecture and tokenizer
    ("tiny", {"backbone__max_length": 1024}, "backbone.max_length", "max_position_embeddings=1024"),
    ("tiny", {"backbone__tokenizer": None}, "backbone.tokenizer", "backbone.tokenizer=toyworld"),
    ("smollm2", {"backbone__tokenizer": "toyworld"}, "backbone.tokenizer", "backbone.tokenizer=null"),
    # devices
    ("cpu", {"backbone__attention": "flash_attention_2"}, "backbone.attention", "sdpa"),
    ("cpu", {"optimizer__name": "adamw_8bit"}, "optimizer", "optimizer=adamw"),
    ("cpu", {"optimizer__name": "paged_adamw_8bit"}, "optimizer", "optimizer=adamw"),
    ("tiny", {"trainer__devices": 2}, "trainer.devices", "strategy=ddp"),
    ("tiny", {"trainer__accelerator": "tpu"}, "trainer.accelerator", "auto | cpu | gpu"),
    # data
    ("file", {"backbone__tokenizer": "toyworld"}, "backbone.tokenizer", "null"),
    (
        "tiny",
        {"data__source": "file", "data__name": "jsonl", "data__annotators": None},
        "data=jsonl",
        "backbone=smollm2",
    ),
    ("tiny", {"data__path": "pairs.jsonl"}, "data=toyworld", "data=jsonl"),
    ("tiny", {"data__test_path": "pairs.jsonl"}, "data=toyworld", "data=jsonl"),
    ("tiny", {"data__columns": {"prompt": "q"}}, "data=toyworld", "data=jsonl"),
    ("tiny", {"data__source": "web"}, "data.source", "toyworld | file"),
    ("tiny", {"data__source": "file", "data__name": "jsonl"}, "data.annotators", "only the toy world"),
    ("file", {"data__annotators": AnnotatorsConfig()}, "data.annotators", "only the toy world"),
    ("tiny", {"data__annotators__single_safety": -0.01}, "data.annotators.single_safety", "from 0 to 1"),
    ("tiny", {"data__annotators__single_safety": 1.01}, "data.annotators.single_safety", "from 0 to 1"),
    ("tiny", {"data__annotators__single_safety": float("nan")}, "data.annotators.single_safety", "from 0 to 1"),
    ("tiny", {"data__annotators__safety_error": 0.51}, "data.annotators.safety_error", "from 0 to 0.5"),
    ("tiny", {"data__annotators__safety_error": -0.1}, "data.annotators.safety_error", "from 0 to 0.5"),
    ("tiny", {"data__annotators__sharpness": -1.0}, "data.annotators.sharpness", "from 0 up"),
    ("tiny", {"data__annotators__sharpness": float("nan")}, "data.annotators.sharpness", "from 0 up"),
    ("tiny", {"data__annotators__sharpness": float("inf")}, "data.annotators.sharpness", "from 0 up"),
    ("file", {"data__val_fraction": 0.6, "data__test_fraction": 0.4}, "data.val_fraction + data.test_fraction", "0 up"),
    # names
    ("tiny", {"name": "a=b"}, "name", "letters"),
    ("tiny", {"name": "a,b"}, "name", "letters"),
    ("tiny", {"name": "a/b"}, "name", "letters"),
    ("tiny", {"name": ".."}, "name", "letters"),
    ("tiny", {"name": "a b"}, "name", "letters"),
    ("tiny", {"name": ""}, "name", "letters"),
    # targets
    ("tiny", {"task___target_": "os.system"}, "task._target_", "allowed_targets=[saferlhf.,os.]"),
    ("tiny", {"task___target_": "saferlhfevil.X"}, "task._target_", "allowed_targets"),
    # numbers
    ("tiny", {"trainer__micro_batch_size": 33}, "trainer.micro_batch_size", "trainer.batch_size"),
    ("tiny", {"optimizer__betas": [0.9]}, "optimizer.betas", "[0.9, 0.95]"),
    ("tiny", {"optimizer__betas": [0.9, 1.0]}, "optimizer.betas", "1"),
    ("tiny", {"optimizer__weight_decay": -0.1}, "optimizer.weight_decay", "zero"),
    ("tiny", {"task__margin": float("nan")}, "task.margin", "zero"),
    ("tiny", {"task__regularization": -1e-3}, "task.regularization", "zero"),
    ("cost", {"task__unsafe_sign_weight": -1.0}, "task.unsafe_sign_weight", "zero"),
    (
        "cost",
        {"task__pair_weight": 0.0, "task__safe_sign_weight": 0.0, "task__unsafe_sign_weight": 0.0},
        "task",
        "at least one",
    ),
    ("tiny", {"seed": -1}, "seed", "0 to 4294967295"),
    ("tiny", {"seed": 2**32}, "seed", "0 to 4294967295"),
    ("tiny", {"data__seed": -1}, "data.seed", "0 to 4294967295"),
    ("tiny", {"evaluation__confidence": 0.0}, "evaluation.confidence", "0.95"),
    ("tiny", {"evaluation__confidence": 1.0}, "evaluation.confidence", "0.95"),
]


@pytest.mark.parametrize(("name", "values", "where", "mend"), IMPOSSIBLE)
def test_impossible(name: str, values: dict[str, Any], where: str, mend: str) -> None:
    with pytest.raises(UserError) as caught:
        check_config(changed(base(name), **values))
    error = caught.value
    assert error.where == where, str(error)
    assert mend in error.mend, str(error)
    assert "\n" not in str(error)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("tiny", {"adapter__name": "lora", "init": "some/run"}),
        ("tiny", {"data__annotators": None}),
        ("tiny", {"data__annotators": AnnotatorsConfig(single_safety=0.0, sharpness=0.0, safety_error=0.5)}),
        ("tiny", {"data__annotators__single_safety": 1.0, "data__annotators__sharpness": 9.0}),
        ("tiny", {"backbone__max_length": 512}),
        ("tiny", {"backbone__max_length": 1024, "init": "some/run"}),
        ("tiny", {"backbone__tokenizer": None, "init": "some/run"}),
        ("lora", {"adapter__merge_on_export": True}),
        ("gpu", {"optimizer__name": "adamw_8bit", "backbone__attention": "flash_attention_2"}),
        ("file", {"data__columns": {"prompt": "q"}, "data__test_path": "test.jsonl"}),
        ("tiny", {"trainer__micro_batch_size": 32}),
        ("cost", {"task__pair_weight": 0.0, "task__safe_sign_weight": 0.0}),
        ("tiny", {"name": "my-run_2.b", "seed": 2**32 - 1}),
        ("tiny", {"trainer__gradient_clip": None, "checkpoint__every_minutes": None}),
        ("tiny", {"schedule__warmup_ratio": 0.0, "schedule__final_ratio": 0.99}),
        ("tiny", {"allowed_targets": ["saferlhf.", "mine."], "task___target_": "mine.Reward"}),
    ],
)
def test_its_neighbours_are_possible(name: str, values: dict[str, Any]) -> None:
    check_config(changed(base(name), **values))


CHOICES = [
    *("backbone.template", "backbone.dtype", "backbone.attention", "quantization.name", "quantization.compute_dtype"),
    *("adapter.name", "optimizer.name", "schedule.name", "strategy.name", "tracking.name", "trainer.precision"),
    *("trainer.accelerator", "trainer.progress", "data.source", "task.pooling", "task.preference"),
]


@pytest.mark.parametrize("key", CHOICES)
def test_a_choice_that_is_none_is_refused_with_the_list(key: str) -> None:
    with pytest.raises(UserError, match="choose one of: ") as caught:
        check_config(changed(base("tiny"), **{key.replace(".", "__"): "nothing"}))
    assert caught.value.where == key
    assert "'nothing'" in caught.value.what


POSITIVE = [
    *("trainer.epochs", "trainer.max_steps", "trainer.batch_size", "trainer.micro_batch_size"),
    *("trainer.eval_batch_size", "trainer.gradient_clip", "trainer.val_every_steps", "trainer.val_max_rows"),
    *("trainer.log_every_steps", "trainer.devices", "trainer.threads", "backbone.max_length", "adapter.rank"),
    *("adapter.alpha", "optimizer.lr", "optimizer.eps", "checkpoint.every_steps", "checkpoint.every_minutes"),
    *("checkpoint.keep", "evaluation.bootstrap_draws", "evaluation.max_rows"),
    *("data.train_rows", "data.val_rows", "data.test_rows"),
]


@pytest.mark.parametrize("key", POSITIVE)
@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf")])
def test_counts_and_rates_are_positive_and_finite(key: str, value: float) -> None:
    with pytest.raises(UserError, match="is not a positive number") as caught:
        check_config(changed(base("tiny"), **{key.replace(".", "__"): value}))
    assert caught.value.where == key


SHARES = ["schedule.warmup_ratio", "schedule.final_ratio", "data.val_fraction", "data.test_fraction", "adapter.dropout"]


@pytest.mark.parametrize("key", SHARES)
@pytest.mark.parametrize("value", [-0.1, 1.0, float("nan")])
def test_shares_are_shares(key: str, value: float) -> None:
    with pytest.raises(UserError, match="is not a share") as caught:
        check_config(changed(base("tiny"), **{key.replace(".", "__"): value}))
    assert caught.value.where == key


@pytest.mark.parametrize(("width", "heads", "fits"), [(130, 4, False), (128, 4, True), (128, 0, False)])
def test_heads_divide_the_width(width: int, heads: int, fits: bool) -> None:
    config = base("tiny")
    assert config.backbone.architecture is not None
    config.backbone.architecture |= {"hidden_size": width, "num_attention_heads": heads}
    if fits:
        check_config(config)
    else:
        with pytest.raises(UserError, match="cannot be dealt to"):
            check_config(config)


# ------------------------------------------------------------------------------------------------ evaluate
@pytest.fixture(scope="module")
def evaluate_base() -> EvaluateConfig:
    return evaluate_config(composed("model=some/run", command="evaluate"))


def test_an_evaluation_passes(evaluate_base: EvaluateConfig) -> None:
    check_evaluate(evaluate_base)
    check_evaluate(replace(evaluate_base, split="val"))


@pytest.mark.parametrize(
    ("values", "where"),
    [
        ({"mode": "compute"}, "mode"),
        ({"split": "tst"}, "split"),
        ({"suite__measures": ["arena"]}, "suite.measures"),
        ({"suite__measures": []}, "suite.measures"),
        ({"model": " "}, "model"),
        ({"model": None}, "model"),
        ({"tracking__name": "wandb"}, "tracking.name"),
        ({"trainer__precision": "16"}, "trainer.precision"),
        ({"name": "a/b"}, "name"),
        ({"seed": -1}, "seed"),
        ({"evaluation__bootstrap_draws": 0}, "evaluation.bootstrap_draws"),
        ({"evaluation__confidence": 95.0}, "evaluation.confidence"),
        ({"data__test_rows": 0}, "data.test_rows"),
        ({"data__path": "x.jsonl"}, "data=toyworld"),
        ({"trainer__eval_batch_size": 0}, "trainer.eval_batch_size"),
    ],
)
def test_an_impossible_evaluation(evaluate_base: EvaluateConfig, values: dict[str, Any], where: str) -> None:
    with pytest.raises(UserError) as caught:
        check_evaluate(changed(deepcopy(evaluate_base), **values))
    assert caught.value.where == where
    assert caught.value.mend
