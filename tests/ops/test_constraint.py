"""Constraints: every rule by hand, lambda's path free of order and split, exact resume, diagnostics."""

from __future__ import annotations

import json
import math
import random
from typing import Any

import numpy as np
import pytest
import torch

from saferlhf.config import online_schema as schema
from saferlhf.errors import UserError
from saferlhf.ops.constraint import Constraint, Lagrangian, Pid, build_constraint

NAN = float("nan")
KINDS = ("none", "fixed", "lagrangian", "pid", "rectified", "upper_bound")
LEARNED = ("lagrangian", "pid", "rectified", "upper_bound")


def build(kind: str, names: tuple[str, ...] = ("cost",), **keys: Any) -> Constraint:
    return build_constraint(schema.CONSTRAINTS[kind](name=kind, **keys), names)


def rollout(seed: int, shift: float = 0.0, size: int = 48) -> list[float]:
    generator = random.Random(seed)
    return [generator.gauss(shift, 3.0) for _ in range(size)]


# ------------------------------------------------------------------------------------------------ lagrangian
@pytest.mark.parametrize("rule", ["log_gradient", "multiplicative"])
def test_the_known_step(rule: str) -> None:
    """Lambda 1, lr 0.1, excess 2 -> e^0.2 = 1.2214."""
    constraint = build("lagrangian", rule=rule)
    found = constraint.update({"cost": torch.tensor([1.0, 3.0])})
    assert constraint.lambdas["cost"] == found["cost/lambda"] == pytest.approx(1.2214, abs=5e-5)
    assert constraint.lambdas["cost"] == math.exp(0.2)
    assert found["cost/mean_cost"] == found["cost/gap"] == 2.0


def test_the_second_step_tells_the_rules_apart() -> None:
    paper, plain = build("lagrangian"), build("lagrangian", rule="multiplicative")
    for constraint in (paper, plain):
        for _ in range(2):
            constraint.update({"cost": [2.0]})
    assert paper.lambdas["cost"] == pytest.approx(math.exp(0.2 + 0.1 * math.exp(0.2) * 2))
    assert plain.lambdas["cost"] == pytest.approx(math.exp(0.4))


