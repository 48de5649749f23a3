"""Values of the tasks' own keys that cannot work, refused before anything loads; see `checks.py`."""

from __future__ import annotations

import math
import re

from saferlhf.config.check_values import one_of, positive
from saferlhf.config.task_schema import KernelConfig, ModerationConfig, ProbeConfig
from saferlhf.errors import UserError


def check_moderation(task: ModerationConfig) -> None:
    """What every moderator has."""
    one_of(task.input, "task.input", ["prompt_and_response", "prompt"])
    one_of(task.severity_link, "task.severity_link", ["partial", "proportional"])
    one_of(task.category_weighting, "task.category_weighting", ["none", "sqrt", "balanced"])
    if not re.fullmatch(r"fpr@0?\.\d+|fpr@0", task.objectives.unsafe):
        one_of(task.objectives.unsafe, "task.objectives.unsafe", ["macro_f1", "accuracy", "f1", "fpr@0.05"])
    one_of(task.objectives.category, "task.objectives.category", ["f1", "accuracy", "exact_match"])
    one_of(task.objectives.severity, "task.objectives.severity", ["accuracy", "kappa"])
    levels = task.severity_weighting
    if isinstance(levels, str):
        one_of(levels, "task.severity_weighting", ["none", "balanced", "a list of 4 numbers"])
    elif not (
        isinstance(levels, list)
        and len(levels) == 4
        and all(isinstance(weight, int | float) and 0 <= weight < math.inf for weight in levels)
        and any(levels)
    ):
        mend = "none | balanced | four numbers from zero up, as [1,1,1,2]"
        raise UserError(f"{levels} is no weighting of four levels", "task.severity_weighting", mend)
    weights = vars(task.head_weights)
    if not all(0 <= weight < math.inf for weight in weights.values()) or not any(weights.values()):
        raise UserError(f"{weights} are no weights", "task.head_weights", "numbers from zero up, one above zero")
    positive({"task.unsafe_weight": task.unsafe_weight})
    names = task.categories
    if names is not None and (not names or len(set(names)) < len(names)):
        raise UserError(f"{names} are no distinct names", "task.categories", "name each once, or null: from the data")
    span = getattr(task, "span", "all")
    one_of(span, "task.span", ["all", "prompt", "response", "both", "all_and_response"])
    if task.input == "prompt" and span not in ("all", "prompt"):
        raise UserError(
            "a prompt alone has no response to look at", "task.span", "task.span=all, or another task.input"
        )


def check_probe(task: ProbeConfig) -> None:
    """What a probe has beside."""
    one_of(task.combine, "task.combine", ["concatenate", "average"])
    one_of(task.feature_dtype, "task.feature_dtype", ["float16", "float32"])
    if isinstance(task.layers, str):
        one_of(task.layers, "task.layers", ["auto", "all", "a list as [12,18,24,30]"])
    elif not (isinstance(task.layers, list) and task.layers and all(type(n) is int and n >= 0 for n in task.layers)):
        raise UserError(f"{task.layers} names no layers", "task.layers", "auto | all | a list as [12,18,24,30]")
    if task.folds < 2:
        raise UserError(f"{task.folds} folds leave nothing to compare", "task.folds", "use 2 or more")
    if not task.l2 or not all(0 < value < math.inf for value in task.l2):
        raise UserError(f"{task.l2} are no penalties", "task.l2", "a list of numbers above zero, as [1,0.1,0.01]")
    _check_kernel(task.kernel)
    positive({"task.batch_tokens": task.batch_tokens})


def _check_kernel(kernel: KernelConfig) -> None:
    one_of(kernel.name, "task.kernel.name", ["none", "gaussian"])
    if not kernel.l2 or not all(0 < value < math.inf for value in kernel.l2):
        raise UserError(f"{kernel.l2} are no penalties", "task.kernel.l2", "numbers above zero, as [1e-4,1e-5]")
    if not 0 < kernel.gamma < math.inf:
        raise UserError(f"{kernel.gamma} is no width", "task.kernel.gamma", "a number above zero, as 1.0")
    for key in ("axes", "rank", "landmarks"):
        positive({f"task.kernel.{key}": getattr(kernel, key)})
