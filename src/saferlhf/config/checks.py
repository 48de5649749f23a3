"""Combinations of keys that cannot work, refused before anything heavy loads. One message each, with the mend."""

from __future__ import annotations

import math
import re

from saferlhf.config.check_values import layer_numbers, one_of, positive, seeds, shares
from saferlhf.config.checks_online import check_online_run
from saferlhf.config.checks_strategy import check_strategy
from saferlhf.config.checks_stream import check_stream
from saferlhf.config.checks_task import check_moderation, check_probe
from saferlhf.config.evaluate_schema import EvaluateConfig
from saferlhf.config.schema import DataConfig, EvaluationConfig, TrainConfig, TrainerConfig
from saferlhf.config.task_schema import ModerationConfig, ProbeConfig
from saferlhf.errors import UserError

MEASURES = ("preference", "moderation", "policy")
"""What can be measured of a model."""

LAYOUTS = (
    "auto",
    "columns",
    "dialogue",
    "safe_unsafe",
    "guard",
    "openai_moderation",
    "do_not_answer",
    "xsafety",
)
"""Ways to write a record, those of `data/sources/layouts.py`."""

ANSWERS = ("all", "better", "safer", "safe", "best", "response_0", "response_1")
"""Which responses of a pair become answers, those of `data/melt.py`."""


def check_config(config: TrainConfig) -> None:
    """Raise `UserError` at the first impossible or doubtful combination of keys."""
    _check_target(config)
    _check_choices(config)
    _check_name(config.name)
    _check_numbers(config)
    _check_model(config)
    _check_data(config)
    check_strategy(config)
    check_online_run(config)


def check_evaluate(config: EvaluateConfig) -> None:
    """The same for `evaluate.py`."""
    one_of(config.mode, "mode", ["score", "moderate", "compare"])
    if config.split is not None:
        one_of(config.split, "split", ["train", "val", "test", "all"])
    one_of(config.suite.unfit, "suite.unfit", ["refuse", "skip"])
    one_of(config.kept_layers, "kept_layers", ["all", "own"])
    _check_measures(config)
    _check_models(config)
    one_of(config.tracking.name, "tracking.name", ["mlflow", "none"])
    _check_trainer_choices(config.trainer, trains=False)
    _check_name(config.name)
    positive(
        {
            **_evaluation_counts(config.evaluation),
            **_data_counts(config.data),
            "trainer.eval_batch_size": config.trainer.eval_batch_size,
            "baseline_rows": config.baseline_rows,
        }
    )
    shares(_data_shares(config.data))
    _confidence(config.evaluation)
    seeds({"seed": config.seed, "data.seed": config.data.seed})
    _check_source(check_stream(config))


def _check_models(config: EvaluateConfig) -> None:
    if config.mode != "compare":
        if config.models is not None:
            raise UserError("several models are compared", "models", "add mode=compare, or name one: model=LOCATOR")
        if (not config.model or not config.model.strip()) and config.judge is None:  # which may stand in its place
            raise UserError("no model is named", "model", "give it on the command line: model=LOCATOR")
        return
    mend = "models=[A,B], or with headings models={ours: A, theirs: [B, C]}"
    if config.model:
        raise UserError("a comparison names its models together", "model", mend)
    if not isinstance(config.models, list | dict) or not config.models:
        raise UserError("no models to compare are named", "models", mend)


def _check_measures(config: EvaluateConfig) -> None:
    for measure in config.suite.measures:
        one_of(measure, "suite.measures", MEASURES)
    if not (config.suite.measures or config.suite.protocols or config.protocol):
        raise UserError("nothing to measure", "suite.measures", "choose from: " + " | ".join(MEASURES))
    named = {f"suite.protocols.{name}": protocol for name, protocol in config.suite.protocols.items()}
    if config.protocol is not None:
        named = {"protocol": config.protocol}
    for where, protocol in named.items():
        _check_name(protocol.name)
        one_of(protocol.unit, f"{where}.unit", ["response", "prompt", "pair"])
        for measure in protocol.measures:
            one_of(measure, f"{where}.measures", MEASURES)
        if protocol.preference is not None:
            one_of(protocol.preference, f"{where}.preference", ["better", "safer", "single"])
        for number, peer in enumerate(protocol.peers):
            one_of(peer.mark, f"{where}.peers.{number}.mark", ["published", "second-hand", "measured"])
        positive({f"{where}.max_rows": protocol.max_rows})
        _check_source(protocol.data)


def _check_target(config: TrainConfig) -> None:
    target = config.task._target_
    if not any(target.startswith(prefix) for prefix in config.allowed_targets):
        raise UserError(
            f"'{target}' is not in an allowed package",
            "task._target_",
            f"add yours: 'allowed_targets=[saferlhf.,{target.split('.')[0]}.]'",
        )


