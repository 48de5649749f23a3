"""Guard models of others as scorers: chat models that answer with a verdict (classifiers: `guard_classifier.py`).

A chat guard's probability is read from the logits z of the token that begins its verdict, as the card of Llama Guard 3
does, but over the words of both verdicts U (unsafe) and S (safe) alone, nothing sampled:

    logit = log sum_{t in U} exp z_t - log sum_{t in S} exp z_t,    p_unsafe = sigmoid(logit)

Where all these words together have less than `min_word_probability` of the full softmax, the guard was about to say
something else: the response is unparsed. A guard whose verdict comes after other lines (WildGuard) writes these first,
each time the most probable token. With `max_new_tokens` the answer is written out and must be readable too; it gives
categories and refusal. Verdict and cost come from p_unsafe alone: cost = p_unsafe - zero, unsafe where it is above 0.

Prompts are padded on the left, positions come from the mask, and a verdict closer to the threshold than rounding is
computed once more by itself, so that it does not depend on what else is in a batch. Code that a model brings along is
never run.
"""

from __future__ import annotations

import inspect
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import expit
from torch import Tensor

from saferlhf.config.rollout_schema import GuardJudgeConfig
from saferlhf.data.rows import Prompt, QuestionAnswer
from saferlhf.data.templates import end_id, pad_id
from saferlhf.errors import UserError
from saferlhf.models.causal import unwrapped
from saferlhf.models.loading import LoadedModel, load_export
from saferlhf.models.locator import resolve
from saferlhf.models.modes import eval_mode
from saferlhf.models.score_model import first_position
from saferlhf.ops.sequences import position_ids
from saferlhf.rollout.experience import micro_batch_indices
from saferlhf.rollout.generate import generate
from saferlhf.rollout.guard import GuardedScorer
from saferlhf.rollout.guard_templates import (
    FORMATS,
    ControlTokens,
    GuardAnswer,
    Question,
    fitted,
    parse_answer,
    verdict_tokens,
)
from saferlhf.rollout.prompts import PromptTokens
from saferlhf.rollout.scorers import Failure, ScoreRequest, Scores

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

TIE = 1e-3
"""Distance to the threshold, in logits, below which rounding may decide a verdict."""

SECRETS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_HUB_TOKEN")
"""Variables of the environment whose values stand in no message."""


@dataclass(frozen=True)
class GuardReadings:
    """What a guard says of N responses.

    Attributes:
        logits: (N,) float64 log odds of unsafe; NaN where there is none.
        reasons: place -> why there is no verdict.
        answers: N written answers; None: not written, or not readable.
    """

    logits: Floats
    reasons: Mapping[int, str]
    answers: tuple[GuardAnswer | None, ...]

    @property
    def unparsed(self) -> Bools:
        """(N,) True where there is no verdict."""
        mask = np.zeros(len(self.logits), dtype=bool)
        mask[list(self.reasons)] = True
        return mask


