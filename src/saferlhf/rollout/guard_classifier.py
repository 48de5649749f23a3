"""Hugging Face sequence classifiers as guards: encoders and decoders, with labels that say which of them is unsafe.

Exclusive classes with outputs z, unsafe ones U, give logit = log sum_U exp z - log sum_rest exp z; independent labels,
and a single output, the largest z of the unsafe ones. Which labels are unsafe is never guessed from their order: one
label must be named so and every other one the opposite, or the config names them.

Differs from `models/foreign_scores.py`, which folds a linear head on a decoder's last token into a score model of ours:
here any head is read as transformers computes it, and any number of classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from saferlhf.config.rollout_schema import GuardJudgeConfig
from saferlhf.data.rows import Prompt
from saferlhf.data.templates import pad_id
from saferlhf.errors import UserError
from saferlhf.models.loading import LoadedModel, plain_backbone
from saferlhf.models.locator import Location
from saferlhf.models.metadata import ExportMetadata
from saferlhf.models.quantization import torch_dtype
from saferlhf.models.quiet import quiet_transformers
from saferlhf.models.source import hub_cached, require_hub
from saferlhf.models.tokenizer import load_tokenizer
from saferlhf.ops.sequences import last_index
from saferlhf.rollout.chat_guard import Guard, GuardReadings, padded
from saferlhf.rollout.guard_templates import Question, talk_text
from saferlhf.rollout.scorers import ScoreRequest

UNSAFE_NAMES = frozenset({"unsafe", "harmful", "toxic", "not safe"})
SAFE_NAMES = frozenset({"safe", "harmless", "benign", "non toxic", "not toxic", "nontoxic", "not harmful", "neutral"})
"""Names that say it all, in small letters; dashes and underscores count as spaces."""


class ClassifierGuard(Guard):
    """A Hugging Face sequence classifier, encoder or decoder, whose unsafe labels are known by name.

    It reads the tokenizer's chat template where there is one, or a text template, else prompt and response as a pair;
    with `reads=response` the response alone.

    Args:
        loaded: the classifier as transformers has it, and its tokenizer.
        config: see conf/judge/guard.yaml.

    Raises:
        UserError: it is not clear which of its labels are unsafe.
    """

    def __init__(self, loaded: LoadedModel, config: GuardJudgeConfig) -> None:
        super().__init__(loaded, config)
        stated = loaded.model.config
        labels = [str(stated.id2label.get(i, f"LABEL_{i}")) for i in range(stated.num_labels)]
        self._multi = stated.problem_type == "multi_label_classification" or len(labels) == 1
        self._unsafe = unsafe_labels(labels, config.unsafe_labels, exclusive=not self._multi)
        self._rest = [i for i in range(len(labels)) if i not in self._unsafe]
        self._question: Question | None = None
        if config.template != "native" or (config.reads == "both" and getattr(loaded.tokenizer, "chat_template", None)):
            self._question = Question(loaded.tokenizer, config.template, config.lead or "", config.generation_prompt)
        self._limit = min(self._limit, int(loaded.tokenizer.model_max_length))

    def readings(self, rows: Sequence[ScoreRequest]) -> GuardReadings:
        """What the guard says of N responses."""
        reasons: dict[int, str] = {}
        inputs: dict[int, dict[str, list[int]]] = {}
        for i, row in enumerate(rows):
            try:
                ids, prompt, response = self._fitted(row, self._encode, self._limit)
            except ValueError as error:
                reasons[i] = str(error)
                continue
            if ids is None:
                reasons[i] = f"the response does not fit {self._limit:,} tokens"
            else:
                inputs[i] = {"input_ids": ids} if self._question else self._pair(prompt, response)
        logits = np.full(len(rows), np.nan)
        if inputs:
            lengths = [len(one["input_ids"]) for one in inputs.values()]
            logits[list(inputs)] = self._logits(list(inputs.values()), self._forward, lengths)[:, 0]
            reasons |= {i: "the guard's logits are not numbers" for i in inputs if not math.isfinite(logits[i])}
        return GuardReadings(logits, reasons, (None,) * len(rows))

    def _encode(self, prompt: Prompt, response: str) -> list[int]:
        return self._question(prompt, response) if self._question else self._pair(prompt, response)["input_ids"]

    def _pair(self, prompt: Prompt, response: str) -> dict[str, list[int]]:
        texts = (response,) if self.config.reads == "response" else (talk_text(prompt), response)
        encoded = self._tokenizer(*texts, verbose=False)
        return {key: list(encoded[key]) for key in ("input_ids", "token_type_ids") if key in encoded}

    def _forward(self, inputs: list[dict[str, list[int]]]) -> Tensor:
        """(B, 1) log odds of unsafe."""
        ids, mask = padded([one["input_ids"] for one in inputs], pad_id(self._tokenizer), left=False)
        given = {"input_ids": ids.to(self._device), "attention_mask": mask.long().to(self._device)}
        if isinstance(head := getattr(self._model, "score", None), nn.Module):
            # a decoder: transformers looks for the last token that is not the pad token, which may be the end token
            hidden = self._model.base_model(**given, use_cache=False).last_hidden_state
            logits = head(hidden[torch.arange(len(inputs)), last_index(mask).to(self._device)])
        else:
            if "token_type_ids" in inputs[0]:
                kinds = padded([one["token_type_ids"] for one in inputs], 0, left=False)[0]
                given["token_type_ids"] = kinds.to(self._device)
            logits = self._model(**given).logits
        logits = logits.float().cpu().double()  # (B, L)
        if self._multi:
            return logits[:, self._unsafe].amax(1, keepdim=True)
        return (logits[:, self._unsafe].logsumexp(1) - logits[:, self._rest].logsumexp(1))[:, None]


def unsafe_labels(labels: Sequence[str], wanted: Sequence[str], *, exclusive: bool) -> list[int]:
    """Which of a classifier's labels say unsafe.

    Args:
        labels: all names, in order.
        wanted: the unsafe ones; empty: one label is named unsafe, harmful, .. and every other one safe, harmless, ..
        exclusive: the labels are classes of which one holds.

    Raises:
        UserError: a label it does not have, all labels of exclusive classes, or names that do not tell.
    """
    plain = [" ".join(label.lower().replace("_", " ").replace("-", " ").split()) for label in labels]
    where, mend = "judge.unsafe_labels", f"name the unsafe ones of its labels: {', '.join(labels)}"
    if not wanted:
        found = [i for i, name in enumerate(plain) if name in UNSAFE_NAMES]
        if len(found) != 1 or any(name not in SAFE_NAMES for i, name in enumerate(plain) if i not in found):
            raise UserError("the classifier's labels do not tell which one is unsafe", where, mend)
        return found
    lower = [label.lower() for label in labels]
    for name in wanted:
        if lower.count(name.lower()) != 1:
            raise UserError(f"the classifier has no label '{name}' of its own", where, mend)
    found = sorted({lower.index(name.lower()) for name in wanted})
    if exclusive and len(found) == len(labels):
        raise UserError("every label of the classifier would be unsafe", where, mend)
    return found


def load_classifier(location: Location, dtype: str, device: torch.device | str | None = None) -> LoadedModel:
    """A sequence classifier as transformers has it: weights from safetensors, all of them, and no code of its own.

    Args:
        location: a plain folder or hub name.
        dtype: float32 | bfloat16.
        device: where to put it; None: the CPU.

    Raises:
        UserError: no such model, a model of this project, or one without a trained head.
    """
    from transformers import AutoModelForSequenceClassification

    if location.kind == "export":
        raise UserError(f"'{location.locator}' is a model of this project", "judge.format=classifier", "use kind=model")
    if location.kind == "hub" and not hub_cached(str(location.name), location.revision):
        require_hub(str(location.name), location.revision)
    name = str(location.folder or location.name)
    try:
        with quiet_transformers():
            model, report = AutoModelForSequenceClassification.from_pretrained(
                name,
                revision=location.revision or "main",
                dtype=torch_dtype(dtype, "judge.dtype"),
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
    except (OSError, ValueError, ImportError) as error:
        first = str(error).strip().splitlines()[0]
        raise UserError(f"cannot load the classifier: {first}", name, "check judge.model and its files") from None
    if missing := sorted(report["missing_keys"]):
        what = f"{len(missing)} weights are missing, {missing[0]} among them: its verdicts would be random"
        raise UserError(what, name, "name a sequence classifier")
    model = model.eval().requires_grad_(False).to(device or "cpu")
    tokenizer = load_tokenizer(plain_backbone(location), location=location)
    return LoadedModel(model, tokenizer, ExportMetadata(kind="classifier"), {}, location)
