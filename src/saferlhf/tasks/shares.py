"""How several processes share a rollout: each samples, reads and learns from its part, and all know all of it.

A rollout is small (token ids and some numbers per token), so every process holds the whole of it; what is shared is the
work of the models. Of S responses sorted by length, P processes are dealt theirs like cards. All have the same number
of forward passes, because sharded weights are gathered by all of them together: where responses run out, one that
another process has is read once more and counts for nothing.

Everything else, from lambda to the order of the mini-batches, is computed by each process from the same numbers. So one
process and several learn from the same samples, in the same steps, up to the order in which gradients are added.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from saferlhf.evaluation.processes import Processes
from saferlhf.rollout.experience import Rollout, joined
from saferlhf.rollout.prompts import PromptTokens


@dataclass(frozen=True)
class Part:
    """Rows of one forward pass of this process.

    Attributes:
        places: (n,) int64 where they stand among all.
        counted: (n,) bool, False for a row that is there only so that all processes keep in step.
    """

    places: Tensor
    counted: Tensor


def deal(lengths: NDArray[np.integer], rows: int, processes: Processes) -> list[Part]:
    """This process's rows, of like length together and longest first, in as many parts as every other process has.

    Args:
        lengths: (S,) tokens of each row.
        rows: most rows of a part.
        processes: who shares them.
    """
    if not len(lengths):
        return []
    order = np.argsort(-lengths, kind="stable")
    share = math.ceil(len(order) / processes.size)
    mine = order[processes.rank :: processes.size]
    counted = np.arange(share) < len(mine)
    mine = np.concatenate([mine, np.repeat(order[-1:], share - len(mine))])
    parts = math.ceil(share / rows)
    cut = zip(np.array_split(mine, parts), np.array_split(counted, parts), strict=True)
    return [Part(torch.from_numpy(places), torch.from_numpy(real)) for places, real in cut]


def told_of_all(
    rollout: Rollout, rows: int, work: Callable[[Rollout], Sequence[Tensor]], device: torch.device
) -> list[Tensor]:
    """What models say of all responses, each process asking about its own.

    Args:
        rollout: S responses of T tokens.
        rows: most responses of a pass.
        work: n responses of t <= T tokens -> tensors of shape (n,) or (n, t).
        device: where the answers are wanted.

    Returns:
        The same tensors of shape (S,) or (S, T), 0 where there is no token.
    """
    processes = Processes.current()
    found: list[Tensor] = []
    for part in deal(rollout.lengths.cpu().numpy(), rows, processes):
        told = work(rollout.select(part.places))
        if not found:
            shape = rollout.input_ids.shape
            found = [torch.zeros(shape[: t.ndim], dtype=t.dtype, device=device) for t in told]
        real = part.counted.to(device)
        for whole, some in zip(found, told, strict=True):
            wide = F.pad(some, (0, whole.shape[1] - some.shape[1])) if some.ndim > 1 else some
            whole[part.places.to(device)[real]] = wide.to(device)[real]
    if processes.size > 1:
        # each row is 0 but in one process, so that the sum is that process's number to the last bit
        flat = torch.cat([whole.flatten() for whole in found])
        torch.distributed.all_reduce(flat)
        parts = flat.split([whole.numel() for whole in found])
        found = [some.view_as(whole) for some, whole in zip(parts, found, strict=True)]
    return found


def sampled_by_all(
    prompts: Sequence[PromptTokens],
    samples: int,
    sample: Callable[[Sequence[PromptTokens]], Rollout],
    *,
    pad_token_id: int,
) -> Rollout:
    """Responses to all prompts, each process sampling to its own.

    Args:
        prompts: N of them; one row's stay together wherever they stand, for their samples are numbered.
        samples: responses to each.
        sample: responses to some of the prompts, those to one prompt side by side.
        pad_token_id: stands where nothing is.

    Returns:
        N * samples responses in the order of the prompts.

    Raises:
        UserError: that of the first process whose sampling raised one.
    """
    processes = Processes.current()
    if processes.size == 1:
        return sample(prompts)
    shares = _shares_of_prompts(prompts, processes.size)
    rollouts = processes.each(lambda: sample([prompts[i] for i in shares[processes.rank]]))
    given = np.concatenate([np.asarray(share, dtype=np.int64) for share in shares])  # (N,) in the order of `joined`
    places = (given[:, None] * samples + np.arange(samples)).ravel()  # (S,) where each response belongs
    return joined(rollouts, pad_token_id=pad_token_id).select(np.argsort(places))


def _shares_of_prompts(prompts: Sequence[PromptTokens], processes: int) -> list[list[int]]:
    """Numbers of the prompts of each process, in order; rows are dealt by length like cards."""
    lengths = {prompt.row_id: len(prompt.token_ids) for prompt in prompts}
    order = sorted(lengths, key=lambda row: -lengths[row])
    owner = {row: place % processes for place, row in enumerate(order)}
    return [[i for i, prompt in enumerate(prompts) if owner[prompt.row_id] == rank] for rank in range(processes)]
