"""Samples belong to their rows, come from the distribution whose log-probabilities are reported, and end rightly."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from models.tiny_models import backbone, lora_config, stir
from scipy.stats import chisquare
from torch import Tensor, nn

from saferlhf.errors import UserError
from saferlhf.models.adapters import add_lora
from saferlhf.rollout.sampling import Sampled, row_noise, sample_responses

EOS, PAD = 2, 0


@pytest.fixture(scope="module")
def model() -> Any:
    """A small Llama whose next-token distributions are far from flat."""
    return sharp(backbone(lm_head=True))


def sharp(model: Any) -> Any:
    with torch.no_grad():
        stream = torch.Generator().manual_seed(3)
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.copy_(torch.randn(parameter.shape, generator=stream) / parameter.shape[-1] ** 0.5)
        model.get_output_embeddings().weight.mul_(4)
    return model.train()


def some_prompts(count: int = 9, seed: int = 0) -> tuple[list[list[int]], list[str]]:
    draw = np.random.default_rng(seed)
    prompts = [draw.integers(5, 64, draw.integers(1, 14)).tolist() for _ in range(count)]
    return prompts, [f"row-{number}" for number in range(count)]


def sampled(model: nn.Module, prompts: Sequence[Sequence[int]], ids: Sequence[str], **options: Any) -> list[Sampled]:
    given = {"eos_token_id": EOS, "pad_token_id": PAD, "max_new_tokens": 12, "seed": 7, **options}
    return sample_responses(model, prompts, ids, **given)


def logits_after(model: Any, tokens: Sequence[int]) -> Tensor:
    """(T, V) of one unpadded sequence, without a cache."""
    model.eval()
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([list(tokens)]), use_cache=False).logits[0]
    model.train()
    return logits


# ------------------------------------------------------------------------------------------------ whose noise it is
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("batch_size", [1, 2, 9])
def test_batches_and_order_do_not_matter(batch_size: int, family: str, model: Any) -> None:
    """GPT-2 knows each token's place, not only the distances: there padding on the left must not count."""
    model = model if family == "llama" else sharp(backbone("gpt2", lm_head=True))
    prompts, ids = some_prompts()
    expected = sampled(model, prompts, ids, batch_size=3)
    assert len({tuple(s.token_ids) for s in expected}) > 5
    order = np.random.default_rng(1).permutation(len(prompts))
    found = sampled(model, [prompts[i] for i in order], [ids[i] for i in order], batch_size=batch_size)
    for place, i in enumerate(order):
        assert found[place].token_ids == expected[i].token_ids and found[place].truncated == expected[i].truncated
        assert found[place].logprob == pytest.approx(expected[i].logprob, abs=1e-4)


def test_noise_belongs_to_seed_row_and_sample() -> None:
    noise = row_noise(0, "a", 0, 8)
    assert noise.dtype == np.float64 and ((noise >= 0) & (noise < 1)).all()
    assert np.array_equal(row_noise(0, "a", 0, 8), noise)
    assert np.array_equal(row_noise(0, "a", 0, 100)[:8], noise), "a longer request extends a shorter one"
    others = [row_noise(1, "a", 0, 8), row_noise(0, "b", 0, 8), row_noise(0, "a", 1, 8)]
    # no confusion of neighbouring keys either
    others += [row_noise(11, "a", 0, 8), row_noise(1, "1\x00a", 0, 8), row_noise(0, "a", 10, 8)]
    assert all(not np.allclose(noise, other) for other in others)
    assert len({tuple(other) for other in others}) == len(others)


def test_seed_and_sample_change_the_draw(model: Any) -> None:
    prompts, ids = some_prompts()
    first = sampled(model, prompts, ids)
    assert sampled(model, prompts, ids) == first
    assert sampled(model, prompts, ids, seed=8) != first != sampled(model, prompts, ids, sample=1)


def test_a_global_generator_is_neither_used_nor_moved(model: Any) -> None:
    prompts, ids = some_prompts(3)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = sampled(model, prompts, ids)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert sampled(model, prompts, ids) == first


# ------------------------------------------------------------------------------------------------ which distribution
@pytest.mark.parametrize("temperature", [1.0, 0.6, 2.0])
@pytest.mark.parametrize("lora", [False, True])
def test_logprobs_are_those_of_the_sampling_distribution(temperature: float, lora: bool, model: Any) -> None:
    """Recomputed token by token on unpadded sequences."""
    if lora:
        model = add_lora(backbone(lm_head=True, seed=2), lora_config(), seed=0)
        stir(model, scale=1.0)
    prompts, ids = some_prompts()
    for prompt, found in zip(prompts, sampled(model, prompts, ids, temperature=temperature), strict=True):
        logp = torch.log_softmax(logits_after(model, prompt + found.token_ids).double() / temperature, dim=-1)
        expected = sum(float(logp[len(prompt) - 1 + t, token]) for t, token in enumerate(found.token_ids))
        assert found.logprob == pytest.approx(expected, abs=1e-4)