def _check_choices(config: TrainConfig) -> None:
    one_of(config.backbone.template, "backbone.template", ["native", "paper"])
    one_of(config.backbone.dtype, "backbone.dtype", ["float32", "bfloat16"])
    one_of(config.backbone.attention, "backbone.attention", ["sdpa", "eager", "flash_attention_2"])
    one_of(config.quantization.name, "quantization.name", ["none", "nf4"])
    one_of(config.quantization.compute_dtype, "quantization.compute_dtype", ["float32", "bfloat16", "float16"])
    one_of(config.adapter.name, "adapter.name", ["none", "lora"])
    one_of(config.optimizer.name, "optimizer.name", ["adamw", "sgd", "adamw_8bit", "paged_adamw_8bit"])
    one_of(config.schedule.name, "schedule.name", ["cosine", "linear", "constant"])
    one_of(config.tracking.name, "tracking.name", ["mlflow", "none"])
    _check_trainer_choices(config.trainer)
    if hasattr(config.task, "pooling"):
        one_of(config.task.pooling, "task.pooling", ["last", "mean"])
    if hasattr(config.task, "preference"):
        one_of(config.task.preference, "task.preference", ["better", "safer", "single"])
    if hasattr(config.task, "head_start"):
        plain = "base_rates" if isinstance(config.task, ModerationConfig) else "random"
        one_of(config.task.head_start, "task.head_start", [plain, "linear_probe"])
        layer_numbers(config.task.layers, "task.layers")
    _check_adapter(config)
    if isinstance(config.task, ModerationConfig):
        check_moderation(config.task)
    if isinstance(config.task, ProbeConfig):
        check_probe(config.task)


def _check_adapter(config: TrainConfig) -> None:
    adapter = config.adapter
    layer_numbers(adapter.blocks, "adapter.blocks")
    if not adapter.cache_frozen:
        return
    if adapter.name != "lora" or not adapter.blocks or min(adapter.blocks) < 1:
        mend = "adapter=lora and the upper blocks alone, as adapter.blocks=[16,17,18,19,20,21]"
        raise UserError("no lower blocks are named that stay as they are", "adapter.cache_frozen", mend)
    if not hasattr(config.task, "head_start"):
        what = f"task={config.task.name} does not read states of whole rows"
        raise UserError(what, "adapter.cache_frozen", "adapter.cache_frozen=false")


def _check_trainer_choices(trainer: TrainerConfig, trains: bool = True) -> None:
    if trains and trainer.precision is None:
        raise UserError("no precision is named", "trainer.precision", "choose trainer=default, cpu or gpu")
    if trainer.precision is not None:
        one_of(trainer.precision, "trainer.precision", ["32-true", "bf16-mixed", "bf16-true"])
    one_of(trainer.accelerator, "trainer.accelerator", ["auto", "cpu", "gpu"])
    one_of(trainer.progress, "trainer.progress", ["auto", "bar", "lines", "none"])


def _check_name(name: str | None) -> None:
    """The name becomes a folder that commands will spell: no `=`, no `,`, no blanks, no way out of the root."""
    if name is not None and not re.fullmatch(r"\w[\w.-]*", name):
        mend = "use letters, digits, - _ and . (output_root=FOLDER says where runs go)"
        raise UserError(f"'{name}' cannot be a run folder's name", "name", mend)


