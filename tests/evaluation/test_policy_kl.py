"""KL to the reference along sampled responses, against sums written out token by token."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from models.tiny_models import backbone

from saferlhf.evaluation import policy_kl
from saferlhf.evaluation.policy_kl import response_kl

PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13]]
RESPONSES = [[14, 15, 2], [16, 17, 18, 19], [20]]


@pytest.fixture(scope="module")
def models() -> tuple[torch.nn.Module, torch.nn.Module]:
    return tuple(loud(backbone(lm_head=True, seed=seed)) for seed in (0, 1))  # type: ignore[return-value]


def loud(model: torch.nn.Module) -> torch.nn.Module:
    """Weights so large that the distributions differ."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.mul_(6)
    return model.eval()


@torch.no_grad()
def one_by_one(
    policy: torch.nn.Module, reference: torch.nn.Module, prompt: list[int], response: list[int], temperature: float
) -> float:
    """sum_t sum_v p log(p / q), each state by a forward pass of its own, unpadded."""
    total = 0.0
    for t in range(len(response)):
        ids = torch.tensor([prompt + response[:t]])
        p, q = (torch.softmax(m(ids).logits[0, -1].double() / temperature, dim=-1) for m in (policy, reference))  # type: ignore[operator]
        total += float((p * (p / q).log()).sum())
    return total


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_it_is_the_sum_over_states(models: tuple[torch.nn.Module, torch.nn.Module], temperature: float) -> None:
    found = response_kl(*models, PROMPTS, RESPONSES, temperature=temperature)
    expected = [one_by_one(*models, p, r, temperature) for p, r in zip(PROMPTS, RESPONSES, strict=True)]
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    assert found.min() > 0.01


def test_it_does_not_depend_on_batches(
    models: tuple[torch.nn.Module, torch.nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = response_kl(*models, PROMPTS, RESPONSES)
    np.testing.assert_allclose(response_kl(*models, PROMPTS, RESPONSES, batch_size=1), found, rtol=1e-5)
    monkeypatch.setattr(policy_kl, "_LOGITS", 1)  # a vocabulary that hardly fits
    np.testing.assert_allclose(response_kl(*models, PROMPTS, RESPONSES), found, rtol=1e-5)
    turned = response_kl(*models, PROMPTS[::-1], RESPONSES[::-1])
    np.testing.assert_allclose(turned[::-1], found, rtol=1e-5)


def test_a_policy_that_has_not_moved_has_exactly_none(models: tuple[torch.nn.Module, torch.nn.Module]) -> None:
    assert response_kl(models[0], models[0], PROMPTS, RESPONSES).tolist() == [0.0, 0.0, 0.0]


def test_an_empty_response_has_none(models: tuple[torch.nn.Module, torch.nn.Module]) -> None:
    done: list[int] = []
    found = response_kl(*models, PROMPTS, [[], [16, 17], []], progress=done.append)
    assert found[0] == found[2] == 0.0 < found[1]
    assert done[-1] == 3


def test_learned_positions_count_from_the_mask() -> None:
    """A family whose positions are absolute: the same numbers alone and padded."""
    pair = tuple(loud(backbone("gpt2", lm_head=True, seed=seed)) for seed in (0, 1))
    found = response_kl(*pair, PROMPTS, RESPONSES)
    alone = [response_kl(*pair, [p], [r])[0] for p, r in zip(PROMPTS, RESPONSES, strict=True)]
    np.testing.assert_allclose(found, alone, rtol=1e-4)


def test_what_cannot_be_compared(models: tuple[torch.nn.Module, torch.nn.Module]) -> None:
    with pytest.raises(ValueError, match="temperature"):
        response_kl(*models, PROMPTS, RESPONSES, temperature=0)


def test_modes_are_put_back(models: tuple[torch.nn.Module, torch.nn.Module]) -> None:
    models[0].train()
    response_kl(*models, PROMPTS, RESPONSES)
    assert models[0].training and not models[1].training
    models[0].eval()


def test_its_mean_over_samples_is_that_of_log_ratios() -> None:
    """Rao-Blackwell: the same expectation as log pi(y) - log ref(y), over responses the policy samples."""
    from saferlhf.rollout.generate import generate
    from saferlhf.rollout.prompts import PromptTokens

    pair = tuple(loud(backbone(lm_head=True, seed=seed)) for seed in (0, 1))
    asked = [PromptTokens(f"row{i}", (5 + i % 50, 6)) for i in range(400)]
    rollout = generate(pair[0], asked, seed=0, max_new_tokens=4, eos_token_id=2, pad_token_id=0, batch_size=400)
    ids = [row[mask].tolist() for row, mask in zip(rollout.input_ids, rollout.response_mask, strict=True)]
    found = response_kl(*pair, [list(p.token_ids) for p in asked], ids)
    with torch.no_grad():
        logq = torch.log_softmax(pair[1](rollout.input_ids, attention_mask=rollout.attention_mask.long()).logits, -1)
    theirs = logq[:, :-1].gather(2, rollout.input_ids[:, 1:, None]).squeeze(2)  # (S, T - 1)
    mask = rollout.response_mask[:, 1:]
    ratios = ((rollout.logprobs[:, 1:] - theirs) * mask).sum(dim=1).double().numpy()
    error = np.std(ratios - found) / np.sqrt(len(found))
    assert abs(np.mean(ratios) - np.mean(found)) < 3 * error
    assert np.std(found) < np.std(ratios)
