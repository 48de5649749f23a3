"""Over-optimisation: the curve by hand, what noise does to it, and that measuring it leaves training as it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_runs import assert_same, curves, online, policy_folder, prepared

from saferlhf.data.toyworld import judge
from saferlhf.evaluation.overoptimisation import (
    KL,
    PROXY,
    SAFE,
    TRUTH,
    averaged,
    overoptimisation,
    overoptimisation_png,
    overoptimisation_svg,
)
from saferlhf.run.stages import fit
from saferlhf.tasks.actor_critic import ActorCriticTask
from saferlhf.tracking.mlflow_logger import build_logger


def logged(kl: Any, proxy: Any, truth: Any, safe: Any) -> dict[str, list[tuple[int, float]]]:
    """Curves as a run leaves them, rollouts from 1 on."""
    given = zip((KL, PROXY, TRUTH, SAFE), (kl, proxy, truth, safe), strict=True)
    return {name: [(step, float(y)) for step, y in enumerate(values, start=1)] for name, values in given}


# ------------------------------------------------------------------------------------------------ the curve
def test_a_curve_by_hand() -> None:
    """The proxy rises all the way; the truth turns down after the third of five rollouts."""
    found = overoptimisation(logged([0, 1, 4, 9, 16], [0, 1, 2, 3, 4], [1, 2, 3, 2.5, 1], [1, 1, 0.5, 0.5, 0]))
    assert found is not None and found.window == 1
    np.testing.assert_array_equal(found.distance(1), [0, 1, 2, 3, 4])
    np.testing.assert_allclose(found.distance(5), [6**0.5] * 5)
    assert found.peak == 2
    # differences of the truth: 1, 1, -0.5, -1.5; their spread over sqrt 2 is one rollout's, times sqrt 2 a difference's
    assert found.metrics("x") == pytest.approx(
        {
            "x/peak_rollout": 3,
            "x/peak_distance": 2,
            "x/truth_lost": 2,
            "x/truth_lost_noise": np.std([1, 1, -0.5, -1.5]),
            "x/proxy_gained": 2,
        }
    )


def test_nothing_is_lost_where_the_truth_goes_on_rising() -> None:
    found = overoptimisation(logged(range(40), range(40), np.arange(40) / 10, np.ones(40)))
    assert found is not None and found.window == 4
    metrics = found.metrics()
    assert metrics["policy/overoptimisation/truth_lost"] == 0 == metrics["policy/overoptimisation/proxy_gained"]
    assert metrics["policy/overoptimisation/truth_lost_noise"] == pytest.approx(0, abs=1e-12)


def test_the_noise_of_a_truth_that_stands_still() -> None:
    """Its size is what is simulated, and the loss that the highest of many windows fakes is of that size."""
    draw = np.random.default_rng(0)
    noises, lost = [], []
    for _ in range(200):
        found = overoptimisation(logged(range(200), range(200), draw.normal(2.0, 0.5, 200), np.ones(200)))
        assert found is not None and found.window == 20
        metrics = found.metrics("x")
        noises.append(metrics["x/truth_lost_noise"])
        lost.append(metrics["x/truth_lost"])
    assert np.mean(noises) == pytest.approx(0.5 * np.sqrt(2 / 20), rel=0.03)
    assert 0.5 < np.mean(lost) / np.mean(noises) < 2.5


def test_means_of_neighbours() -> None:
    values = np.array([1.0, 2.0, 4.0, 8.0, 16.0])
    np.testing.assert_allclose(averaged(values, 3), [7 / 3, 7 / 3, 14 / 3, 28 / 3, 28 / 3])
    np.testing.assert_allclose(averaged(values, 1), values)
    np.testing.assert_allclose(averaged(values, 5), [6.2] * 5)
    np.testing.assert_allclose(averaged(values, 2), [1.5, 3.0, 6.0, 12.0, 12.0])


def test_rollouts_that_lack_something_are_left_out() -> None:
    given = logged([-0.1, 1, 4, 9, 16], [0, np.nan, 2, 3, 4], [1, 2, 3, 2, 1], [1] * 5)
    found = overoptimisation(given)
    assert found is not None and found.steps.tolist() == [1, 3, 4, 5]
    assert found.distance(1)[0] == 0  # an estimate below zero is no distance
    given[TRUTH] = given[TRUTH][:3]
    assert overoptimisation(given) is None
    assert overoptimisation({name: given[name] for name in (KL, PROXY, SAFE)}) is None
    assert overoptimisation({}) is None


def test_pictures(tmp_path: Path) -> None:
    found = overoptimisation(logged([0, 1, 4, 9, 16], [0, 1, 2, 3, 4], [1, 2, 3, 2.5, 1], [1, 1, 0.5, 0.5, 0]))
    assert found is not None
    text = overoptimisation_svg(found)
    for words in ("reward (proxy)", "true helpfulness", "safe in truth", "distance from the reference"):
        assert words in text
    assert text == overoptimisation_svg(found) and "#0a0a0" not in text
    overoptimisation_png(tmp_path / "a.png", found)
    overoptimisation_png(tmp_path / "b.png", found)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


# ------------------------------------------------------------------------------------------------ in a run
def test_the_truth_is_logged_and_learned_from_by_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With it and without it: the same weights and the same other curves, to the last bit."""
    policy = policy_folder(tmp_path / "policy" / "sft")
    seen: list[Any] = []
    asked = ActorCriticTask._truth

    def watched(task: ActorCriticTask, rollout: Any) -> dict[str, float]:
        seen.append([judge(row.prompt, row.response) for row in rollout.requests()])
        return asked(task, rollout)

    runs = []
    for place, truth in (("with", watched), ("without", lambda task, rollout: {})):
        monkeypatch.setattr(ActorCriticTask, "_truth", truth)
        outputs = tmp_path / place
        run = prepared(online(policy, f"output_root={outputs}"))
        tracker = build_logger(
            run.config.tracking, output_root=outputs, run_folder=run.folder.path, run_name="x", identity="x"
        )
        fit(run, tracker)
        state = {name: value.clone() for name, value in run.task.roles.state_dict().items()}
        runs.append((state, curves(run.folder.path), run.folder.path.name))
    (state, found, name), (other_state, other, other_name) = runs
    assert_same(state, other_state)
    assert name == other_name  # the identity of the run is the same
    shared = {name: curve for name, curve in found.items() if not name.startswith("train/truth_")}
    assert_same(shared, other)
    # means over all responses of a rollout
    assert found.keys() - other.keys() == {f"train/truth_{x}" for x in ("helpfulness", "harmlessness", "safe_rate")}
    assert len(seen) == 4 and len(seen[0]) == 12
    for (_, helpful), (_, safe), truths in zip(found[TRUTH], found[SAFE], seen, strict=True):
        assert helpful == pytest.approx(np.mean([truth.helpfulness for truth in truths]))
        assert safe == pytest.approx(np.mean([truth.is_safe for truth in truths]))
    assert overoptimisation(found) is not None and overoptimisation(other) is None
