"""Combinations of keys that cannot work, refused before anything heavy loads. One message each, with the mend."""

from __future__ import annotations

from collections.abc import Iterable

from saferlhf.config.schema import TrainConfig
from saferlhf.errors import UserError


def check_config(config: TrainConfig) -> None:
    """Raise `UserError` at the first impossible or doubtful combination of keys."""
    _check_target(config)
    _check_choices(config)
    _check_numbers(config)
    _check_model(config)
    _check_data(config)


def _check_target(config: TrainConfig) -> None:
    target = config.task._target_
    if not any(target.startswith(prefix) for prefix in config.allowed_targets):
        raise UserError(
            f"'{target}' is not in an allowed package",
            "task._target_",
            f"add yours: 'allowed_targets=[saferlhf.,{target.split('.')[0]}.]'",
        )


def _one_of(value: str, where: str, choices: Iterable[str]) -> None:
    options = list(choices)
    if value not in options:
        raise UserError(f"'{value}' is not possible", where, "choose one of: " + " | ".join(options))


def _check_choices(config: TrainConfig) -> None:
    _one_of(config.backbone.template, "backbone.template", ["native", "paper"])
    _one_of(config.backbone.dtype, "backbone.dtype", ["float32", "bfloat16"])
    _one_of(config.backbone.attention, "backbone.attention", ["sdpa", "eager", "flash_attention_2"])
    _one_of(config.quantization.name, "quantization.name", ["none", "nf4"])
    _one_of(config.quantization.compute_dtype, "quantization.compute_dtype", ["float32", "bfloat16", "float16"])
    _one_of(config.adapter.name, "adapter.name", ["none", "lora"])
    _one_of(config.optimizer.name, "optimizer.name", ["adamw", "adamw_8bit", "paged_adamw_8bit"])
    _one_of(config.schedule.name, "schedule.name", ["cosine", "linear", "constant"])
    _one_of(config.strategy.name, "strategy.name", ["single"])
    _one_of(config.tracking.name, "tracking.name", ["mlflow", "none"])
    _one_of(config.trainer.precision, "trainer.precision", ["32-true", "bf16-mixed", "bf16-true"])
    _one_of(config.trainer.progress, "trainer.progress", ["auto", "bar", "lines", "none"])
    _one_of(config.data.source, "data.source", ["toyworld", "file"])
    if hasattr(config.task, "pooling"):
        _one_of(config.task.pooling, "task.pooling", ["last", "mean"])
    if hasattr(config.task, "preference"):
        _one_of(config.task.preference, "task.preference", ["better", "safer", "single"])


def _check_numbers(config: TrainConfig) -> None:
    trainer = config.trainer
    positive: dict[str, float | None] = {
        "trainer.epochs": trainer.epochs,
        "trainer.max_steps": trainer.max_steps,
        "trainer.batch_size": trainer.batch_size,
        "trainer.micro_batch_size": trainer.micro_batch_size,
        "trainer.eval_batch_size": trainer.eval_batch_size,
        "trainer.gradient_clip": trainer.gradient_clip,
        "trainer.val_every_steps": trainer.val_every_steps,
        "trainer.devices": trainer.devices,
        "trainer.threads": trainer.threads,
        "backbone.max_length": config.backbone.max_length,
        "optimizer.lr": config.optimizer.lr,
        "checkpoint.every_steps": config.checkpoint.every_steps,
        "checkpoint.every_minutes": config.checkpoint.every_minutes,
        "checkpoint.keep": config.checkpoint.keep,
        "evaluation.bootstrap_draws": config.evaluation.bootstrap_draws,
        "data.train_rows": config.data.train_rows,
        "data.val_rows": config.data.val_rows,
        "data.test_rows": config.data.test_rows,
    }
    for key, value in positive.items():
        if value is not None and value <= 0:
            raise UserError(f"{value} is not positive", key, "give a number above zero, or null for the default")
    shares = {
        "schedule.warmup_ratio": config.schedule.warmup_ratio,
        "schedule.final_ratio": config.schedule.final_ratio,
        "data.val_fraction": config.data.val_fraction,
        "data.test_fraction": config.data.test_fraction,
        "evaluation.confidence": config.evaluation.confidence,
        "adapter.dropout": config.adapter.dropout,
    }
    for key, value in shares.items():
        if not 0 <= value < 1:
            raise UserError(f"{value} is not a share", key, "give a number from 0 up to, but not including, 1")
    if len(config.optimizer.betas) != 2:
        raise UserError(f"{config.optimizer.betas} are not two numbers", "optimizer.betas", "as [0.9, 0.95]")


def _check_model(config: TrainConfig) -> None:
    backbone, scratch = config.backbone, config.backbone.architecture is not None
    if config.quantization.name == "nf4" and config.adapter.name == "none":
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
    if backbone.attention == "flash_attention_2" and config.trainer.accelerator == "cpu":
        raise UserError("flash attention needs a GPU", "backbone.attention", "backbone.attention=sdpa")
    if config.optimizer.name != "adamw" and config.trainer.accelerator == "cpu":
        raise UserError("8-bit optimizers need a GPU", "optimizer", "optimizer=adamw")
    if config.adapter.merge_on_export and config.quantization.name == "nf4":
        raise UserError(
            "a 4-bit base cannot hold merged weights exactly",
            "adapter.merge_on_export",
            "export the adapter, or train with quantization=none",
        )
    if config.trainer.devices > 1 and config.strategy.name == "single":
        raise UserError(f"strategy=single cannot use {config.trainer.devices} devices", "trainer.devices", "use 1")


def _check_data(config: TrainConfig) -> None:
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
