"""Rollout and Experience: what a policy wrote, and what everybody says of it, as frozen dataclasses of tensors.

Legend: `S` sequences, `T` tokens. Sequences are prompt + response without a gap, padded on the right. Quantities per
token stand at the token they belong to and are 0 outside `response_mask`: `logprobs[s, t]` is log p(token t | tokens
before t), `values[s, t]` the critic's value of the state before token t is written. Masks: True = real token; they are
made from lengths, never from token ids, so that a padding token may be the end-of-sequence token as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from saferlhf.data.rows import Prompt
from saferlhf.rollout.prompts import PromptTokens
from saferlhf.rollout.scorers import ScoreRequest

Item = TypeVar("Item", bound="Rollout | Experience")
Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Response:
    """One response as an engine gives it.

    Attributes:
        token_ids: its tokens, the end-of-sequence token included when it came.
        logprobs: of each token under the sampling distribution, in nats; NaN where the engine does not tell.
        truncated: whether the length limit cut it off.
        text: None: to be decoded from the tokens.
    """

    token_ids: Sequence[int]
    logprobs: Sequence[float]
    truncated: bool
    text: str | None = None


@dataclass(frozen=True)
class Rollout:
    """S sampled responses; those to one prompt stand side by side, prompts in the order in which they were given.

    Attributes:
        input_ids: (S, T) int64.
        attention_mask: (S, T) bool, True at real tokens.
        response_mask: (S, T) bool, True at the response's tokens, its end-of-sequence token included.
        logprobs: (S, T) float32 under the sampling distribution softmax(logits / temperature), in nats.
        truncated: (S,) bool, True where the length limit cut the response off.
        row_ids: S ids of the prompts' rows.
        sample: (S,) int64 number of the response among those to its row.
        prompts: S conversations; empty ones where they were not given.
        responses: S texts without control tokens; None: nobody decoded them.
    """

    input_ids: Tensor
    attention_mask: Tensor
    response_mask: Tensor
    logprobs: Tensor
    truncated: Tensor
    row_ids: tuple[str, ...]
    sample: Tensor
    prompts: tuple[Prompt, ...]
    responses: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    @property
    def lengths(self) -> Tensor:
        """(S,) int64 tokens of prompt + response."""
        return self.attention_mask.sum(dim=1)

    @property
    def response_lengths(self) -> Tensor:
        """(S,) int64 tokens of the response, its end-of-sequence token included."""
        return self.response_mask.sum(dim=1)

    @property
    def groups(self) -> Tensor:
        """(S,) int64 number of the prompt: equal for responses to one row, counted in order of appearance."""
        number: dict[str, int] = {}
        return torch.tensor([number.setdefault(row_id, len(number)) for row_id in self.row_ids], dtype=torch.int64)

    def requests(self) -> list[ScoreRequest]:
        """The responses for scorers.

        Raises:
            ValueError: the texts were not kept.
        """
        if self.responses is None:
            raise ValueError("this rollout has no texts: generate it with a tokenizer")
        cut = self.truncated.tolist()
        return [
            ScoreRequest(row_id, prompt, response, truncated)
            for row_id, prompt, response, truncated in zip(self.row_ids, self.prompts, self.responses, cut, strict=True)
        ]

    def statistics(self) -> dict[str, float]:
        """Means over the responses: `response_tokens`, `truncation_rate`, `empty_rate` (no word; NaN without texts)."""
        if not len(self):
            return {}
        empty = math.nan
        if self.responses is not None:
            empty = sum(not text.strip() for text in self.responses) / len(self)
        return {
            "response_tokens": float(self.response_lengths.double().mean()),
            "truncation_rate": float(self.truncated.double().mean()),
            "empty_rate": empty,
        }

    def select(self, indices: Sequence[int] | Ints | Tensor) -> Rollout:
        """Some of the responses, in the order given, without columns that are padding in all of them."""
        return _trimmed(_select(self, indices), self.lengths[torch.as_tensor(indices, dtype=torch.int64)])

    def to(self, device: torch.device | str) -> Rollout:
        """The same rollout on another device."""
        return _to(self, torch.device(device))


@dataclass(frozen=True)
class Experience:
    """A rollout with everything that an update needs; what is not there yet, or not used, is None or empty.

    Attributes:
        rollout: S responses; its `logprobs` are the old policy's.
        reference_logprobs: (S, T) of the frozen reference at the same tokens and temperature.
        rewards: (S,) scores of whole responses.
        costs: name -> (S,) costs of whole responses, above 0 = unsafe.
        values: name of a critic -> (S, T).
        returns: name of a critic -> (S, T) what it is to predict.
        advantages: (S, T) what the policy is to be moved by.
        weights: (S,) how much each response counts: 0 where a scorer gave no score and the policy for failures leaves
            it out; in an optimizer step the weight of its sum over tokens.
    """

    rollout: Rollout
    reference_logprobs: Tensor | None = None
    rewards: Tensor | None = None
    costs: Mapping[str, Tensor] = field(default_factory=dict)
    values: Mapping[str, Tensor] = field(default_factory=dict)
    returns: Mapping[str, Tensor] = field(default_factory=dict)
    advantages: Tensor | None = None
    weights: Tensor | None = None

    def __post_init__(self) -> None:
        s, t = self.rollout.input_ids.shape
        whole = {"rewards": self.rewards, "weights": self.weights, **{f"costs.{k}": v for k, v in self.costs.items()}}
        tokens = {"reference_logprobs": self.reference_logprobs, "advantages": self.advantages}
        tokens |= {f"{kind}.{k}": v for kind in ("values", "returns") for k, v in getattr(self, kind).items()}
        for names, shape in ((whole, (s,)), (tokens, (s, t))):
            for name, tensor in names.items():
                if tensor is not None and tuple(tensor.shape) != shape:
                    raise ValueError(f"{name} has shape {tuple(tensor.shape)}, the rollout asks for {shape}")

    def __len__(self) -> int:
        return len(self.rollout)

    def select(self, indices: Sequence[int] | Ints | Tensor) -> Experience:
        """Some of the responses, in the order given, without columns that are padding in all of them."""
        return _trimmed(_select(self, indices), self.rollout.lengths[torch.as_tensor(indices, dtype=torch.int64)])

    def to(self, device: torch.device | str) -> Experience:
        """The same experience on another device."""
        return _to(self, torch.device(device))

    def scored(self) -> Experience:
        """The responses that count: those with a weight above 0."""
        return self if self.weights is None else self.select(torch.nonzero(self.weights > 0).flatten())

    def minibatches(
        self, rows: int, *, seed: Sequence[int], batch_tokens: int | None = None
    ) -> Iterator[list[Experience]]:
        """One epoch: every response once, dealt at random into optimizer steps, each cut into micro-batches.

        Args:
            rows: responses per optimizer step; the last step may have fewer.
            seed: what the order depends on, say (seed, rollout, epoch); nothing else does.
            batch_tokens: tokens per micro-batch, padding included; None: a step is one micro-batch. It changes memory,
                not which responses meet in a step.

        Yields:
            The micro-batches of one optimizer step, longest responses first.
        """
        lengths = self.rollout.lengths.cpu().numpy()
        for step in minibatch_indices(len(self), rows, seed):
            yield [self.select(part) for part in micro_batch_indices(lengths, step, batch_tokens)]


# ------------------------------------------------------------------------------------------------ batches
def minibatch_indices(count: int, rows: int, seed: Sequence[int]) -> list[Ints]:
    """A permutation of `count` responses that depends on the seed alone, in parts of `rows`.

    Raises:
        ValueError: `rows` below 1.
    """
    if rows < 1:
        raise ValueError("a mini-batch needs at least one response")
    order = np.random.default_rng(list(seed)).permutation(count)
    return [order[start : start + rows] for start in range(0, count, rows)]


def micro_batch_indices(lengths: NDArray[np.integer[Any]], chosen: Ints, batch_tokens: int | None) -> list[Ints]:
    """Responses of like length together: one at least, `batch_tokens` tokens with padding at most; longest first.

    Args:
        lengths: (S,) tokens of all responses with their prompts.
        chosen: the ones to deal.
        batch_tokens: the budget; None: all together.
    """
    order = chosen[np.argsort(-lengths[chosen], kind="stable")]
    if batch_tokens is None or not len(order):
        return [order] if len(order) else []
    parts: list[Ints] = []
    start = 0
    while start < len(order):
        size = max(1, batch_tokens // max(1, int(lengths[order[start]])))
        parts.append(order[start : start + size])
        start += size
    return parts


# ------------------------------------------------------------------------------------------------ assembly
def assemble(
    prompts: Sequence[PromptTokens],
    responses: Sequence[Sequence[Response]],
    *,
    pad_token_id: int,
    decode: Callable[[list[list[int]]], list[str]] | None = None,
    first_samples: Sequence[int] | None = None,
) -> Rollout:
    """Prompts and the responses to each as one rollout on the CPU.

    Args:
        prompts: N prompts.
        responses: for each prompt its samples.
        pad_token_id: stands where nothing is.
        decode: S lists of token ids -> S texts, for responses that have none; None: the rollout has no texts unless
            every response has one.
        first_samples: for each prompt the number of its first sample; None: 0.

    Raises:
        ValueError: a response without a token, or with another number of log-probabilities.
    """
    pairs = [(i, j) for i, given in enumerate(responses) for j in range(len(given))]
    flat = [responses[i][j] for i, j in pairs]
    width = max((len(prompts[i].token_ids) + len(responses[i][j].token_ids) for i, j in pairs), default=0)
    ids = torch.full((len(flat), width), pad_token_id, dtype=torch.int64)  # (S, T)
    attention = torch.zeros((len(flat), width), dtype=torch.bool)
    response_mask = torch.zeros((len(flat), width), dtype=torch.bool)
    logprobs = torch.zeros((len(flat), width), dtype=torch.float32)
    for s, ((i, _), response) in enumerate(zip(pairs, flat, strict=True)):
        prompt = prompts[i]
        if not len(response.token_ids) or len(response.token_ids) != len(response.logprobs):
            what = f"{len(response.token_ids)} tokens and {len(response.logprobs)} log-probabilities"
            raise ValueError(f"a response to {prompt.row_id} has {what}")
        start = len(prompt.token_ids)
        end = start + len(response.token_ids)
        ids[s, :end] = torch.tensor([*prompt.token_ids, *response.token_ids])
        attention[s, :end] = True
        response_mask[s, start:end] = True
        logprobs[s, start:end] = torch.tensor(response.logprobs, dtype=torch.float32)
    first = first_samples or [0] * len(prompts)
    return Rollout(
        input_ids=ids,
        attention_mask=attention,
        response_mask=response_mask,
        logprobs=logprobs,
        truncated=torch.tensor([response.truncated for response in flat], dtype=torch.bool),
        row_ids=tuple(prompts[i].row_id for i, _ in pairs),
        sample=torch.tensor([first[i] + j for i, j in pairs], dtype=torch.int64),
        prompts=tuple(prompts[i].prompt for i, _ in pairs),
        responses=_texts(flat, decode),
    )


def _texts(flat: Sequence[Response], decode: Callable[[list[list[int]]], list[str]] | None) -> tuple[str, ...] | None:
    missing = [response for response in flat if response.text is None]
    if missing and decode is None:
        return None
    decoded = iter(decode([list(response.token_ids) for response in missing]) if missing and decode else [])
    return tuple(next(decoded) if response.text is None else response.text for response in flat)


def joined(parts: Sequence[Rollout], *, pad_token_id: int) -> Rollout:
    """Several rollouts as one, in their order.

    Args:
        parts: at least one; they have texts all or none, but for empty ones.
        pad_token_id: fills the rows of the narrower ones.
    """
    width = max(part.input_ids.shape[1] for part in parts)

    def wide(name: str, fill: float = 0) -> Tensor:
        found: list[Tensor] = [getattr(part, name) for part in parts]
        return torch.cat([F.pad(some, (0, width - some.shape[1]), value=fill) for some in found])

    texts = [part.responses for part in parts if len(part)]
    return Rollout(
        input_ids=wide("input_ids", pad_token_id),
        attention_mask=wide("attention_mask"),
        response_mask=wide("response_mask"),
        logprobs=wide("logprobs"),
        truncated=torch.cat([part.truncated for part in parts]),
        row_ids=tuple(row_id for part in parts for row_id in part.row_ids),
        sample=torch.cat([part.sample for part in parts]),
        prompts=tuple(prompt for part in parts for prompt in part.prompts),
        responses=None if None in texts else tuple(text for some in texts for text in some or ()),
    )


# ------------------------------------------------------------------------------------------------ fields
def _map(item: Item, change: Callable[[Tensor], Tensor], texts: Callable[[tuple[Any, ...]], tuple[Any, ...]]) -> Item:
    """The same dataclass with every tensor and every tuple changed, those in mappings and in the rollout too."""
    changed: dict[str, Any] = {}
    for f in fields(item):
        value = getattr(item, f.name)
        if isinstance(value, Tensor):
            changed[f.name] = change(value)
        elif isinstance(value, tuple):
            changed[f.name] = texts(value)
        elif isinstance(value, Mapping):
            changed[f.name] = {name: change(tensor) for name, tensor in value.items()}
        elif isinstance(value, Rollout):
            changed[f.name] = _map(value, change, texts)
    return replace(item, **changed)


def _select(item: Item, indices: Sequence[int] | Ints | Tensor) -> Item:
    at = torch.as_tensor(indices, dtype=torch.int64)
    numbers = at.tolist()
    return _map(item, lambda tensor: tensor[at.to(tensor.device)], lambda whole: tuple(whole[i] for i in numbers))


def _trimmed(item: Item, lengths: Tensor) -> Item:
    width = int(lengths.max()) if len(lengths) else 0
    return _map(item, lambda tensor: tensor if tensor.ndim == 1 else tensor[:, :width], lambda whole: whole)


def _to(item: Item, device: torch.device) -> Item:
    return _map(item, lambda tensor: tensor.to(device), lambda whole: whole)