# ------------------------------------------------------------------------------------------------ numbers
def _check_numbers(config: TrainConfig) -> None:
    trainer = config.trainer
    positive(
        {
            "trainer.epochs": trainer.epochs,
            "trainer.max_steps": trainer.max_steps,
            "trainer.batch_size": trainer.batch_size,
            "trainer.micro_batch_size": trainer.micro_batch_size,
            "trainer.eval_batch_size": trainer.eval_batch_size,
            "trainer.gradient_clip": trainer.gradient_clip,
            "trainer.val_every_steps": trainer.val_every_steps,
            "trainer.val_max_rows": trainer.val_max_rows,
            "trainer.log_every_steps": trainer.log_every_steps,
            "trainer.devices": trainer.devices,
            "trainer.threads": trainer.threads,
            "backbone.max_length": config.backbone.max_length,
            "adapter.rank": config.adapter.rank,
            "adapter.alpha": config.adapter.alpha,
            "optimizer.lr": config.optimizer.lr,
            "optimizer.eps": config.optimizer.eps,
            "checkpoint.every_steps": config.checkpoint.every_steps,
            "checkpoint.every_minutes": config.checkpoint.every_minutes,
            "checkpoint.keep": config.checkpoint.keep,
            **_evaluation_counts(config.evaluation),
            **_data_counts(config.data),
        }
    )
    shares(
        {
            "schedule.warmup_ratio": config.schedule.warmup_ratio,
            "schedule.final_ratio": config.schedule.final_ratio,
            "adapter.dropout": config.adapter.dropout,
            **_data_shares(config.data),
        }
    )
    _confidence(config.evaluation)
    if len(config.optimizer.betas) != 2:
        raise UserError(f"{config.optimizer.betas} are not two numbers", "optimizer.betas", "as [0.9, 0.95]")
    for beta in config.optimizer.betas:
        shares({"optimizer.betas": beta})
    weights = {"optimizer.weight_decay": config.optimizer.weight_decay}
    for key in ("regularization", "centering", "margin", "pair_weight", "safe_sign_weight", "unsafe_sign_weight"):
        weights[f"task.{key}"] = getattr(config.task, key, 0.0)
    for key, value in weights.items():
        if not 0 <= value < math.inf:
            raise UserError(f"{value} is below zero or no number", key, "give a number from zero up")
    terms = [value for key, value in vars(config.task).items() if key.endswith("_weight")]
    if terms and not any(terms):
        raise UserError("all weights of the loss are zero", "task", "give at least one term a weight")
    seeds({"seed": config.seed, "data.seed": config.data.seed})


def _evaluation_counts(evaluation: EvaluationConfig) -> dict[str, float | None]:
    return {
        "evaluation.bootstrap_draws": evaluation.bootstrap_draws,
        "evaluation.max_rows": evaluation.max_rows,
    }


def _data_counts(data: DataConfig) -> dict[str, float | None]:
    return {"data.train_rows": data.train_rows, "data.val_rows": data.val_rows, "data.test_rows": data.test_rows}


def _data_shares(data: DataConfig) -> dict[str, float]:
    for label, share in (data.agreement or {}).items():
        one_of(label, "data.agreement", ["better", "safer", "single"])
        if not 0.5 <= share <= 1:
            what = f"two annotators who agree on {share:g} of the pairs"
            raise UserError(what, f"data.agreement.{label}", "give a share from 0.5 to 1, or leave it out")
    return {
        "data.val_fraction": data.val_fraction,
        "data.test_fraction": data.test_fraction,
        "data.val_fraction + data.test_fraction": data.val_fraction + data.test_fraction,
    }


def _confidence(evaluation: EvaluationConfig) -> None:
    if not 0 < evaluation.confidence < 1:
        raise UserError(f"{evaluation.confidence} is no confidence", "evaluation.confidence", "give one like 0.95")


# ------------------------------------------------------------------------------------------------ combinations
def _check_model(config: TrainConfig) -> None:
    backbone, scratch = config.backbone, config.backbone.architecture is not None
    probes = isinstance(config.task, ProbeConfig)
    if probes and config.adapter.name != "none":
        raise UserError("a probe leaves its backbone as it is", f"adapter={config.adapter.name}", "adapter=none")
    if config.quantization.name == "nf4" and config.adapter.name == "none" and not probes:
        raise UserError(
            "a 4-bit base cannot be trained itself", "quantization=nf4", "add adapter=lora, or take quantization=none"
        )
    if scratch and config.quantization.name == "nf4":
        raise UserError(
            "a model built from scratch has nothing to quantise", "quantization=nf4", "choose backbone=smollm2 or hf"
        )
    if scratch and config.adapter.name == "lora" and config.init is None:
        raise UserError(
            "LoRA on random weights learns nothing useful", "adapter=lora", "give init=LOCATOR or a trained backbone"
        )
    if scratch and backbone.model is not None:
        raise UserError("both a model and an architecture are given", "backbone", "set one of them to null")
    if not scratch and backbone.model is None:
        raise UserError("no model is named", "backbone.model", "backbone.model=NAME_OR_FOLDER")
    if config.init is not None and not config.init.strip():
        raise UserError("empty locator", "init", "init=LOCATOR, or init=null for the backbone's own weights")
    _check_lengths(config)
    if backbone.attention == "flash_attention_2" and config.trainer.accelerator == "cpu":
        raise UserError("flash attention needs a GPU", "backbone.attention", "backbone.attention=sdpa")
    if config.optimizer.name.endswith("_8bit") and config.trainer.accelerator == "cpu":
        raise UserError("8-bit optimizers need a GPU", "optimizer", "optimizer=adamw")
    if config.adapter.merge_on_export and config.quantization.name == "nf4":
        raise UserError(
            "a 4-bit base cannot hold merged weights exactly",
            "adapter.merge_on_export",
            "export the adapter, or train with quantization=none",
        )


