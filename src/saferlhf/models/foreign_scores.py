"""Score models that this project did not write: released Beaver-style models and Hugging Face sequence classifiers.

`score_head` layout (safe-rlhf, `models/score_model` and `models/normalizer.py`; Beaver reward and cost models):

    model.*                         the trunk
    score_head.{weight,bias}        one score per position, read at the last real token
    normalizer.{mean,var,count}     running statistics; used where the configuration says `do_normalize`:
                                    reward (s - mean) / (std + 1e-8), cost s / (std + 1e-8), so that zero stays zero
    config.json                     `score_type` reward | cost | critic, `do_normalize`

Sequence classifiers with a decoder (Llama, GPT-2, Qwen2, ...): `score.weight` on the last real token. One output is a
score as it is. Two outputs are two classes: the score of a class is its log odds, the difference of both outputs, so
that zero is the boundary. More outputs are scores only where each is a label of its own (multi-label).

Either way the score is linear in the last hidden state; what normalises it is folded into weight and bias. Safetensors
only: files that could run code are refused.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from saferlhf.errors import UserError
from saferlhf.models.locator import Location
from saferlhf.models.source import hub_cached, require_hub

NORMALIZER_EPS = 1e-8
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


@dataclass(frozen=True)
class ForeignScores:
    """Where the scores of a model are, known from its configuration alone.

    Attributes:
        layout: "score_head" or "classifier".
        kind: reward | cost | classifier.
        template: the chat format it was trained in: "paper" for the score_head layout; None: not known.
        location: of the model.
        config: its config.json.
    """

    layout: str
    kind: str
    template: str | None
    location: Location
    config: dict[str, Any]


def find_foreign_scores(location: Location) -> ForeignScores | None:
    """What kind of score model a plain folder or hub name is; None: not a score model."""
    if location.kind == "hub":
        assert location.name is not None
        if not hub_cached(location.name, location.revision):
            require_hub(location.name, location.revision)
    file = _model_file(location, "config.json")
    if file is None:
        return None
    try:
        config = json.loads(file.read_text())
        names = [str(name) for name in config.get("architectures") or []]
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"damaged config.json: {error}", str(file), "get the model again") from error
    if any(name.endswith("ForScore") for name in names):
        kind = config.get("score_type", "reward")
        if kind not in ("reward", "cost"):
            mend = "start from the reward or cost model that it was trained from"
            raise UserError(f"a model with score_type {kind!r} scores no responses", location.locator, mend)
        return ForeignScores("score_head", kind, "paper", location, config)
    if any(name.endswith("ForSequenceClassification") for name in names):
        return ForeignScores("classifier", "classifier", None, location, config)
    return None


def foreign_heads(found: ForeignScores) -> dict[str, tuple[Tensor, Tensor]]:
    """Score name -> (weight (1, H), bias (1,)) in float32, everything folded in.

    Raises:
        UserError: the head or its normaliser is not in the files, the files are pickled, or the score is not linear.
    """
    read = _reader(found.location)
    return _score_head(found, read) if found.layout == "score_head" else _classifier(found, read)


Reader = Callable[[str], Tensor | None]


def _score_head(found: ForeignScores, read: Reader) -> dict[str, tuple[Tensor, Tensor]]:
    where = found.location.locator
    weight, bias = read("score_head.weight"), read("score_head.bias")
    if weight is None:
        raise UserError("score_head.weight is missing: its scores would be random", where, "get the model again")
    if len(weight) != 1:
        raise UserError(f"the head gives {len(weight)} scores, not one", where, "use a reward or cost model")
    # where the configuration promises a bias, a cost without it has its zero at another place
    promised = found.config.get("score_bias", found.config.get("bias", False))
    if bias is None and promised:
        raise UserError("score_head.bias is missing, which its configuration promises", where, "get the model again")
    bias = torch.zeros(1) if bias is None else bias.float()
    weight = weight.float()
    if found.config.get("do_normalize", False):
        mean, std = _statistics(found, read)
        shift = mean if found.kind == "reward" else torch.zeros_like(mean)
        weight, bias = weight / std, (bias - shift) / std
    return {found.kind: (weight, bias)}


def _statistics(found: ForeignScores, read: Reader) -> tuple[Tensor, Tensor]:
    """(mean (1,), std + eps (1,)) of the normaliser, from its buffers or else from the configuration."""
    values = []
    for name in ("mean", "var"):
        value = read(f"normalizer.{name}")
        if value is None and found.config.get(name) is not None:
            value = torch.as_tensor(found.config[name])
        if value is None or value.numel() != 1 or not bool(torch.isfinite(value).all()):
            what = f"the model normalises its scores, but normalizer.{name} is missing or no number"
            raise UserError(what, found.location.locator, "get the model again, or set do_normalize to false in it")
        values.append(value.float().reshape(1))
    mean, var = values
    return mean, var.clamp_min(0).sqrt() + NORMALIZER_EPS


def _classifier(found: ForeignScores, read: Reader) -> dict[str, tuple[Tensor, Tensor]]:
    where = found.location.locator
    weight, bias = read("score.weight"), read("score.bias")
    if weight is None:
        what = "this classifier's head is not one linear map on the last token (score.weight)"
        raise UserError(what, where, "use a classifier with a decoder, such as LlamaForSequenceClassification")
    weight = weight.float()
    count = len(weight)
    bias = torch.zeros(count) if bias is None else bias.float()
    if count == 1:
        return {"score": (weight, bias)}
    labels = [str((found.config.get("id2label") or {}).get(str(i), f"LABEL_{i}")) for i in range(count)]
    names = [label.replace(".", "_") for label in labels]
    if len(set(names)) < count:
        raise UserError(f"its labels are not distinct: {labels}", where, "correct id2label in its config.json")
    multi = found.config.get("problem_type") == "multi_label_classification"
    if not multi and count > 2:
        what = f"the log odds of one of {count} exclusive classes are not linear"
        raise UserError(what, where, "use a classifier with one output, two classes or independent labels")
    if not multi:
        weight, bias = weight - weight.flip(0), bias - bias.flip(0)
    return {name: (weight[i : i + 1], bias[i : i + 1]) for i, name in enumerate(names)}


def _reader(location: Location) -> Reader:
    """Name -> tensor or None, from safetensors files."""
    index = _model_file(location, INDEX)
    files: dict[str, str] | None = None if index is None else json.loads(index.read_text())["weight_map"]
    if index is None and _model_file(location, WEIGHTS) is None:
        raise UserError(
            "no safetensors weights: pickled files can run code and are not read",
            location.locator,
            "save it again with safe_serialization, or name a revision that has model.safetensors",
        )

    def read(name: str) -> Tensor | None:
        if files is not None and name not in files:
            return None
        file = _model_file(location, WEIGHTS if files is None else files[name])
        if file is None:
            raise UserError(f"{(files or {}).get(name, WEIGHTS)} is missing", location.locator, "get the model again")
        try:
            with safe_open(str(file), framework="pt") as tensors:
                return tensors.get_tensor(name) if name in tensors.keys() else None  # noqa: SIM118 (no mapping)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{file.name} is damaged: {error}", location.locator, "get the model again") from error

    return read


def _model_file(location: Location, name: str) -> Path | None:
    """A file of a model, from its folder or (cached or fetched) from the hub; None where it has no such file."""
    if location.folder is not None:
        file = location.folder / name
        return file if file.is_file() else None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        return Path(hf_hub_download(str(location.name), name, revision=location.revision))
    except EntryNotFoundError:  # LocalEntryNotFoundError, of offline mode, is one of them
        return None