def test_log_gradient_is_the_gradient_of_the_reference_loss() -> None:
    """One step of SGD on -(cost - threshold) e^eta, as autograd has it."""
    eta = torch.tensor(math.log(1.7), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([eta], lr=0.03)
    (-(0.9 - 0.25) * eta.exp()).backward()
    optimizer.step()
    constraint = build("lagrangian", lambda_init=1.7, lambda_lr=0.03, threshold=0.25)
    constraint.update({"cost": [0.4, 1.4]})
    assert constraint.lambdas["cost"] == pytest.approx(eta.exp().item(), rel=1e-14)


def test_lambda_rises_above_the_threshold_falls_below_and_rests_on_it() -> None:
    constraint = build("lagrangian", threshold=-1.0)
    constraint.update({"cost": [-0.5]})
    high = constraint.lambdas["cost"]
    assert high > 1.0
    constraint.update({"cost": [-1.0]})
    assert constraint.lambdas["cost"] == high
    constraint.update({"cost": [-2.0]})
    assert constraint.lambdas["cost"] < high


def test_bounds_hold_both_ways_and_lambda_comes_back() -> None:
    constraint = build("lagrangian", lambda_min=0.2, lambda_max=4.0, lambda_lr=1.0)
    for cost, bound, side in ((1e300, 4.0, 1.0), (-1e300, 0.2, -1.0)):
        found = constraint.update({"cost": [cost]})
        assert constraint.lambdas["cost"] == bound
        assert found["cost/at_bound"] == side
    assert found["cost/saturation"] == 1.0
    constraint.update({"cost": [1.0]})
    assert 0.2 < constraint.lambdas["cost"] < 4.0


def test_largest_step() -> None:
    constraint = build("lagrangian", max_step=0.05)
    constraint.update({"cost": [100.0]})
    assert constraint.lambdas["cost"] == math.exp(0.05)
    constraint.update({"cost": [-100.0]})
    assert constraint.lambdas["cost"] == pytest.approx(1.0)


@pytest.mark.parametrize("kind", LEARNED)
def test_delay_counts_rollouts(kind: str) -> None:
    constraint = build(kind, delay=2)
    moved = []
    for _ in range(3):
        constraint.update({"cost": [5.0, 6.0]})
        moved.append(constraint.lambdas["cost"] != 1.0)
    assert moved == [False, False, True]


def test_window_pools_responses_of_the_last_rollouts() -> None:
    constraint = build("lagrangian", window=2, rule="multiplicative")
    gaps = [constraint.update({"cost": costs})["cost/gap"] for costs in ([6.0], [0.0, 0.0, 0.0], [1.0])]
    # one response counts one, however many its rollout had: 6; 6/4; 1/4
    assert gaps == [6.0, 1.5, 0.25]


# ------------------------------------------------------------------------------------------------ pid
def test_pid_hand_worked() -> None:
    constraint = build("pid", proportional=0.5, integral=0.1, derivative=0.2, smoothing=0.5, lambda_init=1.0)
    # the sum starts at 10, so that ki alone gives lambda 1
    constraint.update({"cost": [2.0]})  # P 2, I 12, D 0
    assert constraint.lambdas["cost"] == pytest.approx(1.0 + 1.2)
    constraint.update({"cost": [4.0]})  # P 3, I 16, D 1
    assert constraint.lambdas["cost"] == pytest.approx(1.5 + 1.6 + 0.2)
    constraint.update({"cost": [-5.0]})  # P -1, I 11, D 0 (falls)
    assert constraint.lambdas["cost"] == pytest.approx(-0.5 + 1.1)


def test_pid_does_not_wind_up() -> None:
    constraint = build("pid", proportional=0.0, derivative=0.0, integral=0.1, lambda_max=2.0)
    for _ in range(100):
        constraint.update({"cost": [10.0]})
    assert constraint.lambdas["cost"] == 2.0
    constraint.update({"cost": [-5.0]})  # it answers at once: I is 20, not 1000
    assert constraint.lambdas["cost"] == pytest.approx(1.5)
    for _ in range(100):
        constraint.update({"cost": [-10.0]})
    assert constraint.lambdas["cost"] == 0.0
    constraint.update({"cost": [5.0]})
    assert constraint.lambdas["cost"] == pytest.approx(0.5)


def test_pid_damps_what_ascent_lets_swing() -> None:
    """A policy whose cost answers late to lambda: integral control overshoots, the other terms hold it back."""

    def swing(**gains: float) -> float:
        constraint = build("pid", smoothing=0.0, lambda_init=0.1, lambda_max=50.0, **gains)
        cost, speed, path = 3.0, 0.0, []
        for _ in range(200):
            constraint.update({"cost": [cost]})
            speed = 0.9 * speed + 0.1 * (3.0 - constraint.lambdas["cost"] - cost)
            cost += 0.5 * speed
            path.append(cost)
        return max(abs(cost) for cost in path[100:])

    plain, controlled = (
        swing(proportional=0.0, integral=0.1, derivative=0.0),
        swing(proportional=0.8, integral=0.1, derivative=2.0),
    )
    assert controlled < 0.2 * plain


# ------------------------------------------------------------------------------------------------ rectified
def test_rectified_hand_worked() -> None:
    # prompts 1 (mean 2), 2 (mean -6), 3 (mean 0): positive parts above 0.5: 1.5, 0, 0 -> 0.5; slack 0.2
    constraint = build("rectified", threshold=0.5, slack=0.2, lambda_lr=1.0)
    costs, groups = torch.tensor([1.0, -6.0, 3.0, 0.0, NAN]), torch.tensor([1, 2, 1, 3, 3])
    found = constraint.update({"cost": costs}, groups)
    assert found["cost/gap"] == pytest.approx(0.3)
    assert found["cost/mean_cost"] == -0.5  # the plain mean sees nothing wrong
    assert found["cost/violating_prompts"] == pytest.approx(1 / 3)
    assert found["cost/unscored"] == 1.0
    assert constraint.lambdas["cost"] == pytest.approx(math.exp(0.3))
    assert constraint.applies({"cost": costs}, groups)["cost"].tolist() == [1.0, 0.0, 1.0, 0.0, 0.0]


def test_rectified_presses_on_violated_prompts_alone() -> None:
    constraint = build("rectified", lambda_init=3.0)
    costs = {"cost": torch.tensor([2.0, -2.0])}
    applies = constraint.applies(costs)
    rewards, advantages = torch.full((2, 3), 8.0), {"cost": torch.full((2, 3), 4.0)}
    combined = constraint.combine(rewards, advantages, applies=applies)
    assert combined.tolist() == [[-1.0] * 3, [8.0] * 3]  # (8 - 3 * 4) / 4; the reward as it is
    with pytest.raises(ValueError, match="applies"):
        constraint.combine(rewards, advantages)


def test_safe_prompts_cannot_make_up_for_unsafe_ones() -> None:
    rectified, plain = build("rectified"), build("lagrangian")
    for constraint in (rectified, plain):
        constraint.update({"cost": [5.0, -50.0]})
    assert rectified.lambdas["cost"] > 1.0 > plain.lambdas["cost"]


# ------------------------------------------------------------------------------------------------ upper bound
def test_upper_bound_hand_worked() -> None:
    # prompt means 1, 3: mean 2, deviation sqrt 2; t_{0.95, 24} = 1.7109, 25 test prompts
    constraint = build("upper_bound", test_prompts=25, inflation=2.0, threshold=1.0)
    found = constraint.update({"cost": [0.0, 3.0, 2.0]}, ["a", "b", "a"])
    assert found["cost/gap"] == pytest.approx(2.0 + 2.0 * math.sqrt(2.0) / 5 * 1.71088 - 1.0, abs=1e-4)


def test_upper_bound_of_one_prompt_says_nothing() -> None:
    constraint = build("upper_bound")
    found = constraint.update({"cost": [3.0, 4.0]}, [7, 7])
    assert constraint.lambdas["cost"] == 1.0
    assert found["cost/mean_cost"] == 3.5 and "cost/gap" not in found


# ------------------------------------------------------------------------------------------------ none, fixed
def test_none_changes_nothing_and_reports() -> None:
    constraint = build("none", names=("a", "b"), threshold={"a": 1.0, "b": 0.0})
    rewards = torch.randn(2, 3)
    assert constraint.combine(rewards, {}) is rewards
    assert constraint.shape_scores(rewards[:, 0], {}).equal(rewards[:, 0])
    found = constraint.update({"a": [3.0], "b": [NAN]})
    assert found["a/gap"] == 2.0
    assert found["b/unscored"] == 1.0 and "b/mean_cost" not in found
    assert constraint.lambdas == {"a": 0.0, "b": 0.0}
    assert build("none", names=()).update({}) == {}


def test_fixed_shapes_the_score_and_leaves_advantages_alone() -> None:
    constraint = build("fixed", names=("a", "b"), weight={"a": 2.0, "b": 0.5})
    shaped = constraint.shape_scores(
        torch.tensor([1.0, 1.0]), {"a": torch.tensor([3.0, -1.0]), "b": torch.tensor([4.0, 0.0])}
    )
    assert shaped.tolist() == [1 - 6 - 2, 1 + 2]
    rewards = torch.randn(2, 3)
    assert constraint.combine(rewards, {}) is rewards
    constraint.update({"a": [9.0], "b": [9.0]})
    assert constraint.lambdas == {"a": 2.0, "b": 0.5}


@pytest.mark.parametrize(
    ("kind", "acts_on"), [("none", "nothing"), ("fixed", "scores"), *((kind, "advantages") for kind in LEARNED)]
)
def test_every_kind_says_where_it_acts(kind: str, acts_on: str) -> None:
    constraint = build(kind)
    assert (constraint.kind, constraint.acts_on) == (kind, acts_on)


# ------------------------------------------------------------------------------------------------ several costs
def test_several_costs_have_each_their_own_multiplier() -> None:
    constraint = build(
        "lagrangian",
        names=("violence", "privacy"),
        threshold={"violence": 0.0, "privacy": 1.0},
        lambda_init={"violence": 1.0, "privacy": 2.0},
        lambda_lr=0.1,
    )
    combined = constraint.combine(
        torch.tensor([[8.0]]), {"violence": torch.tensor([[4.0]]), "privacy": torch.tensor([[-2.0]])}
    )
    assert combined.item() == (8 - 1 * 4 + 2 * 2) / (1 + 1 + 2)
    constraint.update({"privacy": [1.0], "violence": [2.0]})
    assert constraint.lambdas == {"violence": math.exp(0.2), "privacy": 2.0}


def test_a_cost_without_scores_leaves_its_multiplier_alone() -> None:
    constraint = build("lagrangian", names=("a", "b"))
    found = constraint.update({"a": [NAN, NAN], "b": [1.0, NAN]})
    assert constraint.lambdas["a"] == 1.0 < constraint.lambdas["b"] == math.exp(0.1)
    assert (found["a/unscored"], found["b/unscored"]) == (2.0, 1.0)
    assert all(math.isfinite(value) for value in found.values())


def test_combined_advantage_keeps_its_dtype() -> None:
    constraint = build("lagrangian", lambda_init=1.3)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        rewards = torch.ones(2, 3, dtype=dtype)
        assert constraint.combine(rewards, {"cost": rewards}).dtype == dtype


# ------------------------------------------------------------------------------------------------ order and split
def gathered(costs: list[float], processes: int, micro_batch: int) -> list[int]:
    """The order in which a rollout's rows arrive from processes that hold every n-th row and work in micro-batches."""
    order = []
    for rank in range(processes):
        mine = list(range(rank, len(costs), processes))
        for start in range(0, len(mine), micro_batch):
            order += mine[start : start + micro_batch][::-1]  # and finished in any order
    return order


@pytest.mark.parametrize("kind", LEARNED)
def test_path_does_not_depend_on_micro_batches_or_processes(kind: str) -> None:
    """Bit for bit: a function of the costs of each rollout alone."""
    keys: dict[str, Any] = {"window": 3, "lambda_max": 1e6}
    if kind != "pid":
        keys |= {"lambda_lr": 0.02, "lambda_min": 1e-6}
    if kind == "rectified":
        keys |= {"slack": 0.3}
    paths = []
    for processes, micro_batch in ((1, 48), (1, 1), (1, 7), (2, 4), (3, 5), (8, 2)):
        constraint = build(kind, **keys)
        path = []
        for number in range(12):
            # costs of very different size, where plain sums would round differently
            costs = [cost * 10.0 ** -(row % 7) for row, cost in enumerate(rollout(number, shift=0.4))]
            groups = [row // 4 for row in range(48)]
            order = gathered(costs, processes, micro_batch)
            assert sorted(order) == list(range(48))
            constraint.update({"cost": [costs[row] for row in order]}, [groups[row] for row in order])
            path.append(constraint.lambdas["cost"])
        paths.append(path)
    assert all(path == paths[0] for path in paths)
    assert len(set(paths[0])) == 12, "lambda must move for the test to mean anything"


def test_lists_arrays_and_tensors_are_the_same() -> None:
    costs, groups = rollout(0), [row // 3 for row in range(48)]
    found = []
    for convert in (list, np.array, torch.tensor):
        constraint = build("rectified")
        numbers = convert(costs) if convert is not torch.tensor else torch.tensor(costs, dtype=torch.float64)
        found.append(constraint.update({"cost": numbers}, convert(groups)))
    assert found[0] == found[1] == found[2]


def test_one_update_per_rollout_whatever_its_size() -> None:
    small, large = build("lagrangian"), build("lagrangian")
    small.update({"cost": [0.5, 1.5]})
    large.update({"cost": [0.5, 1.5] * 500})
    assert small.lambdas == large.lambdas


# ------------------------------------------------------------------------------------------------ diagnostics
def test_oscillation_counts_changes_of_sign() -> None:
    steady, swinging = build("lagrangian", history=5), build("lagrangian", history=5)
    for number in range(9):
        calm = steady.update({"cost": [1.0]})
        wild = swinging.update({"cost": [(-1.0) ** number]})
    assert (calm["cost/oscillation"], wild["cost/oscillation"]) == (0.0, 1.0)
    for _ in range(5):  # an old swing is forgotten
        wild = swinging.update({"cost": [-1.0]})
    assert wild["cost/oscillation"] == 0.0


def test_saturation_and_swing_look_back_on_the_history() -> None:
    constraint = build("lagrangian", lambda_max=1.5, lambda_lr=1.0, history=4)
    for cost in (1.0, 1.0, 0.0, -0.1):
        found = constraint.update({"cost": [cost]})
    assert found["cost/saturation"] == 0.75
    assert found["cost/at_bound"] == 0.0
    assert found["cost/swing"] == pytest.approx(1.5 - 1.5 * math.exp(-0.15))


@pytest.mark.parametrize("kind", ["lagrangian", "pid"])
def test_a_closed_loop_rises_then_falls_and_holds_the_constraint(kind: str) -> None:
    """A policy whose cost follows lambda's share of the advantage with a lag: it comes to rest at the threshold."""
    constraint, cost, path, found = build(kind), 3.0, [], {}
    for _ in range(300):
        found = constraint.update({"cost": [cost - 0.5, cost + 0.5]})
        share = constraint.lambdas["cost"] / (1 + constraint.lambdas["cost"])
        cost += 0.2 * (3.0 - 8.0 * share - cost)
        path.append(constraint.lambdas["cost"])
    assert abs(cost) < 0.02
    assert path[-1] == pytest.approx(0.6, abs=0.02)  # where the share is 3/8
    assert path[0] > 1.0 and max(path) > 1.3 > path[-1]
    assert found["cost/saturation"] == 0.0


# ------------------------------------------------------------------------------------------------ checkpoint
@pytest.mark.parametrize("kind", KINDS)
def test_resumed_through_json_the_path_is_the_same_bit_for_bit(kind: str) -> None:
    keys: dict[str, Any] = {"window": 3, "delay": 1} if kind in LEARNED else {}
    names, groups = ("a", "b"), [row // 4 for row in range(48)]
    whole, first = build(kind, names, **keys), build(kind, names, **keys)
    for number in range(5):
        costs = {"a": rollout(number, 0.3), "b": rollout(100 + number, -0.2)}
        whole.update(costs, groups)
        first.update(costs, groups)
    second = build(kind, names, **keys)
    second.load_state_dict(json.loads(json.dumps(first.state_dict(), allow_nan=False)))
    for number in range(5, 9):
        costs = {"a": rollout(number), "b": rollout(100 + number)}
        assert whole.update(costs, groups) == second.update(costs, groups)
    assert whole.state_dict() == second.state_dict()


def test_a_state_is_a_snapshot() -> None:
    constraint = build("lagrangian")
    constraint.update({"cost": [1.0]})
    state = constraint.state_dict()
    kept = json.dumps(state)
    constraint.update({"cost": [2.0]})
    assert json.dumps(state) == kept


def test_a_state_of_another_constraint_is_refused() -> None:
    state = build("lagrangian").state_dict()
    with pytest.raises(UserError, match="was 'lagrangian' and is 'pid'"):
        build("pid").load_state_dict(state)
    with pytest.raises(UserError, match="its costs were cost and are a, b"):
        build("lagrangian", ("a", "b")).load_state_dict(state)


# ------------------------------------------------------------------------------------------------ wrong input
@pytest.mark.parametrize(
    ("kind", "names", "keys", "message"),
    [
        ("lagrangian", (), {}, "there is no cost to constrain"),
        ("fixed", ("a", "a"), {}, "no distinct names"),
        ("lagrangian", ("a", "b"), {"threshold": {"a": 0.0}}, "cost 'b' has no value"),
        ("none", ("a",), {"threshold": {"a": 0.0, "c": 1.0}}, "there is no cost 'c'"),
        ("lagrangian", ("a",), {"threshold": "zero"}, "'zero' is not a number"),
        ("lagrangian", ("a",), {"lambda_lr": True}, "True is not a number"),
        ("lagrangian", ("a",), {"lambda_init": 9.0}, "starts at 9, bounds 0.1 to 5"),
        ("lagrangian", ("a",), {"lambda_min": 0.0}, "no lower bound"),
        ("pid", ("a",), {"lambda_min": -1.0}, "no lower bound"),
        ("rectified", ("a",), {"slack": {"b": 1.0}}, "there is no cost 'b'"),
    ],
)
def test_what_cannot_be_built(kind: str, names: tuple[str, ...], keys: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build(kind, names, **keys)


def test_unknown_kind() -> None:
    with pytest.raises(UserError, match="choose one of: none"):
        build_constraint(schema.ConstraintConfig(name="penalty"), ["cost"])


@pytest.mark.parametrize(
    ("costs", "groups", "message"),
    [
        ({"other": [1.0]}, None, "are constrained"),
        ({"cost": [math.inf]}, None, "infinite"),
        ({"cost": [[1.0]]}, None, "one number per response"),
        ({"cost": [1.0, 2.0]}, [0], "1 prompts are named for 2"),
    ],
)
def test_wrong_costs_are_refused(costs: dict[str, Any], groups: list[int] | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build("rectified").update(costs, groups)


def test_types_of_what_is_built() -> None:
    assert type(build("lagrangian")) is Lagrangian
    assert type(build("pid")) is Pid