def _check_lengths(config: TrainConfig) -> None:
    """A from-scratch architecture's own numbers must fit each other and the tokenizer it is given."""
    backbone = config.backbone
    if backbone.architecture is None:
        if backbone.tokenizer == "toyworld":
            raise UserError("a trained model has its own tokenizer", "backbone.tokenizer", "backbone.tokenizer=null")
        return
    if config.init is not None:
        return  # the model that is loaded brings its own
    if backbone.tokenizer is None:
        raise UserError(
            "a model from scratch has no tokenizer of its own", "backbone.tokenizer", "backbone.tokenizer=toyworld"
        )
    longest = backbone.architecture.get("max_position_embeddings")
    if isinstance(longest, int) and backbone.max_length > longest:
        raise UserError(
            f"{backbone.max_length} tokens are more than the architecture's {longest} positions",
            "backbone.max_length",
            f"set backbone.architecture.max_position_embeddings={backbone.max_length}, or a shorter max_length",
        )
    width, heads = backbone.architecture.get("hidden_size"), backbone.architecture.get("num_attention_heads")
    if isinstance(width, int) and isinstance(heads, int) and (heads < 1 or width % heads):
        raise UserError(
            f"a width of {width} cannot be dealt to {heads} heads",
            "backbone.architecture.hidden_size",
            f"use a multiple of {max(1, heads)}, or another num_attention_heads",
        )


def _check_source(data: DataConfig) -> None:
    one_of(data.source, "data.source", ["toyworld", "file", "mix"])
    one_of(data.layout, "data.layout", LAYOUTS)
    one_of(data.taxonomy, "data.taxonomy", ["auto", "open", "pku", "beavertails"])
    if data.answers is not None:
        one_of(data.answers, "data.answers", ANSWERS)
    if data.split is not None:
        one_of(data.split, "data.split", ["train", "val", "test"])
    if data.source == "mix":
        _check_mix(data)
    elif data.parts:
        raise UserError("parts belong to a mixture", "data.parts", "choose data=mix")
    _check_annotators(data)
    _check_values(data)
    keys = ("path", "test_path", "columns", "values", "hub", "split", "named_splits")
    given = [key for key in keys if getattr(data, key) is not None]
    if data.source == "toyworld" and given:
        raise UserError(
            f"the toy world is generated, data.{given[0]} would be ignored",
            f"data={data.name}",
            "choose data=jsonl for a file of yours",
        )


def _check_values(data: DataConfig) -> None:
    for name, listed in (data.values or {}).items():
        if not isinstance(listed, dict) or not listed:
            mend = f"as data.values.{name}={{hateful: false, harmless: true}}"
            raise UserError("a mapping of the file's values to ours is needed", f"data.values.{name}", mend)


def _check_annotators(data: DataConfig) -> None:
    who = data.annotators
    if who is None:
        return
    if data.source != "toyworld":
        what = f"the rows of data={data.name} are labelled already"
        raise UserError(what, "data.annotators", "leave it out: only the toy world asks who labels it")
    for key, high in (("single_safety", 1.0), ("safety_error", 0.5)):
        value = getattr(who, key)
        if not 0 <= value <= high:
            mend = f"use a number from 0 to {high:g}"
            raise UserError(f"{key} is {value}", f"data.annotators.{key}", mend)
    if not 0 <= who.sharpness < float("inf"):
        raise UserError(f"sharpness is {who.sharpness}", "data.annotators.sharpness", "use a number from 0 up")


def _check_mix(data: DataConfig) -> None:
    if not data.parts:
        mend = "as 'data.parts={pku_saferlhf: {}, hh_rlhf: {rows: 1000}}'"
        raise UserError("a mixture without parts", "data.parts", mend)
    for key in ("path", "test_path", "columns", "values", "hub", "subset", "split", "named_splits", "join"):
        if getattr(data, key) is not None:
            mend = f"set it for one of them: data.parts.{next(iter(data.parts))}.{key}=..."
            raise UserError("parts have their own files", f"data.{key}", mend)


def _check_data(config: TrainConfig) -> None:
    _check_source(config.data)
    toy_words = config.backbone.tokenizer == "toyworld"
    if toy_words and config.data.source != "toyworld":
        raise UserError(
            f"backbone '{config.backbone.name}' knows only the toy world's words",
            f"data={config.data.name}",
            "choose backbone=smollm2 (with adapter=lora on a laptop) or backbone=hf",
        )
    if config.trainer.micro_batch_size and config.trainer.micro_batch_size > config.trainer.batch_size:
        raise UserError(
            f"{config.trainer.micro_batch_size} rows per forward are more than {config.trainer.batch_size} per step",
            "trainer.micro_batch_size",
            "it must not exceed trainer.batch_size",
        )
