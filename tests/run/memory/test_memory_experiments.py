"""The large experiments: each composes by its command, and its plan says that it fits the GPU it names."""

from __future__ import annotations

import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
from command_lines import config

from saferlhf.config.paths import conf_dir
from saferlhf.errors import UserError
from saferlhf.run.memory.plan import GIB, plan_memory
from saferlhf.run.memory.policy_size import check_policy_fits

LARGE = sorted((conf_dir() / "experiment" / "large").glob("*.yaml"))


def words_of(file: Path) -> list[str]:
    """The command in the first comment, without the script."""
    comments = [line for line in file.read_text().splitlines() if line.startswith("# python")]
    return shlex.split(comments[0])[3:]


@pytest.mark.parametrize("file", LARGE, ids=lambda f: f.stem)
def test_the_plan_says_that_it_fits(file: Path) -> None:
    found = re.fullmatch(r".*_(\d+)x(\d+)", file.stem)
    assert found is not None, "named by devices x GiB"
    devices, gib = int(found.group(1)), int(found.group(2))
    run = config(*words_of(file), f"plan.gpu={gib}")
    assert run.trainer.devices == devices
    assert run.backbone.model is not None
    check_policy_fits(run, gib)
    plan = plan_memory(run)
    assert plan.fits(gib), f"{plan.highest} of {plan.peak / GIB:.1f} GiB"
    # and not by leaving something out: 8e9 float32 weights over 8 devices are 3.7 GiB, all others take more
    assert sum(role.weights for role in plan.roles) > 3.5 * GIB


def test_both_sizes_and_all_devices_are_there() -> None:
    names = {file.stem for file in LARGE}
    assert {name.rpartition("_")[2] for name in names} == {"1x24", "1x80", "8x80"}
    assert {re.search(r"_(\d+b)_", name).group(1) for name in names} == {"7b", "8b", "70b"}  # type: ignore[union-attr]


def test_70b_in_bfloat16_is_refused_online_whatever_the_devices() -> None:
    run = config(*words_of(conf_dir() / "experiment" / "large" / "ppo_lag_70b_8x80.yaml"), "quantization=none")
    spread = replace(run, trainer=replace(run.trainer, devices=8), strategy=replace(run.strategy, name="ddp"))
    with pytest.raises(UserError) as refused:
        check_policy_fits(spread, 80)
    assert "70.6e9 weights of the policy take 131 GiB in bfloat16, replicated on 8 devices" in refused.value.what
    assert "sampling needs them whole on each device of 80 GiB" in refused.value.what
    assert "quantization=nf4" in refused.value.mend
    # packed to 4 bits it is not
    check_policy_fits(replace(spread, quantization=replace(run.quantization, name="nf4")), 80)
