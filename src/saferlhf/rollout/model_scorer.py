"""A trained model as a scorer: reward, cost, or a moderator or safety classifier used as a cost.

A moderator's probabilities are positive whatever it reads, while a cost above 0 means unsafe, so

    how=unsafe: C = p_unsafe - zero        zero: the moderator's own threshold, so C > 0 where its verdict is unsafe
    how=max:    C = max_c p_c - zero       zero: 1/2, any category more likely than not
    how=mean:   C = mean_c p_c - zero      zero: 1/(2 K), what one category of K at 1/2 and no other gives

`max` and `mean` are the PPO-Lagrangian baselines of BeaverTails (arXiv 2307.04657), which used the probabilities as
they are; `zero=0` is that. A response that was cut off is read without an end-of-sequence token, as a rollout is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import expit
from torch import Tensor

from saferlhf.config.schema import DataPolicyConfig
from saferlhf.data.batches import TokenBatch
from saferlhf.data.encode import EncodedAnswers, Encoder
from saferlhf.data.rows import QuestionAnswer
from saferlhf.errors import UserError
from saferlhf.models.loading import LoadedModel
from saferlhf.models.moderator import calibration_of, logits_of
from saferlhf.models.modes import eval_mode
from saferlhf.ops.calibration import Calibration, decide
from saferlhf.rollout.experience import micro_batch_indices
from saferlhf.rollout.scorers import Failure, ScoreRequest, Scores

HOW = ("unsafe", "mean", "max")

Floats = NDArray[np.float64]


class ModelScorer:
    """Scores by a model with score heads.

    Args:
        loaded: the model, on the device it is to run on (`models/loading.py`).
        output: name of its score; None: reward for a reward model, cost for the others.
        how: which cost a moderator or a classifier with several labels gives, see above.
        zero: probability that counts as cost 0; None: see above.
        categories: a moderator's or classifier's probability of each label as outputs `category/<name>` as well.
        batch_tokens: tokens per forward pass, padding included.
        name: in metrics and messages; None: the model's kind.

    Attributes:
        overlong: responses so far that lost their end because they did not fit the model.

    Raises:
        UserError: no score heads, a moderator of prompts alone, or a score that has to be named.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        *,
        output: str | None = None,
        how: str = "unsafe",
        zero: float | None = None,
        categories: bool = False,
        batch_tokens: int = 16384,
        name: str | None = None,
    ) -> None:
        metadata, where = loaded.metadata, loaded.location.locator
        if not loaded.heads:
            raise UserError(f"'{where}' has no score heads", "judge.model", "name a reward, cost or moderator model")
        if metadata.input == "prompt":
            what = f"'{where}' looks at prompts alone, so every response to one would be the same to it"
            raise UserError(what, "judge.model", "name one with task.input=prompt_and_response")
        self._name = name or metadata.kind
        self._model, self._heads, self._batch_tokens = loaded.model, dict(loaded.heads), batch_tokens
        self._encoder = Encoder.build(loaded.tokenizer, metadata.template, metadata.max_length or 512)
        self._calibration = _calibration(loaded) if metadata.kind == "moderator" else None
        self._labels = self._label_names()
        if not self._labels and self._calibration is None and len(self._heads) > 1:
            raise UserError(f"'{where}' has scores {', '.join(self._heads)}", "judge.model", "name a model with one")
        if how not in HOW:
            raise UserError(f"unknown choice '{how}'", "judge.how", f"use {' | '.join(HOW)}")
        self._how = "score" if metadata.kind in ("reward", "cost") or not self._is_classifier else how
        self._zero = self._default_zero() if zero is None else zero
        self._output = output or ("reward" if metadata.kind == "reward" else "cost")
        if metadata.kind == "classifier" and self._how == "score" and output is None:
            what = f"'{where}' does not say whether its score is a reward or a cost (unsafe above 0)"
            raise UserError(what, "judge.output", "output=reward or output=cost")
        self._refuse_missing(where, categories)
        self._categories = categories
        self.overlong = 0

    @property
    def name(self) -> str:
        """In metrics and messages."""
        return self._name

    @property
    def outputs(self) -> tuple[str, ...]:
        """The score, and one output per category where they were asked for."""
        return (self._output, *(f"category/{name}" for name in (self._labels if self._categories else ())))

    def score(self, rows: Sequence[ScoreRequest]) -> Scores:
        """Scores of N requests."""
        if not rows:
            return Scores({name: np.zeros(0) for name in self.outputs})
        answers = [QuestionAnswer(row.row_id, row.prompt, row.response) for row in rows]
        data = self._encoder.answers(answers, "scored", policy=DataPolicyConfig(overlong="keep"))
        self.overlong += int(data.truncated.sum())
        heads = self._head_outputs(data, np.array([row.truncated for row in rows], dtype=bool))
        values = self._values(heads)
        bad = ~np.isfinite(np.stack([values[name] for name in self.outputs])).all(axis=0)
        failures = [
            Failure(rows[i].row_id, "not_a_number", f"{self._name} gave no finite number", i)
            for i in np.flatnonzero(bad).tolist()
        ]
        return Scores({name: np.where(bad, np.nan, values[name]) for name in self.outputs}, tuple(failures))

    # -------------------------------------------------------------------------------------------- heads
    @property
    def _is_classifier(self) -> bool:
        return self._calibration is not None or bool(self._labels)

    def _label_names(self) -> tuple[str, ...]:
        """Labels with a probability each: a moderator's categories, or the heads of a multi-label classifier."""
        if self._calibration is not None:
            return self._calibration.categories
        several = len(self._heads) > 1 and all(width == 1 for width in self._heads.values())
        return tuple(self._heads) if several else ()

    def _default_zero(self) -> float:
        if self._how == "mean":
            return 0.5 / max(1, len(self._labels))
        if self._how == "unsafe" and self._calibration is not None:
            return self._calibration.threshold_unsafe
        return 0.5 if self._how in ("max", "unsafe") else 0.0

    def _refuse_missing(self, where: str, categories: bool) -> None:
        if self._how == "unsafe" and self._calibration is None:
            mend = "use judge.how=max or judge.how=mean"
            raise UserError(f"'{where}' has labels but no score of unsafe as such", "judge.how=unsafe", mend)
        if (categories or self._how in ("mean", "max")) and not self._labels:
            what = f"'{where}' tells no harm categories"
            raise UserError(what, "judge.categories, judge.how", "use judge.how=unsafe and judge.categories=false")

    @torch.no_grad()
    def _head_outputs(self, data: EncodedAnswers, cut_off: NDArray[np.bool_]) -> dict[str, Tensor]:
        """Head name -> (N, n) float32 on the CPU."""
        found: dict[str, Tensor] = {}
        device = next(self._model.parameters()).device
        with eval_mode(self._model):
            for part in micro_batch_indices(data.lengths, np.arange(len(data)), self._batch_tokens):
                tokens = _without_end(data.collate(part), cut_off[part] & ~data.truncated[part]).to(device)
                scores = self._model(tokens.input_ids, tokens.attention_mask, tokens.response_mask)
                for head, values in scores.items():
                    whole = found.setdefault(head, torch.full((len(data), values.shape[1]), torch.nan))
                    whole[torch.from_numpy(part)] = values.float().cpu()
        return found

    def _values(self, heads: Mapping[str, Tensor]) -> dict[str, Floats]:
        if self._how == "score":
            (head,) = heads.values()
            return {self._output: head.double().squeeze(1).numpy()}
        unsafe, labels = self._probabilities(heads)
        cost = {"unsafe": lambda: unsafe, "mean": lambda: labels.mean(axis=1), "max": lambda: labels.max(axis=1)}
        values = {self._output: cost[self._how]() - self._zero}
        return values | {f"category/{name}": labels[:, k] for k, name in enumerate(self._labels)}

    def _probabilities(self, heads: Mapping[str, Tensor]) -> tuple[Any, Any]:
        """(N,) of unsafe and (N, K) of each label; None where there is no such head."""
        if self._calibration is None:
            return None, expit(torch.cat([heads[name] for name in self._labels], dim=1).double().numpy())
        verdicts = decide(logits_of(heads), self._calibration)
        return verdicts.p_unsafe, verdicts.p_category


def _calibration(loaded: LoadedModel) -> Calibration:
    if loaded.metadata.calibration is None:
        return Calibration.default(tuple(loaded.metadata.categories or ()))
    return calibration_of(loaded.metadata, loaded.location.locator)


def _without_end(tokens: TokenBatch, rows: NDArray[np.bool_]) -> TokenBatch:
    """The same sequences, the last token of some of them masked out: the end that a cut-off response never had."""
    if not rows.any():
        return tokens
    at = torch.from_numpy(np.flatnonzero(rows))
    last = tokens.attention_mask.sum(dim=1)[at] - 1
    attention, response = tokens.attention_mask.clone(), tokens.response_mask.clone()
    attention[at, last] = False
    response[at, last] = False
    return replace(tokens, attention_mask=attention, response_mask=response)