class Guard(ABC):
    """A scorer: is_safe, p_unsafe, cost, and what a guard of its kind says beside.

    Args:
        loaded: model and tokenizer, on the device they are to run on.
        config: see conf/judge/guard.yaml.

    Attributes:
        cut_prompts: questions so far whose prompt lost its beginning.
    """

    def __init__(self, loaded: LoadedModel, config: GuardJudgeConfig) -> None:
        self.config, self._model, self._tokenizer = config, loaded.model, loaded.tokenizer
        self._control = ControlTokens(loaded.tokenizer)
        self._zero_logit = math.log(config.zero / (1 - config.zero))
        self.cut_prompts = 0
        stated = getattr(getattr(unwrapped(loaded.model), "config", None), "max_position_embeddings", None)
        positions = config.max_length if stated is None else int(stated) - first_position(loaded.model)
        self._limit = min(config.max_length, positions)

    @property
    def name(self) -> str:
        """In metrics and messages."""
        return self.config.name

    @property
    def outputs(self) -> tuple[str, ...]:
        """See the class."""
        return ("is_safe", "p_unsafe", "cost")

    @abstractmethod
    def readings(self, rows: Sequence[ScoreRequest]) -> GuardReadings:
        """What the guard says of N responses."""

    def score(self, rows: Sequence[ScoreRequest]) -> Scores:
        """Scores of N requests; without a verdict NaN, and a failure `unparsable`."""
        if not rows:
            return Scores({name: np.zeros(0) for name in self.outputs})
        found = self.readings(rows)
        values = self._values(found)
        failures = [Failure(rows[i].row_id, "unparsable", reason, i) for i, reason in sorted(found.reasons.items())]
        return Scores({name: np.where(found.unparsed, np.nan, values[name]) for name in self.outputs}, tuple(failures))

    def _values(self, found: GuardReadings) -> dict[str, Floats]:
        p = expit(found.logits)
        cost = p - self.config.zero
        return {"is_safe": (cost <= 0).astype(np.float64), "p_unsafe": p, "cost": cost}

    def _fitted(self, row: ScoreRequest, encode: Callable[[Prompt, str], list[int]], limit: int) -> Any:
        """(ids or None, conversation that is left, response), control tokens broken up."""
        prompt, response = self._control.broken_prompt(row.prompt), self._control.broken(row.response)
        ids, prompt, cut = fitted(prompt, response, encode, self._tokenizer, limit)
        self.cut_prompts += cut and ids is not None
        return ids, prompt, response

    @torch.no_grad()
    def _logits(self, questions: Sequence[Any], forward: Callable[[list[Any]], Tensor], lengths: Sequence[int]) -> Any:
        """(N, n) float64 of any forward pass in batches; what is close to the threshold is computed again, alone."""
        found: Floats | None = None
        with eval_mode(self._model):
            sizes = np.asarray(lengths, dtype=np.int64)
            for part in micro_batch_indices(sizes, np.arange(len(questions)), self.config.batch_tokens):
                values = forward([questions[i] for i in part]).double().cpu().numpy()
                found = np.full((len(questions), values.shape[1]), np.nan) if found is None else found
                found[part] = values
            if found is not None:
                for i in np.flatnonzero(np.abs(found[:, 0] - self._zero_logit) < TIE).tolist():
                    found[i] = forward([questions[i]]).double().cpu().numpy()[0]
        return found

    @property
    def _device(self) -> torch.device:
        return next(iter(self._model.parameters())).device


