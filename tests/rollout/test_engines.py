"""Engines behind one interface: native, a server on this machine, and vLLM's interface played by a stand-in."""

from __future__ import annotations

import contextlib
import copy
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from models.tiny_models import NF4, backbone, folder_of, lora_config, stir, tokenizer
from rollout.fake_server import Asked, Reply, serving
from rollout.tiny_policies import EOS, logits_after, logprobs_of, sampled, sharp_llama, some_prompts, written

from saferlhf.config.paths import conf_dir
from saferlhf.config.rollout_schema import RolloutConfig, VllmConfig, check_rollout
from saferlhf.config.schema import BackboneConfig
from saferlhf.config.validate import typed
from saferlhf.errors import UserError
from saferlhf.models.adapters import add_lora
from saferlhf.models.backbone import load_backbone
from saferlhf.ops.policy_losses import token_logprobs
from saferlhf.rollout.engines import Engine, build_engine
from saferlhf.rollout.engines.base import request_seed
from saferlhf.rollout.engines.mismatch import logprob_mismatch, refuse_mismatch
from saferlhf.rollout.engines.weights import merged_weights
from saferlhf.rollout.experience import Rollout


@pytest.fixture(scope="module")
def model() -> Any:
    """One that ends some of its responses early."""
    policy = sharp_llama()
    with torch.no_grad():
        policy.get_output_embeddings().weight[EOS] *= 3
    return policy


def config(engine: str = "native", **changes: Any) -> RolloutConfig:
    return RolloutConfig(**{"name": engine, "engine": engine, "max_new_tokens": 10, **changes})


def recomputed(model: Any, rollout: Rollout, temperature: float = 1.0) -> torch.Tensor:
    with torch.no_grad():
        logits = model(input_ids=rollout.input_ids, attention_mask=rollout.attention_mask.long()).logits
    return token_logprobs(logits, rollout.input_ids, rollout.response_mask, temperature=temperature)


def write(model: Any, prompt: list[int], seed: int, limit: int, temperature: float) -> tuple[list[int], list[float]]:
    """One response, token by token on the whole sequence: how other engines' sampling is played here."""
    stream = torch.Generator().manual_seed(seed)
    ids: list[int] = []
    logprobs: list[float] = []
    while len(ids) < limit and (not ids or ids[-1] != EOS):
        logp = torch.log_softmax(logits_after(model, prompt + ids)[-1] / temperature, dim=-1)
        ids.append(int(torch.multinomial(logp.exp(), 1, generator=stream)))
        logprobs.append(float(logp[ids[-1]]))
    return ids, logprobs


# ------------------------------------------------------------------------------------------------ native
def test_native_is_generate(model: Any) -> None:
    prompts = some_prompts(5)
    engine = build_engine(config(), tokenizer(), policy=lambda: contextlib.nullcontext(model))
    assert isinstance(engine, Engine) and engine.name == "native"
    engine.follow(model)
    done: list[int] = []
    rollout = engine.generate(prompts, samples=2, seed=7, rollout=3, progress=done.append)
    assert written(rollout) == written(sampled(model, prompts, samples=2, seed=7, rollout=3, max_new_tokens=10))
    assert rollout.responses is not None and len(rollout.responses) == 10 and done[-1] == 10
    assert rollout.responses[0] == tokenizer().decode(written(rollout)[0], skip_special_tokens=True)
    found = logprob_mismatch(rollout.logprobs, recomputed(model, rollout), rollout.response_mask)
    assert found["mean_abs"] < 1e-5 and found["unknown_share"] == 0


# ------------------------------------------------------------------------------------------------ mismatch
def test_mismatch_by_hand() -> None:
    """d = 0, ln 2 and one token the engine told nothing about: KL = (0 + 2 - 1 - ln 2) / 2."""
    engine = torch.tensor([[9.0, -1.0, -2.0, math.nan]])
    policy = torch.tensor([[5.0, -1.0, -2.0 + math.log(2), -3.0]])
    mask = torch.tensor([[False, True, True, True]])
    found = logprob_mismatch(engine, policy, mask)
    assert found["mean_abs"] == pytest.approx(math.log(2) / 2, abs=1e-6)
    assert found["max_abs"] == pytest.approx(math.log(2), abs=1e-6)
    assert found["kl"] == pytest.approx((1 - math.log(2)) / 2, abs=1e-6)
    assert found["unknown_share"] == pytest.approx(1 / 3)
    refuse_mismatch(found, 0.4, "vllm")
    with pytest.raises(UserError, match=r"off by 0\.347 nats"):
        refuse_mismatch(found, 0.3, "vllm")
    nothing = logprob_mismatch(engine * math.nan, policy, mask)
    assert math.isnan(nothing["kl"]) and nothing["unknown_share"] == 1
    with pytest.raises(UserError, match="no log-probabilities"):
        refuse_mismatch(nothing, 10.0, "openai")


