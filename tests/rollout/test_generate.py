"""Samples belong to their rows, come from the distribution whose log-probabilities are reported, and end rightly."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from models.tiny_models import backbone, lora_config, stir
from rollout.tiny_policies import (
    EOS,
    Chain,
    counting,
    logits_after,
    logprobs_of,
    prompts_of,
    sampled,
    sharp,
    sharp_llama,
    some_prompts,
    written,
)
from scipy.stats import chisquare
from torch import Tensor

from saferlhf.errors import UserError
from saferlhf.models.adapters import add_lora
from saferlhf.rollout import generate as module
from saferlhf.rollout.prompts import PromptTokens


@pytest.fixture(scope="module")
def model() -> Any:
    return sharp_llama()


# ------------------------------------------------------------------------------------------------ whose noise it is
@pytest.mark.parametrize(
    ("family", "batching"),
    [
        ("llama", {"batch_size": 1}),
        ("llama", {"batch_size": 50}),
        ("llama", {"batch_tokens": 90}),
        ("gpt2", {"batch_size": 5}),
    ],
)
def test_batches_and_order_do_not_matter(family: str, batching: dict[str, int], model: Any) -> None:
    """GPT-2 knows each token's place, not only the distances: there padding on the left must not count."""
    model = model if family == "llama" else sharp(backbone("gpt2", lm_head=True))
    prompts = some_prompts()
    expected = sampled(model, prompts, samples=3, batch_size=4)
    assert len({tuple(ids) for ids in written(expected)}) > 20
    order = np.random.default_rng(1).permutation(len(prompts))
    found = sampled(model, [prompts[i] for i in order], samples=3, **batching)
    back = [3 * place + j for place in np.argsort(order) for j in range(3)]
    found = found.select(back)
    assert torch.equal(found.input_ids, expected.input_ids) and torch.equal(found.truncated, expected.truncated)
    assert torch.equal(found.response_mask, expected.response_mask) and found.row_ids == expected.row_ids
    torch.testing.assert_close(found.logprobs, expected.logprobs, atol=2e-5, rtol=0)