class ChatGuard(Guard):
    """A causal language model that answers with a verdict; see the module.

    Outputs beside those of `Guard`: `is_refusal` and `category/<name>` where answers are written and say so.

    Args:
        loaded: a causal language model.
        config: see conf/judge/guard.yaml.

    Raises:
        UserError: a model with score heads, no chat template, words that cannot be told apart, or outputs that need a
            written answer where none is written.
    """

    def __init__(self, loaded: LoadedModel, config: GuardJudgeConfig) -> None:
        if loaded.heads:
            mend = "use kind=model for a model of this project, judge.format=classifier for a sequence classifier"
            raise UserError(f"'{loaded.location.locator}' has score heads and writes nothing", "judge.model", mend)
        super().__init__(loaded, config)
        known = FORMATS[config.format]
        self._form = replace(
            known,
            unsafe=tuple(config.unsafe_words) or known.unsafe,
            safe=tuple(config.safe_words) or known.safe,
            lead=known.lead if config.lead is None else config.lead,
        )
        self._new_tokens = known.new_tokens if config.max_new_tokens is None else config.max_new_tokens
        if self._form.anchor and not self._new_tokens:
            what = f"the verdict of format={config.format} comes after other words, which must be written"
            raise UserError(what, "judge.max_new_tokens=0", f"leave it out, or give {known.new_tokens} or more")
        if config.categories and not (self._new_tokens and (known.category_line or known.category_field)):
            what = "categories are read from a written answer that names them"
            raise UserError(what, "judge.categories", "add judge.max_new_tokens=32, with llama_guard or qwen3guard")
        self._question = Question(loaded.tokenizer, config.template, self._form.lead, config.generation_prompt)
        self._unsafe, self._safe = verdict_tokens(self._form, loaded.tokenizer)
        self._limit -= self._new_tokens
        causal = unwrapped(loaded.model)
        takes_last = "logits_to_keep" in inspect.signature(causal.forward).parameters
        self._last: dict[str, Any] = {"logits_to_keep": 1} if takes_last else {}

    @property
    def outputs(self) -> tuple[str, ...]:
        """See the class."""
        refusal = ("is_refusal",) if self._new_tokens and self._form.refusal_field else ()
        return (*super().outputs, *refusal, *(f"category/{name}" for name in self.config.categories))

    def readings(self, rows: Sequence[ScoreRequest]) -> GuardReadings:
        """What the guard says of N responses."""
        reasons: dict[int, str] = {}
        questions: dict[int, list[int]] = {}
        for i, row in enumerate(rows):
            try:
                ids = self._fitted(row, self._question, self._limit)[0]
            except ValueError as error:
                reasons[i] = str(error)
            else:
                if ids is None:
                    reasons[i] = f"the response does not fit {self._limit:,} tokens"
                else:
                    questions[i] = ids
        answers = self._written(rows, questions, reasons)
        logits = np.full(len(rows), np.nan)
        if questions:
            found = self._logits(list(questions.values()), self._forward, [len(ids) for ids in questions.values()])
            for i, (logit, share) in zip(questions, found, strict=True):
                if not math.isfinite(logit):
                    reasons[i] = "the guard's logits are not numbers"
                elif share < self.config.min_word_probability:
                    hint = "see judge.lead and judge.generation_prompt"
                    reasons[i] = f"{share:.2f} of the probability stands on the words of a verdict ({hint})"
                else:
                    logits[i] = logit
        return GuardReadings(logits, reasons, tuple(answers.get(i) for i in range(len(rows))))

    def _written(
        self, rows: Sequence[ScoreRequest], questions: dict[int, list[int]], reasons: dict[int, str]
    ) -> dict[int, GuardAnswer]:
        """Answers written out; questions then end right before the verdict, and those without one are taken out."""
        if not self._new_tokens or not questions:
            return {}
        end = end_id(self._tokenizer)
        rollout = generate(
            self._model,
            [PromptTokens(rows[i].row_id, ids) for i, ids in questions.items()],
            seed=0,
            temperature=0,
            max_new_tokens=self._new_tokens,
            eos_token_id=end,
            pad_token_id=pad_id(self._tokenizer),
            batch_tokens=self.config.batch_tokens,
        )
        answers: dict[int, GuardAnswer] = {}
        places = list(questions)
        for i, ids, mask in zip(places, rollout.input_ids, rollout.response_mask, strict=True):
            new = ids[mask].tolist()
            answer = parse_answer(self._form.lead + self._text(new), self._form)
            before = self._before_verdict(new)
            wants_refusal = "is_refusal" in self.outputs
            if answer is None or before is None or (wants_refusal and answer.refusal is None):
                reasons[i] = f"the guard's answer is not of format={self.config.format}"
                del questions[i]
            else:
                answers[i] = answer
                questions[i] = [*questions[i], *before]
        return answers

    def _text(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))

    def _before_verdict(self, new: list[int]) -> list[int] | None:
        """The written tokens up to the words that the verdict follows; None: they were not written."""
        anchor = self._form.anchor.lower()
        if not anchor:
            return []
        ends = (n for n in range(1, len(new)) if self._text(new[:n]).rstrip().lower().endswith(anchor))
        at = next(ends, None)
        return None if at is None else new[:at]

    def _forward(self, questions: list[list[int]]) -> Tensor:
        """(B, 2) log odds of unsafe, and the probability of all verdict words together."""
        ids, mask = padded(questions, pad_id(self._tokenizer), left=True)
        ids, mask = ids.to(self._device), mask.to(self._device)
        output = unwrapped(self._model)(
            input_ids=ids, attention_mask=mask.long(), position_ids=position_ids(mask), use_cache=False, **self._last
        )
        logits = output.logits[:, -1].float().cpu().double()  # (B, V)
        unsafe, safe = logits[:, self._unsafe].logsumexp(1), logits[:, self._safe].logsumexp(1)
        share = (torch.logaddexp(unsafe, safe) - logits.logsumexp(1)).exp()
        return torch.stack([unsafe - safe, share], dim=1)

    def _values(self, found: GuardReadings) -> dict[str, Floats]:
        values = super()._values(found)
        if "is_refusal" in self.outputs:
            said = [np.nan if answer is None else float(bool(answer.refusal)) for answer in found.answers]
            values["is_refusal"] = np.array(said, dtype=np.float64)
        for name in self.config.categories:
            has = [answer is not None and name in answer.categories for answer in found.answers]
            values[f"category/{name}"] = np.array(has, dtype=np.float64)
        return values