# ------------------------------------------------------------------------------------------------ a server
def completion(model: Any, asked: Asked, form: str) -> Reply:
    body = asked.body
    ids, logprobs = write(model, body["prompt"], body["seed"], body["max_tokens"], body["temperature"])
    choice: dict[str, Any] = {
        "text": tokenizer().decode(ids, skip_special_tokens=True),
        "finish_reason": "stop" if ids[-1] == EOS else "length",
        "logprobs": {"tokens": [f"token_id:{i}" for i in ids], "token_logprobs": logprobs},
    }
    if form == "token_ids":
        choice |= {"token_ids": ids, "logprobs": {"tokens": ["?"] * len(ids), "token_logprobs": logprobs}}
    if form == "no_end" and ids[-1] == EOS:
        choice["logprobs"] = {"tokens": [f"token_id:{i}" for i in ids[:-1]], "token_logprobs": logprobs[:-1]}
    if form == "text":
        del choice["logprobs"]
    return Reply({"choices": [choice]})


@pytest.mark.parametrize("form", ["words", "token_ids", "no_end", "text"])
def test_a_server(form: str, model: Any) -> None:
    prompts = some_prompts(6)
    with serving(lambda asked, n: completion(model, asked, form)) as server:
        engine = build_engine(config("openai", server=server.config(model="policy")), tokenizer())
        rollout = engine.generate(prompts, samples=2, seed=7)
        again = engine.generate(prompts[::-1], samples=2, seed=7)
        with pytest.raises(UserError, match="cannot follow"):
            engine.follow(model)
    assert isinstance(engine, Engine) and server.asked[0].path == "/v1/completions"
    assert server.asked[0].body["top_p"] == 1 and "top_k" not in server.asked[0].body
    expected = [
        write(model, list(prompt.token_ids), request_seed(7, 0, prompt.row_id, j), 10, 1.0)
        for prompt in prompts
        for j in range(2)
    ]
    assert len({tuple(ids) for ids, _ in expected}) > 6 and 0 < rollout.truncated.sum() < 12
    assert rollout.truncated.tolist() == [ids[-1] != EOS for ids, _ in expected]
    if form == "text":
        assert rollout.logprobs[rollout.response_mask].isnan().all(), "no tokens, no log-probabilities"
        assert not rollout.logprobs[~rollout.response_mask].any()
        return
    assert written(rollout) == [ids for ids, _ in expected]
    back = again.select([2 * (5 - i) + j for i in range(6) for j in range(2)])
    assert written(back) == written(rollout), "the noise is that of the row"
    found = logprob_mismatch(rollout.logprobs, recomputed(model, rollout), rollout.response_mask)
    assert found["mean_abs"] < 1e-4
    ends = int((~rollout.truncated).sum()) if form == "no_end" else 0
    assert found["unknown_share"] == pytest.approx(ends / int(rollout.response_mask.sum()))


def test_a_servers_log_probabilities_at_another_temperature_are_not_believed(model: Any) -> None:
    with serving(lambda asked, n: completion(model, asked, "words")) as server:
        engine = build_engine(config("openai", server=server.config(), temperature=0.5), tokenizer())
        rollout = engine.generate(some_prompts(2), seed=0)
    assert rollout.logprobs[rollout.response_mask].isnan().all()


@pytest.mark.parametrize(
    "reply",
    [Reply({}, 500), Reply({"choices": []}), Reply({"choices": [{"text": None}]}), Reply({"x": 1}), Reply({}, 400)],
)
def test_a_server_that_fails_ends_the_run(reply: Reply) -> None:
    with serving(lambda asked, n: reply) as server:
        engine = build_engine(config("openai", server=server.config()), tokenizer())
        with pytest.raises(UserError, match="no response to row row-0"):
            engine.generate(some_prompts(2), seed=0)


# ------------------------------------------------------------------------------------------------ weights
def test_merged_weights_are_those_of_the_merged_model() -> None:
    policy = add_lora(backbone(lm_head=True, seed=2), lora_config(), seed=0)
    stir(policy, scale=1.0)
    before = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
    found = {name: tensor.clone() for name, tensor in merged_weights(policy)}
    expected = copy.deepcopy(policy).merge_and_unload().state_dict()  # type: ignore[operator]
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-6, rtol=0)
    plain = backbone(lm_head=True, seed=2).state_dict()
    assert any(not torch.allclose(found[name], plain[name], atol=1e-3) for name in plain)
    assert all(torch.equal(tensor, before[name]) for name, tensor in policy.state_dict().items()), "nothing was merged"
    full = backbone(lm_head=True, seed=2)
    assert {name for name, _ in merged_weights(full)} == set(full.state_dict())