class Chain(nn.Module):
    """A language model that looks at the last token only."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)  # (V, V)
        self.calls = 0

    def forward(self, input_ids: Tensor, past_key_values: Any = None, **_: Any) -> Any:
        self.calls += 1
        return SimpleNamespace(logits=self.logits[input_ids], past_key_values=())


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_frequencies_are_the_softmax(temperature: float) -> None:
    """First tokens, and second tokens given the first, against softmax(logits / temperature) by chi-square."""
    vocabulary, rows = 6, 6000
    logits = 2 * torch.randn(vocabulary, vocabulary, generator=torch.Generator().manual_seed(0))
    logits[:, 4] = -torch.inf  # never drawn
    expected = torch.softmax(logits.double() / temperature, dim=-1).numpy()
    ids = [str(number) for number in range(rows)]
    found = sampled(
        Chain(logits), [[3]] * rows, ids, max_new_tokens=2, temperature=temperature, eos_token_id=5, batch_size=1000
    )
    first = np.bincount([s.token_ids[0] for s in found], minlength=vocabulary)
    assert first[4] == 0
    possible = np.flatnonzero(expected[3])
    assert chisquare(first[possible], rows * expected[3][possible]).pvalue > 0.001
    for token in (0, 1, 2, 3):
        second = np.bincount([s.token_ids[1] for s in found if s.token_ids[0] == token], minlength=vocabulary)
        possible = np.flatnonzero(expected[token])
        assert chisquare(second[possible], second.sum() * expected[token][possible]).pvalue > 0.001
    # another temperature would have shown
    other = torch.softmax(logits.double()[3] / (temperature * 1.5), dim=-1).numpy()
    possible = np.flatnonzero(other)
    assert chisquare(first[possible], rows * other[possible]).pvalue < 1e-6


@pytest.mark.parametrize("batch_size", [1, 9])
def test_temperature_zero_is_greedy(batch_size: int, model: Any) -> None:
    prompts, ids = some_prompts()
    for prompt, found in zip(prompts, sampled(model, prompts, ids, temperature=0, batch_size=batch_size), strict=True):
        tokens = list(prompt)
        for _ in range(12):
            tokens.append(int(logits_after(model, tokens)[-1].argmax()))
            if tokens[-1] == EOS:
                break
        assert found.token_ids == tokens[len(prompt) :] and found.logprob == 0


# ------------------------------------------------------------------------------------------------ where it ends
def counting(step_logit: float = 50.0, vocabulary: int = 12) -> Chain:
    """After token n comes n + 1, surely; 11 stays 11."""
    logits = torch.zeros(vocabulary, vocabulary)
    for token in range(vocabulary):
        logits[token, min(token + 1, vocabulary - 1)] = step_logit
    return Chain(logits)


@pytest.mark.parametrize("pad", [0, 9])
def test_the_end_token_belongs_to_the_response_and_nothing_after_it_does(pad: int) -> None:
    """pad = 9 is the end token itself."""
    model = counting()
    found = sampled(
        model, [[3], [7, 8], [5, 6, 7], [1]], list("abcd"), eos_token_id=9, pad_token_id=pad, max_new_tokens=4
    )
    assert [s.token_ids for s in found] == [[4, 5, 6, 7], [9], [8, 9], [2, 3, 4, 5]]
    assert [s.truncated for s in found] == [True, False, False, True]
    assert all(s.logprob == pytest.approx(0, abs=1e-9) for s in found)


def test_an_end_exactly_at_the_limit_is_no_truncation() -> None:
    found = sampled(counting(), [[5], [4]], ["a", "b"], eos_token_id=9, max_new_tokens=4)
    assert [s.token_ids for s in found] == [[6, 7, 8, 9], [5, 6, 7, 8]]
    assert [s.truncated for s in found] == [False, True]


def test_it_stops_when_all_rows_have_ended() -> None:
    model = counting()
    sampled(model, [[7], [8]], ["a", "b"], eos_token_id=9, max_new_tokens=100)
    assert model.calls == 2


def test_pad_as_end_token_changes_nothing(model: Any) -> None:
    prompts, ids = some_prompts(20, seed=5)
    separate = sampled(model, prompts, ids, max_new_tokens=40)
    assert any(not s.truncated for s in separate)
    for one, other in zip(separate, sampled(model, prompts, ids, max_new_tokens=40, pad_token_id=EOS), strict=True):
        assert one.token_ids == other.token_ids and one.truncated == other.truncated
        assert one.logprob == pytest.approx(other.logprob, abs=1e-5)
        assert one.token_ids[-1] == EOS or one.truncated
        assert EOS not in one.token_ids[:-1]


def test_a_row_that_ended_does_not_disturb_the_others(model: Any) -> None:
    prompts, ids = some_prompts(20, seed=5)
    together = sampled(model, prompts, ids, max_new_tokens=40, batch_size=20)
    assert len({len(s.token_ids) for s in together}) > 2
    for prompt, row_id, found in zip(prompts, ids, together, strict=True):
        (alone,) = sampled(model, [prompt], [row_id], max_new_tokens=40)
        assert alone.token_ids == found.token_ids and alone.logprob == pytest.approx(found.logprob, abs=1e-4)


# ------------------------------------------------------------------------------------------------ manners
def test_modes_come_back(model: Any) -> None:
    prompts, ids = some_prompts(2)
    model.train()
    model.model.layers[0].eval()
    before = [module.training for module in model.modules()]
    sampled(model, prompts, ids)
    assert [module.training for module in model.modules()] == before and len(set(before)) == 2
    model.train()


def test_nothing_to_do(model: Any) -> None:
    assert sampled(model, [], []) == []
    (none,) = sampled(model, [[5]], ["a"], max_new_tokens=0)
    assert none == Sampled([], True, 0.0)


def test_what_is_refused(model: Any) -> None:
    with pytest.raises(ValueError, match="at least one token"):
        sampled(model, [[5], []], ["a", "b"])
    with pytest.raises(ValueError, match="negative"):
        sampled(model, [[5]], ["a"], temperature=-1)
    for temperature in (0.0, 1.0):
        with pytest.raises(UserError, match="logits are not numbers"):
            sampled(Chain(torch.full((6, 6), torch.nan)), [[3]], ["a"], temperature=temperature)
