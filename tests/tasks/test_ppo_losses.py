"""One optimizer step of PPO: its gradients do not depend on how the step was split or padded; sums by hand."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from saferlhf.config.online_schema import KlConfig, PpoConfig
from saferlhf.ops.policy_losses import token_logprobs
from saferlhf.rollout.experience import Experience, Rollout
from saferlhf.tasks.ppo_losses import UpdateSums, actor_backward, critic_backward, means_of, row_weights

WORDS = 7


class TableRoles(nn.Module):
    """Roles whose actor and critic look at the last token alone: a table each."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.table = nn.Parameter(torch.randn(WORDS, WORDS, generator=generator))
        self.worth = nn.Parameter(torch.randn(WORDS, generator=generator))

    @contextmanager
    def using(self, name: str) -> Iterator[None]:
        yield

    def logits(self, name: str, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.table[input_ids]

    def values(self, name: str, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return torch.nn.functional.pad(self.worth[input_ids][:, :-1], (1, 0))


def ppo(**keys: Any) -> PpoConfig:
    return PpoConfig(name="ppo", _target_="saferlhf.tasks.actor_critic.ActorCriticTask", **keys)


def experience(rows: int = 6, width: int = 9) -> Experience:
    """Random responses of different lengths behind prompts of two tokens."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(1, width - 2, (rows,), generator=generator)
    ids = torch.randint(0, WORDS, (rows, width), generator=generator)
    place = torch.arange(width)
    attention = place < 2 + lengths[:, None]
    response = attention & (place >= 2)
    noise = torch.randn(4, rows, width, generator=generator)
    roles = TableRoles()
    with torch.no_grad():
        old = token_logprobs(roles.logits("actor", ids, attention), ids, response) + 0.3 * noise[0] * response
    rollout = Rollout(
        input_ids=ids,
        attention_mask=attention,
        response_mask=response,
        logprobs=old,
        truncated=torch.zeros(rows, dtype=torch.bool),
        row_ids=tuple(f"row{i}" for i in range(rows)),
        sample=torch.zeros(rows, dtype=torch.int64),
        prompts=((),) * rows,
    )
    return Experience(
        rollout,
        reference_logprobs=old,
        values={"reward": noise[1] * response},
        returns={"reward": noise[2] * response},
        advantages=noise[3] * response,
    )


def gradients(parts: list[Experience], config: PpoConfig) -> tuple[Tensor, Tensor, dict[str, float]]:
    roles, sums = TableRoles(), UpdateSums()
    kinds: Any = roles
    actor_backward(
        kinds, parts, config, temperature=1.0, kl_coefficient=0.1, backward=lambda loss: loss.backward(), sums=sums
    )
    critic_backward(kinds, "reward", parts, config, backward=lambda loss: loss.backward(), sums=sums)
    assert roles.table.grad is not None and roles.worth.grad is not None
    return roles.table.grad, roles.worth.grad, means_of(sums, ["reward"])


def padded(part: Experience, columns: int) -> Experience:
    """The same with more padding behind, of which nothing may be read."""

    def wider(tensor: Tensor) -> Tensor:
        return torch.nn.functional.pad(tensor, (0, columns)) if tensor.ndim == 2 else tensor

    from saferlhf.rollout.experience import _map

    return _map(part, wider, lambda whole: whole)


CONFIGS = [
    ppo(),
    ppo(loss_mean="response", entropy_coefficient=0.1),
    ppo(kl=KlConfig(enters="loss", estimator="k3"), dual_clip=3.0),
]


@pytest.mark.parametrize("config", CONFIGS, ids=["token", "response", "kl in the loss"])
def test_gradients_do_not_depend_on_the_split_or_the_padding(config: PpoConfig) -> None:
    whole = experience()
    whole = replace(whole, weights=row_weights(whole.rollout.response_lengths, config.loss_mean))
    table, worth, means = gradients([whole], config)
    assert table.abs().max() > 0 and worth.abs().max() > 0
    for split in ([[0, 1], [2, 3, 4, 5]], [[5], [3], [0, 4], [2], [1]]):
        parts = [whole.select(rows) for rows in split]
        parts[0] = padded(parts[0], 4)
        other, value, found = gradients(parts, config)
        torch.testing.assert_close(other, table, atol=1e-7, rtol=1e-5)
        torch.testing.assert_close(value, worth, atol=1e-7, rtol=1e-5)
        assert found == pytest.approx(means)


def test_weights_of_rows() -> None:
    part = experience()
    lengths = part.rollout.response_lengths
    token, response = row_weights(lengths, "token"), row_weights(lengths, "response")
    assert token.tolist() == pytest.approx([1 / int(lengths.sum())] * len(part))
    assert (response * lengths).tolist() == pytest.approx([1 / len(part)] * len(part))
    # a response without a token weighs nothing, and is not counted
    lengths = torch.cat([lengths, torch.tensor([0])])
    assert row_weights(lengths, "response").tolist() == pytest.approx([*response.tolist(), 0])
    assert not row_weights(torch.tensor([0, 0]), "response").any()


def test_one_token_by_hand() -> None:
    """Ratio 1.5 beyond the clip of 0.2 and advantage 2: loss -2.4, no gradient; with advantage -2: loss 3."""
    part = experience(rows=1, width=4)
    mask = torch.zeros_like(part.rollout.response_mask)
    mask[0, 2] = True
    roles = TableRoles()
    now = token_logprobs(roles.logits("actor", part.rollout.input_ids, mask), part.rollout.input_ids, mask)
    for advantage, loss, stopped in ((2.0, -2.4, 1.0), (-2.0, 3.0, 0.0)):
        rollout = Rollout(
            **{
                **{name: getattr(part.rollout, name) for name in ("input_ids", "attention_mask", "truncated")},
                **{name: getattr(part.rollout, name) for name in ("row_ids", "sample", "prompts")},
                "response_mask": mask,
                "logprobs": (now.detach() - math.log(1.5)) * mask,
            }
        )
        one = Experience(
            rollout,
            reference_logprobs=rollout.logprobs,
            values={"reward": torch.zeros(1, 4)},
            returns={"reward": torch.full((1, 4), 3.0) * mask},
            advantages=advantage * mask.float(),
            weights=row_weights(rollout.response_lengths, "token"),
        )
        table, _, means = gradients([one], ppo())
        assert means["policy_loss"] == pytest.approx(loss, rel=1e-5)
        assert means["clip_fraction"] == stopped
        assert bool((table.abs().max() == 0).item()) is bool(stopped)