def test_a_packed_base_is_refused(tmp_path: Path) -> None:
    config = BackboneConfig(name="tiny", model=folder_of(tmp_path / "policy"), tokenizer="toyworld")
    packed = load_backbone(config, quantization=NF4, lm_head=True)
    with pytest.raises(UserError, match="packed"):
        list(merged_weights(packed))


# ------------------------------------------------------------------------------------------------ vLLM
class StandIn:
    """The part of vLLM's `LLM` that is used, on a Hugging Face model."""

    made: ClassVar[list[dict[str, Any]]] = []

    def __init__(self, **options: Any) -> None:
        from transformers import AutoModelForCausalLM

        StandIn.made.append(options)
        self.model = AutoModelForCausalLM.from_pretrained(options["model"])
        self.cached = True

    def apply_model(self, function: Any) -> list[Any]:
        def load_weights(weights: Any) -> None:
            own = self.model.state_dict()
            for name, tensor in weights:
                own[name].copy_(tensor)

        return [function(SimpleNamespace(load_weights=load_weights))]

    def reset_prefix_cache(self) -> None:
        self.cached = False

    def generate(self, prompts: list[dict[str, Any]], params: list[dict[str, Any]], use_tqdm: bool) -> list[Any]:
        outputs = []
        for prompt, how in zip(prompts, params, strict=True):
            assert how["top_k"] == 0 and how["top_p"] == 1 and how["n"] == 1 and how["stop_token_ids"] == [EOS]
            ids, logprobs = write(
                self.model, prompt["prompt_token_ids"], how["seed"], how["max_tokens"], how["temperature"]
            )
            told = [{i: SimpleNamespace(logprob=value)} for i, value in zip(ids, logprobs, strict=True)]
            reason = "stop" if ids[-1] == EOS else "length"
            one = SimpleNamespace(token_ids=ids, logprobs=told, finish_reason=reason)
            outputs.append(SimpleNamespace(outputs=[one]))
        return outputs


def test_vllm_follows_the_policy(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=StandIn, SamplingParams=dict))
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    folder = folder_of(tmp_path / "policy")
    from transformers import AutoModelForCausalLM

    policy = add_lora(AutoModelForCausalLM.from_pretrained(folder), lora_config(), seed=0)
    stir(policy, scale=1.0)
    engine: Any = build_engine(config("vllm", temperature=0.7), tokenizer(), folder=folder, max_length=64)
    assert isinstance(engine, Engine) and engine.name == "vllm"
    made = StandIn.made[-1]
    assert made["logprobs_mode"] == "processed_logprobs" and made["trust_remote_code"] is False
    prompts = some_prompts(6)
    before = engine.generate(prompts, samples=2, seed=7)
    off = logprob_mismatch(before.logprobs, recomputed(policy, before, 0.7), before.response_mask)
    with pytest.raises(UserError, match="off by"):
        refuse_mismatch(off, config().max_logprob_mismatch, "vllm")
    engine.follow(policy)
    assert engine._llm.cached is False
    after = engine.generate(prompts, samples=2, seed=7)
    found = logprob_mismatch(after.logprobs, recomputed(policy, after, 0.7), after.response_mask)
    assert found["mean_abs"] < 1e-4 and found["unknown_share"] == 0 and written(after) != written(before)
    assert all(len(a) == len(b) for a, b in zip(written(after), logprobs_of(after), strict=True))
    assert after.row_ids == tuple(f"row-{i}" for i in range(6) for _ in range(2)) and 0 < after.truncated.sum() < 12
    assert len(engine.generate([], seed=0)) == 0


def test_vllm_that_is_not_there(monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(UserError, match="not installed"):
        build_engine(config("vllm"), tokenizer(), folder="x")
    with pytest.raises(UserError, match="one device only"):
        build_engine(config("vllm", vllm=VllmConfig(tensor_parallel_size=2)), tokenizer(), folder="x")


# ------------------------------------------------------------------------------------------------ config
@pytest.mark.parametrize("name", ["native", "vllm"])
def test_the_config_files_compose_and_can_be_trained_with(name: str) -> None:
    from hydra import compose, initialize_config_dir

    with initialize_config_dir(str(conf_dir() / "rollout"), version_base="1.3"):
        found = typed(RolloutConfig, compose(name), "rollout")
    assert found.name == name and found.engine == name
    check_rollout(found)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"top_k": 50}, "cut-off distribution"),
        ({"top_p": 0.9}, "cut-off distribution"),
        ({"temperature": 0.0}, "nothing to explore"),
        ({"engine": "openai"}, "cannot sample a policy in training"),
        ({"engine": "hf"}, "cannot sample"),
        ({"samples": 0}, "samples is 0"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"batch_tokens": -1}, "batch_tokens is -1"),
    ],
)
def test_what_cannot_be_trained_with(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_rollout(config(**change))


def test_unknown_engines() -> None:
    with pytest.raises(UserError, match="did you mean 'native'"):
        build_engine(config("nativ"), tokenizer())