def guard_verdicts(
    scorer: Guard | GuardedScorer, rows: Sequence[ScoreRequest | QuestionAnswer]
) -> tuple[Floats, Bools]:
    """A guard as a moderator of labelled answers.

    Args:
        scorer: a guard, alone or behind a policy for failures, which is not asked: every row is read.
        rows: N requests or rows.

    Returns:
        (N,) log odds of unsafe, NaN where there is no verdict; (N,) True there.

    Raises:
        UserError: a scorer of another kind.
    """
    guard = scorer.scorer if isinstance(scorer, GuardedScorer) else scorer
    if not isinstance(guard, Guard):
        raise UserError(f"'{scorer.name}' is no guard model", "judge", "name one of kind=guard")
    asked = [ScoreRequest(r.id, r.prompt, r.response) if isinstance(r, QuestionAnswer) else r for r in rows]
    found = guard.readings(asked)
    return np.where(found.unparsed, np.nan, found.logits), found.unparsed


def padded(rows: Sequence[Sequence[int]], pad: int, *, left: bool) -> tuple[Tensor, Tensor]:
    """(B, T) ids and mask, True = real token."""
    width = max(map(len, rows))
    ids, mask = torch.full((len(rows), width), pad), torch.zeros(len(rows), width, dtype=torch.bool)
    for i, row in enumerate(rows):
        at = slice(width - len(row), None) if left else slice(0, len(row))
        ids[i, at], mask[i, at] = torch.tensor(row), True
    return ids, mask


# ------------------------------------------------------------------------------------------------ loading
def load_guard(
    config: GuardJudgeConfig,
    *,
    output_root: str | Path = "outputs",
    cache_dir: str | Path | None = None,
    device: torch.device | str | None = None,
) -> Guard:
    """The guard of a config. Credentials for gated models come from the environment and stand in no message.

    Raises:
        UserError: no such model, or one that is no guard of this format.
    """
    from huggingface_hub.errors import HfHubHTTPError

    from saferlhf.rollout.guard_classifier import ClassifierGuard, load_classifier

    location = resolve(config.model, output_root=output_root)
    access = "for a gated model accept its terms and set HF_TOKEN" if location.kind == "hub" else ""
    chat = config.format != "classifier"
    options: dict[str, Any] = {"dtype": config.dtype, "device": device}
    try:
        loaded = (
            load_export(location, output_root=output_root, cache_dir=cache_dir, **options)
            if chat
            else load_classifier(location, **options)
        )
    except UserError as error:
        mend = "; ".join(part for part in (error.mend, access) if part)
        raise UserError(without_secrets(error.what), without_secrets(error.where), without_secrets(mend)) from None
    except HfHubHTTPError as error:  # of a gated model; its message holds addresses and is not repeated
        raise UserError(f"the hub refuses '{config.model}': {type(error).__name__}", "judge.model", access) from None
    return ChatGuard(loaded, config) if chat else ClassifierGuard(loaded, config)


def without_secrets(text: str) -> str:
    """The text, credentials of the environment struck out."""
    for name in SECRETS:
        if secret := os.environ.get(name, "").strip():
            text = text.replace(secret, "***")
    return text
