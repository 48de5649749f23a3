"""Batched sampling from a causal language model with a key-value cache: the same samples for any batch.

1. Prompts of like length are padded on the left and read once; samples of one prompt share that reading.
2. Each step draws one token per row (`draw.py`) and reads it. Rows that have ended leave the batch, cache and all.
3. Where a draw is closer to another token than rounding (`TIE`), the row's logits are computed once more, alone,
   unpadded and without a cache, and the draw is made from those. Logits of different batches agree to within `TIE` in
   float32, so the tokens are equal, not just likely to be equal, for any order, batch size or number of processes on
   one kind of machine. In half precision rounding is larger than that, and equal samples are only likely.

Log-probabilities are those of the sampling distribution softmax(logits / temperature). `top_k` and `top_p` cut that
distribution off; they are for looking at a policy, never for training it (trap 4 of docs/architecture.md).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from saferlhf.errors import UserError
from saferlhf.models.causal import unwrapped
from saferlhf.models.modes import eval_mode
from saferlhf.ops.sequences import position_ids
from saferlhf.rollout.draw import draw, exponential_noise, row_key
from saferlhf.rollout.experience import Response, Rollout, assemble
from saferlhf.rollout.prompts import PromptTokens, first_samples

TIE = 2e-4
"""Margin in logits below which rounding may decide a draw; about that share of draws is computed once more."""


@dataclass(frozen=True, slots=True)
class _Job:
    """One response to be written: to which prompt, and which of the responses to it."""

    prompt: int
    sample: int


@torch.no_grad()
def generate(
    model: nn.Module,
    prompts: Sequence[PromptTokens],
    *,
    samples: int = 1,
    seed: int,
    rollout: int = 0,
    temperature: float = 1.0,
    max_new_tokens: int,
    eos_token_id: int,
    pad_token_id: int,
    batch_size: int | None = None,
    batch_tokens: int | None = None,
    top_k: int = 0,
    top_p: float = 1.0,
    tokenizer: Any = None,
    progress: Callable[[int], None] | None = None,
) -> Rollout:
    """Sample responses to prompts.

    The model is put into eval mode for the time being.

    Args:
        model: causal language model, adapters included, on the device it is to run on.
        prompts: N of them. A row id that stands there twice gets further samples.
        samples: responses to each.
        seed, rollout: with row id, number of the sample and position the whole key of the noise.
        temperature: divides the logits; 0 takes the most probable token, with log-probability 0.
        max_new_tokens: where a response is cut off.
        eos_token_id: ends a response; it may be the padding token as well.
        pad_token_id: fills what is masked.
        batch_size, batch_tokens: responses at once, and tokens of the cache at once (responses times the longest prompt
            and `max_new_tokens`); neither given: 64 responses. They change speed and memory only.
        top_k, top_p: see above; 0 and 1 cut nothing off.
        tokenizer: gives the rollout its texts; None: it has none.
        progress: called with the number of responses that are complete so far.

    Returns:
        N * samples responses on the CPU, those to one prompt side by side.

    Raises:
        UserError: the model's logits are not numbers, or it keeps no cache.
        ValueError: an argument out of range.
    """
    if temperature < 0:
        raise ValueError("temperature must not be negative")
    if max_new_tokens < 1 or samples < 1:
        raise ValueError("max_new_tokens and samples must be at least 1")
    first = first_samples(prompts, samples)
    jobs = [_Job(i, first[i] + j) for i in range(len(prompts)) for j in range(samples)]
    decoder = _Decoder(
        model, prompts, seed, rollout, temperature, max_new_tokens, eos_token_id, pad_token_id, top_k, top_p
    )
    found: dict[_Job, Response] = {}
    with eval_mode(model):
        for batch in _batches(jobs, prompts, max_new_tokens, batch_size, batch_tokens):
            done = len(found)
            tick = None if progress is None else (lambda n, done=done: progress(done + n))
            found |= zip(batch, decoder.run(batch, tick), strict=True)
    return assemble(
        prompts,
        [[found[_Job(i, first[i] + j)] for j in range(samples)] for i in range(len(prompts))],
        pad_token_id=pad_token_id,
        decode=None if tokenizer is None else decoded_by(tokenizer),
        first_samples=first,
    )


def decoded_by(tokenizer: Any) -> Callable[[list[list[int]]], list[str]]:
    """Token ids -> texts without control tokens."""
    return lambda ids: [tokenizer.decode(row, skip_special_tokens=True) for row in ids]


def _batches(
    jobs: Sequence[_Job],
    prompts: Sequence[PromptTokens],
    limit: int,
    batch_size: int | None,
    batch_tokens: int | None,
) -> Iterator[list[_Job]]:
    """Jobs of like prompt length together, longest first: what does not fit the memory shows at once."""
    order = sorted(jobs, key=lambda job: -len(prompts[job.prompt].token_ids))
    start = 0
    while start < len(order):
        size = batch_size or (64 if batch_tokens is None else len(order))
        if batch_tokens is not None:
            size = min(size, batch_tokens // (len(prompts[order[start].prompt].token_ids) + limit))
        yield order[start : start + max(1, size)]
        start += max(1, size)


class _Decoder:
    """Writes batches of responses; arguments as those of `generate`."""

    def __init__(
        self,
        model: nn.Module,
        prompts: Sequence[PromptTokens],
        seed: int,
        rollout: int,
        temperature: float,
        limit: int,
        eos: int,
        pad: int,
        top_k: int,
        top_p: float,
    ) -> None:
        self.causal: Any = unwrapped(model)
        self.device = next(model.parameters()).device
        self.prompts, self.limit, self.eos, self.pad = prompts, limit, eos, pad
        self._key = (seed, rollout)
        self._how = (temperature, top_k, top_p)
        # a prompt's logits are wanted at its last token only; all of them can take more memory than the model
        takes_last = "logits_to_keep" in inspect.signature(self.causal.forward).parameters
        self._last: dict[str, Any] = {"logits_to_keep": 1} if takes_last else {}

    def run(self, jobs: Sequence[_Job], progress: Callable[[int], None] | None) -> list[Response]:
        """The responses of one batch, in the order of the jobs."""
        rows, limit, device = len(jobs), self.limit, self.device
        keys = torch.tensor([self._key_of(job) for job in jobs], dtype=torch.int64, device=device)  # (B,)
        tokens = torch.full((rows, limit), self.pad, dtype=torch.int64, device=device)  # (B, R)
        logprobs = torch.zeros((rows, limit), dtype=torch.float64, device=device)  # (B, R)
        lengths = torch.zeros(rows, dtype=torch.int64, device=device)
        ended = torch.zeros(rows, dtype=torch.bool, device=device)
        alive = torch.arange(rows, device=device)  # (A,) rows that are still in the batch
        logits, cache, mask, positions = self._read_prompts(jobs)
        for t in range(limit):
            chosen, logprob, margin = draw(logits, self._noise(keys[alive], t, logits), *self._how)  # (A,) each
            close = margin < TIE
            over = chosen == self.eos
            # one look at the device per step
            numbers, any_close = torch.stack([logprob.isfinite().all(), close.any()]).tolist()
            if not numbers:
                mend = "its weights have diverged: train it again"
                raise UserError("the model's logits are not numbers", "sampling", mend)
            if any_close:
                for a in close.nonzero().flatten().tolist():
                    row = int(alive[a])
                    chosen[a], logprob[a] = self._settle(jobs[row], tokens[row, :t], keys[row : row + 1])
                over = chosen == self.eos
            tokens[alive, t], logprobs[alive, t] = chosen, logprob
            lengths[alive] += 1
            ended[alive] = over
            stay = (~over).nonzero().flatten()
            if len(stay) < len(alive):
                alive, chosen, mask, positions = alive[stay], chosen[stay], mask[stay], positions[stay]
                if progress is not None:
                    progress(rows - len(alive))
                if not len(alive):
                    break
                cache.reorder_cache(stay)
            if t + 1 < limit:
                mask = torch.cat([mask, mask.new_ones(len(alive), 1)], dim=1)
                positions = positions[:, -1:] + 1
                output = self._forward(chosen[:, None], mask, positions, past_key_values=cache)
                cache, logits = output.past_key_values, output.logits[:, -1]  # (A, V)
        if progress is not None and len(alive):
            progress(rows)
        return [
            Response(ids[:n], logp[:n], not over)
            for ids, logp, n, over in zip(
                tokens.tolist(), logprobs.tolist(), lengths.tolist(), ended.tolist(), strict=True
            )
        ]

    def _key_of(self, job: _Job) -> int:
        return row_key(*self._key, self.prompts[job.prompt].row_id, job.sample)

    def _noise(self, keys: Tensor, position: int, logits: Tensor) -> Tensor:
        """(A, V); empty where nothing is drawn at random."""
        return exponential_noise(keys, position, 0 if self._how[0] == 0 else logits.shape[-1])

    def _read_prompts(self, jobs: Sequence[_Job]) -> tuple[Tensor, Any, Tensor, Tensor]:
        """Logits after each row's prompt (B, V), the cache, its mask (B, P) and positions (B, P)."""
        numbers = list(dict.fromkeys(job.prompt for job in jobs))
        ids, mask = self._left_padded([self.prompts[i].token_ids for i in numbers])
        positions = position_ids(mask)
        output = self._forward(ids, mask, positions, use_cache=True, **self._last)
        cache, logits = output.past_key_values, output.logits[:, -1]
        if not hasattr(cache, "reorder_cache"):
            raise UserError("this backbone keeps no key-value cache", "backbone", "choose a decoder, as smollm2")
        if len(numbers) < len(jobs):
            place = {i: u for u, i in enumerate(numbers)}
            rows = torch.tensor([place[job.prompt] for job in jobs], device=self.device)
            cache.reorder_cache(rows)  # takes a row several times where there are several samples
            logits, mask, positions = logits[rows], mask[rows], positions[rows]
        return logits, cache, mask, positions

    def _left_padded(self, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        width = max(map(len, prompts))
        ids = torch.full((len(prompts), width), self.pad, dtype=torch.int64)  # (U, P)
        mask = torch.zeros((len(prompts), width), dtype=torch.bool)  # (U, P) True = real token
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = True
        return ids.to(self.device), mask.to(self.device)

    def _settle(self, job: _Job, written: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Token and log-probability drawn from logits that depend on this row alone."""
        prompt = torch.tensor(list(self.prompts[job.prompt].token_ids), dtype=torch.int64, device=self.device)
        ids = torch.cat([prompt, written])[None]  # (1, P + t)
        mask = torch.ones_like(ids, dtype=torch.bool)
        output = self._forward(ids, mask, position_ids(mask), use_cache=False, **self._last)
        logits = output.logits[:, -1]
        chosen, logprob, _ = draw(logits, self._noise(key, len(written), logits), *self._how)
        return chosen[0], logprob[0]

    def _forward(self, ids: Tensor, mask: Tensor, positions: Tensor, **more: Any) -> Any:
        return self.causal(
            input_ids=ids, attention_mask=mask.long(), position_ids=positions, **{"use_cache": True, **more}
        )
