"""The memory plan: the published accounting of LLaMA-7B, phases and strategies by hand, remedies, the printed page."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from command_lines import FAST, call, config

from saferlhf.config.schema import TrainConfig
from saferlhf.run.memory.plan import GIB, MemoryPlan, plan_memory, published_bytes
from saferlhf.run.memory.policy_size import check_policy_fits
from saferlhf.run.memory.remedies import remedies_for
from saferlhf.run.memory.table import memory_rows
from saferlhf.run.memory.workload import Workload, full_length

GIVEN = ["init=given", "roles.reward.model=given", "roles.cost.model=given", "data=rl_prompts", "trainer=gpu"]
LLAMA = 6_738_415_616
WORK = Workload(longest=64, response=32, steps=10, tokens_per_step=1000.0)


def llama(*words: str) -> TrainConfig:
    return config("task=ppo_lag", "backbone=llama_7b", *GIVEN, *words)


def test_the_published_sum() -> None:
    # six LLaMA-7B: three trained with 16 bytes a parameter, three frozen with 2
    assert published_bytes(3 * LLAMA, 3 * LLAMA) == pytest.approx(364e9, rel=1e-3)
    assert published_bytes(3 * LLAMA, 3 * LLAMA) / GIB == pytest.approx(339, abs=0.5)


def test_llama_7b_separate_and_fully_trained() -> None:
    plan = plan_memory(llama("roles=separate", "backbone.dtype=float32", "trainer.micro_batch_size=4"))
    assert plan.published == published_bytes(3 * LLAMA, 3 * LLAMA)
    page = "\n".join(" ".join(row) for row in memory_rows(llama("roles=separate"), plan))
    assert "364 GB (339 GiB) before activations" in page
    sizes = {role.name: role for role in plan.roles}
    assert list(sizes) == ["actor", "reference", "reward", "cost", "reward_critic", "cost_critic"]
    # float32 weights, gradients and two moments: 16 bytes too
    actor = sizes["actor"]
    assert actor.weights + actor.gradients + actor.optimizer == 16 * LLAMA
    # reward and critics have a score head in the place of the output layer
    assert sizes["reward"].count == LLAMA - 32000 * 4096 + 4096 + 1
    assert sizes["reward"].optimizer == 0
    assert plan.peak > 364e9
    assert not plan.fits(80)


def test_llama_7b_on_one_base_in_4_bits_fits_24_gib() -> None:
    words = ["quantization=nf4", "quantization.compute_dtype=bfloat16", "adapter=lora", "roles=shared"]
    run = llama(
        *words, "trainer.micro_batch_size=8", "trainer.eval_batch_size=16", "rollout.batch_size=32", "plan.gpu=24"
    )
    plan = plan_memory(run)
    assert plan.fits(24)
    sizes = {role.name: role for role in plan.roles}
    assert sizes["base"].weights / GIB == pytest.approx(3.6, abs=0.05)
    assert sizes["actor"].optimizer == 2 * 4 * 39_976_960
    assert sizes["reward"].gradients == 0
    assert sum(role.weights + role.gradients + role.optimizer for role in plan.roles) / GIB < 6
    page = dict(memory_rows(run, plan))
    assert page["24 GiB"].startswith("fits: ")


# ------------------------------------------------------------------------------------------------ phases
TINY = ["backbone=tiny", "data=toyworld"]


def tiny(*words: str) -> TrainConfig:
    return config(*TINY, *words)


def planned(run: TrainConfig, device: str = "cpu") -> MemoryPlan:
    return plan_memory(run, WORK, device=device, vocabulary_size=512)


def phase(plan: MemoryPlan, name: str) -> Any:
    return next(p for p in plan.phases if p.name == name)


def test_phases_of_a_supervised_run() -> None:
    plan = planned(tiny("task=reward"))
    (role,) = plan.roles
    assert (role.weights, role.optimizer) == (role.gradients, 2 * role.gradients)
    assert [p.name for p in plan.phases] == ["update", "evaluation", "save"]
    assert all(p.resident == role.weights + role.optimizer for p in plan.phases)
    assert phase(plan, "evaluation").gradients == role.gradients
    assert plan.peak == max(p.total for p in plan.phases) == plan.highest.total


def test_more_rows_take_more() -> None:
    few, many = (planned(tiny("task=reward", f"trainer.micro_batch_size={n}")) for n in (4, 16))
    growth = phase(many, "update").activations - phase(few, "update").activations
    assert growth > 2.5 * phase(few, "update").activations


def test_adapters_keep_few_states() -> None:
    plan = planned(tiny("task=reward", "adapter=lora", "init=given"))
    (role,) = plan.roles
    assert role.count > role.trained_count > 0
    assert role.optimizer == 2 * role.gradients == 8 * role.trained_count


def test_small_and_paged_states() -> None:
    base = tiny("task=sft")
    small, paged = (
        planned(replace(base, optimizer=replace(base.optimizer, name=name)), "gpu")
        for name in ("adamw_8bit", "paged_adamw_8bit")
    )
    whole = planned(base, "gpu")
    assert small.roles[0].optimizer < 0.3 * whole.roles[0].optimizer
    assert (paged.roles[0].optimizer, paged.host) == (0, small.roles[0].optimizer)


def test_what_is_spread_over_devices() -> None:
    base = tiny("task=reward", "trainer.batch_size=32", "trainer.micro_batch_size=4")

    def over(name: str, **more: Any) -> MemoryPlan:
        trainer = replace(base.trainer, devices=4)
        return planned(replace(base, trainer=trainer, strategy=replace(base.strategy, name=name, **more)), "gpu")

    single, ddp, fsdp = planned(base, "gpu"), over("ddp"), over("fsdp")
    assert ddp.roles == single.roles
    # buckets of gradients beside them
    assert phase(ddp, "update").other - phase(single, "update").other >= single.roles[0].gradients
    for part in ("weights", "gradients", "optimizer"):
        assert getattr(fsdp.roles[0], part) == pytest.approx(getattr(single.roles[0], part) / 4, abs=4)
    halves = over("fsdp", replicas=2)
    assert halves.roles[0].weights == pytest.approx(single.roles[0].weights / 2, abs=4)
    hosted = over("fsdp", cpu_offload=True)
    assert hosted.roles[0].optimizer == 0
    assert hosted.host >= fsdp.roles[0].weights + fsdp.roles[0].optimizer


def test_phases_of_an_online_run() -> None:
    run = tiny("task=ppo_lag", "init=given", "roles.reward.model=given", "roles.cost.model=given",
               "rollout.prompts=16", "rollout.max_new_tokens=32")  # fmt: skip
    plan = planned(run)
    assert [p.name for p in plan.phases] == ["rollout", "scoring", "update", "save"]
    # keys and values of 4 layers of width 128 for 16 rows of 64 tokens, float32
    assert phase(plan, "rollout").cache == 2 * 4 * 128 * 16 * 64 * 4
    trained = [role for role in plan.roles if role.trained]
    assert [role.name for role in trained] == ["actor", "reward_critic", "cost_critic"]
    assert phase(plan, "rollout").gradients == sum(role.gradients for role in trained)


def test_no_critic_without_gae() -> None:
    run = tiny("task=ppo", "advantage=rloo", "rollout.samples=2", "init=given", "roles.reward.model=given")
    assert [role.name for role in planned(run).roles] == ["actor", "reference", "reward"]


def test_scorers_take_no_room() -> None:
    scorers = "scorers={reward: {kind: truth, take: helpfulness}}"
    run = tiny("task=ppo", "init=given", "adapter=lora", "roles=shared", scorers)
    assert [role.name for role in planned(run).roles] == ["base", "actor", "reference", "reward_critic"]


def test_rows_are_as_long_as_the_backbone_takes_where_none_are_known() -> None:
    assert full_length(tiny("task=sft")) == Workload(128, 127)
    run = llama("rollout.max_new_tokens=100", "roles=separate")
    assert full_length(run) == Workload(512, 100)
    assert full_length(run).prompt == 412


# ------------------------------------------------------------------------------------------------ remedies and the page
def test_remedies_come_in_order_and_end_with_the_first_that_fits() -> None:
    run = config("task=reward", "backbone=llama_7b", "backbone.dtype=float32", "backbone.gradient_checkpointing=false",
                 "trainer=gpu", "data=pku_saferlhf", "data.root=given")  # fmt: skip
    plan = plan_memory(run)
    found = remedies_for(run, plan, 10)
    words = [remedy.words.split("=")[0].split(" ")[0] for remedy in found]
    assert words[:3] == ["trainer.micro_batch_size", "backbone.gradient_checkpointing", "trainer.precision"]
    assert words[3:5] == ["adapter", "quantization"]
    peaks = [remedy.peak for remedy in found]
    assert peaks == sorted(peaks, reverse=True)
    assert [remedy.fits for remedy in found] == [False] * (len(found) - 1) + [True]
    assert found[-1].peak <= 10 * GIB
    # each is what the plan says of the changed run
    words_so_far = [word for remedy in found[:2] for word in remedy.words.split()]
    again = plan_memory(config("task=reward", "backbone=llama_7b", "backbone.dtype=float32", "trainer=gpu",
                               "data=pku_saferlhf", "data.root=given", *words_so_far))  # fmt: skip
    assert again.peak == found[1].peak


def test_only_a_policy_that_no_device_holds_is_refused() -> None:
    check_policy_fits(llama("roles=separate"), 24)  # 12.6 GiB in bfloat16: there are remedies
    check_policy_fits(tiny("task=reward"), 0.0001)  # nothing is sampled


def test_the_printed_page(tmp_outputs: Path) -> None:
    words = ["task=reward", "plan=on", *FAST, f"output_root={tmp_outputs}"]
    answer = call("train", *words, "plan.gpu=24")
    assert answer.code == 0, answer.err
    assert "24 GiB" in answer.out
    assert "fits: " in answer.out
    for heading in ("weights", "gradients", "optimizer", "activations", "logits", "KV cache", "peak", "tokens"):
        assert heading in answer.out
    # a GPU that is not in this machine can be planned for, and what does not fit is no error
    answer = call("train", *words, "plan.gpu=0.1", "trainer=gpu")
    assert answer.code == 0, answer.err
    assert "does not fit" in answer.out
    assert not list(tmp_outputs.iterdir()), "a plan leaves nothing"


def test_an_online_page_names_the_roles(tmp_path: Path) -> None:
    run = tiny("task=ppo_lag", "init=given", "roles.reward.model=given", "roles.cost.model=given")
    page = [name.strip() for name, _ in memory_rows(run, planned(run))]
    for name in ("actor", "reference", "reward", "cost", "reward_critic", "cost_critic", "rollout", "scoring"):
        assert name in page