def test_a_draw_at_the_border_of_two_tokens_is_the_same_in_every_batch(model: Any, monkeypatch: Any) -> None:
    """Noise makes the two most probable tokens of a row run side by side, so that the last digit decides."""
    prompts = some_prompts(16)
    order = {prompt.row_id: place for place, prompt in enumerate(prompts)}
    p = torch.stack([torch.softmax(logits_after(model, prompt.token_ids)[-1].double(), dim=-1) for prompt in prompts])
    tied = torch.full_like(p, 1e9)
    first, second = p.topk(2, dim=-1).indices.T
    rows = torch.arange(16)
    monkeypatch.setattr(module, "row_key", lambda seed, rollout, row, sample: 100 * order[row] + seed)

    def noise(keys: Tensor, position: int, vocabulary: int) -> Tensor:
        seeds = keys % 100
        run = tied.clone()
        run[rows, first], run[rows, second] = p[rows, first], p[rows, second]
        run[rows, first] *= 1 + 1e-7 * (seeds[0].double() - 8)
        return run[keys // 100]

    monkeypatch.setattr(module, "exponential_noise", noise)
    outcomes: dict[float, set[tuple[tuple[int, ...], ...]]] = {0.0: set(), module.TIE: set()}
    for tie, seen in outcomes.items():
        monkeypatch.setattr(module, "TIE", tie)
        for seed in range(5, 12):
            for size in (1, 16):
                tokens = written(sampled(model, prompts, max_new_tokens=1, batch_size=size, seed=seed))
                seen.add((seed, *map(tuple, tokens)))  # type: ignore[arg-type]
    assert len(outcomes[module.TIE]) == 7, "one outcome per seed"
    assert len(outcomes[0.0]) > 7, "without a second look the batch decides: the noise is on the border"


def test_the_whole_key_of_the_noise_counts(model: Any) -> None:
    prompts = some_prompts()
    first = sampled(model, prompts)
    assert torch.equal(sampled(model, prompts).input_ids, first.input_ids)
    renamed = [PromptTokens(f"other-{i}", prompt.token_ids) for i, prompt in enumerate(prompts)]
    for other in (sampled(model, prompts, seed=8), sampled(model, prompts, rollout=1), sampled(model, renamed)):
        assert written(other) != written(first)
    both = sampled(model, prompts, samples=2)
    assert written(both)[0::2] == written(first) and written(both)[1::2] != written(first)
    assert both.sample.tolist() == [0, 1] * len(prompts)


def test_a_row_that_comes_twice_gets_further_samples(model: Any) -> None:
    prompt = some_prompts(1)
    four = sampled(model, prompt, samples=4)
    twice = sampled(model, [*prompt, *prompt], samples=2)
    assert written(twice) == written(four) and twice.sample.tolist() == [0, 1, 2, 3]
    assert len({tuple(ids) for ids in written(four)}) == 4


def test_a_global_generator_is_neither_used_nor_moved(model: Any) -> None:
    prompts = some_prompts(3)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = sampled(model, prompts)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert written(sampled(model, prompts)) == written(first)


# ------------------------------------------------------------------------------------------------ which distribution
@pytest.mark.parametrize("temperature", [1.0, 0.6, 2.0])
@pytest.mark.parametrize("lora", [False, True])
def test_logprobs_are_those_of_the_sampling_distribution(temperature: float, lora: bool, model: Any) -> None:
    """Recomputed token by token on unpadded sequences."""
    if lora:
        model = add_lora(backbone(lm_head=True, seed=2), lora_config(), seed=0)
        stir(model, scale=1.0)
    prompts = some_prompts()
    rollout = sampled(model, prompts, temperature=temperature, samples=2)
    assert not rollout.logprobs[~rollout.response_mask].any()
    for s, (tokens, found) in enumerate(zip(written(rollout), logprobs_of(rollout), strict=True)):
        prompt = list(prompts[s // 2].token_ids)
        logp = torch.log_softmax(logits_after(model, prompt + tokens).double() / temperature, dim=-1)
        expected = [float(logp[len(prompt) - 1 + t, token]) for t, token in enumerate(tokens)]
        assert found == pytest.approx(expected, abs=2e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_frequencies_are_the_softmax(temperature: float) -> None:
    """First tokens, and second tokens given the first, against softmax(logits / temperature) by chi-square."""
    vocabulary, rows = 6, 4000
    logits = 2 * torch.randn(vocabulary, vocabulary, generator=torch.Generator().manual_seed(0))
    logits[:, 4] = -torch.inf  # never drawn
    expected = torch.softmax(logits.double() / temperature, dim=-1).numpy()
    found = written(
        sampled(
            Chain(logits),
            prompts_of([[3]] * (rows // 2)),
            samples=2,
            max_new_tokens=2,
            temperature=temperature,
            eos_token_id=5,
            batch_size=1000,
        )
    )
    first = np.bincount([ids[0] for ids in found], minlength=vocabulary)
    assert first[4] == 0
    possible = np.flatnonzero(expected[3])
    assert chisquare(first[possible], rows * expected[3][possible]).pvalue > 0.001
    for token in (0, 1, 2, 3):
        second = np.bincount([ids[1] for ids in found if ids[0] == token], minlength=vocabulary)
        possible = np.flatnonzero(expected[token])
        assert chisquare(second[possible], second.sum() * expected[token][possible]).pvalue > 0.001
    # another temperature would have shown
    other = torch.softmax(logits.double()[3] / (temperature * 1.5), dim=-1).numpy()
    possible = np.flatnonzero(other)
    assert chisquare(first[possible], rows * other[possible]).pvalue < 1e-6


@pytest.mark.parametrize("batch_size", [1, 9])
def test_temperature_zero_is_greedy(batch_size: int, model: Any) -> None:
    prompts = some_prompts()
    rollout = sampled(model, prompts, temperature=0, batch_size=batch_size)
    assert not rollout.logprobs.any()
    for prompt, found in zip(prompts, written(rollout), strict=True):
        tokens = list(prompt.token_ids)
        for _ in range(12):
            tokens.append(int(logits_after(model, tokens)[-1].argmax()))
            if tokens[-1] == EOS:
                break
        assert found == tokens[len(prompt.token_ids) :]


# ------------------------------------------------------------------------------------------------ where it ends
@pytest.mark.parametrize("pad", [0, 9])
def test_the_end_token_belongs_to_the_response_and_nothing_after_it_does(pad: int) -> None:
    """pad = 9 is the end token itself."""
    prompts = prompts_of([[3], [7, 8], [5, 6, 7], [1]])
    rollout = sampled(counting(), prompts, eos_token_id=9, pad_token_id=pad, max_new_tokens=4)
    assert written(rollout) == [[4, 5, 6, 7], [9], [8, 9], [2, 3, 4, 5]]
    assert rollout.truncated.tolist() == [True, False, False, True]
    assert rollout.response_lengths.tolist() == [4, 1, 2, 4] and rollout.lengths.tolist() == [5, 3, 5, 5]
    assert rollout.input_ids[1].tolist() == [7, 8, 9, pad, pad]
    assert rollout.response_mask[1].tolist() == [False, False, True, False, False]
    assert rollout.logprobs.abs().max() < 1e-9


def test_an_end_exactly_at_the_limit_is_no_truncation() -> None:
    rollout = sampled(counting(), prompts_of([[5], [4]]), eos_token_id=9, max_new_tokens=4)
    assert written(rollout) == [[6, 7, 8, 9], [5, 6, 7, 8]]
    assert rollout.truncated.tolist() == [False, True]


def test_rows_leave_the_batch_when_they_end() -> None:
    """Responses of 1, 2, 2 and 4 tokens: the calls read 4 prompts, then 3, 1 and 1 rows."""
    model, done = counting(), []
    rollout = sampled(model, prompts_of([[8], [7], [7], [5]]), eos_token_id=9, max_new_tokens=100, progress=done.append)
    assert rollout.response_lengths.tolist() == [1, 2, 2, 4]
    assert model.calls == [4, 3, 1, 1] and done == [1, 3, 4]


def test_samples_of_one_prompt_share_its_reading() -> None:
    model = counting()
    rollout = sampled(model, prompts_of([[7], [6]]), samples=3, eos_token_id=9, max_new_tokens=9)
    assert model.calls == [2, 6, 3] and written(rollout) == [[8, 9]] * 3 + [[7, 8, 9]] * 3


def test_pad_as_end_token_changes_nothing(model: Any) -> None:
    prompts = some_prompts(20, seed=5)
    separate = sampled(model, prompts, max_new_tokens=40)
    assert not separate.truncated.all()
    same = sampled(model, prompts, max_new_tokens=40, pad_token_id=EOS)
    assert written(same) == written(separate) and torch.equal(same.truncated, separate.truncated)
    torch.testing.assert_close(same.logprobs, separate.logprobs)
    for tokens, cut in zip(written(same), same.truncated.tolist(), strict=True):
        assert (tokens[-1] == EOS) != cut and EOS not in tokens[:-1]


# ------------------------------------------------------------------------------------------------ manners
def test_modes_come_back(model: Any) -> None:
    model.train()
    model.model.layers[0].eval()
    before = [part.training for part in model.modules()]
    sampled(model, some_prompts(2))
    assert [part.training for part in model.modules()] == before and len(set(before)) == 2
    model.train()


def test_a_rollout_can_be_trained_on(model: Any) -> None:
    """No inference tensors: those cannot be part of a graph."""
    rollout = sampled(model, some_prompts(2))
    logits = model(input_ids=rollout.input_ids, attention_mask=rollout.attention_mask.long()).logits
    (logits[..., 0] * rollout.logprobs).sum().backward()
    assert all(weight.grad is not None for weight in model.parameters() if weight.requires_grad)
    model.zero_grad()


def test_nothing_to_do(model: Any) -> None:
    nothing = sampled(model, [])
    assert len(nothing) == 0 and nothing.statistics() == {}


def test_what_is_refused(model: Any) -> None:
    with pytest.raises(ValueError, match="at least one token"):
        prompts_of([[5], []])
    with pytest.raises(ValueError, match="negative"):
        sampled(model, prompts_of([[5]]), temperature=-1)
    with pytest.raises(ValueError, match="at least 1"):
        sampled(model, prompts_of([[5]]), max_new_tokens=0)
    for temperature in (0.0, 1.0):
        for wrong in (torch.nan, torch.inf):
            logits = torch.zeros(6, 6).index_fill(1, torch.tensor([3]), wrong)
            with pytest.raises(UserError, match="logits are not numbers"):
                sampled(Chain(logits), prompts_of([[3]]), temperature=temperature)
