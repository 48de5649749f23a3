"""A pipeline's policies beside each other, from folders made by hand; the pipelines that compare policies."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from command_lines import composed, config

from saferlhf.config.files import write_json
from saferlhf.config.run_folder import RunFolder
from saferlhf.config.schema import CompareConfig, TrainConfig
from saferlhf.config.validate import pipeline_config
from saferlhf.data.rows import as_prompt
from saferlhf.errors import UserError
from saferlhf.evaluation.arena_of_answers import policy_arena
from saferlhf.evaluation.policy_answers import Judged, PolicyAnswers, PromptSet
from saferlhf.evaluation.policy_metrics import policy_metrics
from saferlhf.evaluation.policy_plots import thresholds_of
from saferlhf.evaluation.policy_samples import sample_lines
from saferlhf.pipeline import runner
from saferlhf.pipeline.compare import ARENA, check_compare, compare, slug
from saferlhf.pipeline.stages import Stages

COUNT = 24
BOOTSTRAP: dict[str, Any] = {"draws": 500, "confidence": 0.95}
PROMPTS = PromptSet(
    tuple(f"row{i}" for i in range(COUNT)),
    tuple(as_prompt(f"prompt {i}") for i in range(COUNT)),
    (np.arange(COUNT) % 2).astype(np.float64),
)


def answers(safe: int, helpful: float) -> PolicyAnswers:
    """The first `safe` responses are safe; how helpful they are differs by prompt, by 0.5 at most."""
    flags = (np.arange(COUNT) < safe).astype(np.float64)[:, None]
    grades = helpful + (np.arange(COUNT) % 3 - 1.0)[:, None] / 2
    judged = {"truth": Judged({"is_safe": flags, "helpfulness": grades, "harmlessness": 2 * flags})}
    texts = tuple(("a b",) for _ in range(COUNT))
    return PolicyAnswers(texts, np.full((COUNT, 1), 3), np.zeros((COUNT, 1), dtype=bool), judged=judged)


SFT = answers(6, 1.0)
POLICIES = {"ppo": answers(6, 3.0), "half": answers(12, 2.6), "strict": answers(18, 1.0), "ppo_lag": answers(12, 2.9)}


def folder_of(
    path: Path, policy: PolicyAnswers, lambdas: list[float], prompts: PromptSet = PROMPTS, name: str = "policy"
) -> Path:
    """What a finished run of online training leaves, as far as a comparison looks at it."""
    path.mkdir(parents=True)
    metrics = policy_metrics(prompts, policy, SFT, draws=50)
    (path / "metrics.json").write_text(json.dumps(metrics))
    lines = sample_lines(prompts, {name: policy, "baseline": SFT})
    (path / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    curve = [{"step": step, "train/lambda": value, "train/mean_cost": 0.5} for step, value in enumerate(lambdas)]
    (path / "curves.jsonl").write_text("".join(json.dumps(point) + "\n" for point in curve))
    return path


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    """Stage -> run; only the multiplier of ppo_lag moves."""
    lambdas = {"ppo_lag": [1.0, 1.5, 0.75]}
    return {
        stage: folder_of(tmp_path / "runs" / stage, policy, lambdas.get(stage, [1.0, 1.0, 1.0]))
        for stage, policy in POLICIES.items()
    }


FULL = CompareConfig(
    policies={"PPO": "ppo", "nu .5": "half", "nu 2": "strict", "dual": "ppo_lag"},
    baseline="SFT",
    differences=["dual - PPO", "dual - nu .5"],
    fixed=["PPO", "nu .5", "nu 2"],
    learned=["dual"],
)


# ------------------------------------------------------------------------------------------------ comparing
def test_tables_numbers_and_pictures(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "pipeline"
    found = compare(FULL, folders, out, **BOOTSTRAP)
    # the front goes from PPO (1/4 safe, 3.0) by nu .5 (1/2, 2.6) to nu 2 (3/4, 1.0); dual is as safe as nu .5
    assert found["dual/over_front"] == pytest.approx(0.3)
    assert found["dual/over_front_low"] <= 0.3 <= found["dual/over_front_high"]
    assert found["dual_over_ppo/difference/mean_helpfulness"] == pytest.approx(-0.1)
    assert found["dual_over_ppo/difference/safe_rate"] == pytest.approx(0.25)
    # 6 of 24 responses became safe, all others are as before: wins, and ties that count one half
    assert found["dual_over_ppo/harmless_win_rate"] == pytest.approx((6 + 18 / 2) / 24)
    assert found["dual_over_ppo/helpful_win_rate"] == 0.0
    assert found["dual_over_nu_.5/helpful_win_rate"] == 1.0
    assert {name.partition("/")[0] for name in found} == {"dual", "dual_over_ppo", "dual_over_nu_.5", "arena"}

    text = (out / "comparison.md").read_text()
    lines = text.splitlines()
    assert lines[0] == "**policies on held-out prompts**"
    assert "|  | SFT | PPO | nu .5 | nu 2 | dual |" in lines
    (safe,) = [line for line in lines if line.startswith("| safe responses |") and line.count("|") == 7]
    assert [cell.split("%")[0].strip() for cell in safe.split("|")[2:-1]] == ["25.0", "25.0", "50.0", "75.0", "50.0"]
    assert "**paired differences, prompt by prompt**" in lines
    assert "|  | dual - PPO | dual - nu .5 |" in lines
    (gap,) = [line for line in lines if line.startswith("| helpfulness |") and line.count("|") == 4]
    assert "| -0.10 [-0.10, -0.10] | +0.30 [+0.30, +0.30] |" in gap
    assert lines[-1].startswith("dual stands +0.30 [")
    assert lines[-1].endswith("in helpfulness above the front of fixed weights at its safe rate")
    for name in ("policies.png", "constraint.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    # the screen shows the same
    said = capsys.readouterr().out
    assert "policies on held-out prompts" in said and "dual - nu .5" in said and "dual stands +0.30 [" in said


def test_more_policies_than_the_screen_has_room_for(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The screen shows them below each other, with nothing cut off; the file has them all in one table."""
    heads = [f"policy {letter}" for letter in "ABCDEFGHI"]
    pairs = [f"{head} - policy A" for head in heads[1:]]
    config = CompareConfig(policies=dict.fromkeys(heads, "ppo"), baseline="SFT", differences=pairs)
    compare(config, folders, tmp_path / "out", **BOOTSTRAP)
    said = capsys.readouterr().out
    lines = said.splitlines()
    assert "…" not in said and max(map(len, lines)) <= 120
    lines = lines[: next(place for place, line in enumerate(lines) if line.startswith("arena,"))]
    tops = [line for line in lines if line.split()[:1] == ["SFT"]]
    assert len(tops) > 1 and " ".join(" ".join(line.split()[1:]) for line in tops) == " ".join(heads)
    for number, pair in enumerate(pairs):
        assert sum(pair in line for line in lines) == 1, number
    assert sum(line.split()[:2] == ["safe", "responses"] for line in lines) >= len(tops) + 2
    text = (tmp_path / "out" / "comparison.md").read_text()
    assert f"|  | SFT | {' | '.join(heads)} |" in text
    assert f"|  | {' | '.join(pairs)} |" in text


def test_the_constraint_is_drawn_for_multipliers_that_moved(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from saferlhf.evaluation import policy_plots

    drawn: list[Any] = []
    for stage, level in (("ppo", 7.0), ("ppo_lag", -1.0)):
        (folders[stage] / "config.yaml").write_text(f"constraint: {{threshold: {level}}}\n")
    monkeypatch.setattr(policy_plots, "constraint_png", lambda path, curves, levels: drawn.append((curves, levels)))
    compare(CompareConfig(policies=FULL.policies), folders, tmp_path / "out", **BOOTSTRAP)
    assert drawn == [
        (
            {
                "dual/lambda": [(0, 1.0), (1, 1.5), (2, 0.75)],
                "dual/mean_cost": [(0, 0.5), (1, 0.5), (2, 0.5)],
            },
            [-1.0],
        )
    ]


@pytest.mark.parametrize(
    ("text", "levels"),
    [("constraint: {threshold: {a: 1, b: -2}}", [1.0, -2.0]), ("constraint: null", []), ("seed: 1", []), (None, [])],
)
def test_thresholds_of_a_run(tmp_path: Path, text: str | None, levels: list[float]) -> None:
    if text is not None:
        (tmp_path / "config.yaml").write_text(text)
    assert thresholds_of(tmp_path) == levels


def test_no_picture_of_a_constraint_that_does_not_move(folders: dict[str, Path], tmp_path: Path) -> None:
    compare(CompareConfig(policies={"PPO": "ppo"}), folders, tmp_path / "out", **BOOTSTRAP)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "comparison.md",
        "comparison.txt",
        "policies.png",
    }  # nor an arena of one


def test_stages_that_are_not_there_are_left_out(folders: dict[str, Path], tmp_path: Path) -> None:
    some = {stage: folders[stage] for stage in ("ppo", "ppo_lag")}
    found = compare(FULL, some, tmp_path / "some", **BOOTSTRAP)
    assert {name.partition("/")[0] for name in found} == {"dual", "dual_over_ppo", "arena"}
    # a front of one point: PPO is 3.0 high and less safe, and dual 2.9
    assert found["dual/over_front"] == pytest.approx(-0.1)
    assert "|  | SFT | PPO | dual |" in (tmp_path / "some" / "comparison.md").read_text()
    # no policy with a fixed weight, no front
    config = CompareConfig(policies=FULL.policies, fixed=["nu .5"], learned=["dual"])
    found = compare(config, some, tmp_path / "none", **BOOTSTRAP)
    assert found and all(name.startswith("arena/") for name in found)
    assert "stands" not in (tmp_path / "none" / "comparison.md").read_text()


def test_nothing_to_compare(folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert compare(FULL, {"sft": folders["ppo"]}, tmp_path / "out", **BOOTSTRAP) == {}
    assert compare(CompareConfig(), folders, tmp_path / "out", **BOOTSTRAP) == {}
    assert not (tmp_path / "out").exists()
    assert capsys.readouterr().out == ""


def test_without_differences_no_samples_are_needed(folders: dict[str, Path], tmp_path: Path) -> None:
    (folders["ppo"] / "samples.jsonl").unlink()
    config = CompareConfig(policies=FULL.policies, differences=["dual - nu .5"])
    assert "dual_over_nu_.5/helpful_win_rate" in compare(config, folders, tmp_path / "out", **BOOTSTRAP)
    with pytest.raises(UserError, match="no samples can be read"):
        compare(FULL, folders, tmp_path / "out", **BOOTSTRAP)


def test_policies_that_answered_different_prompts(folders: dict[str, Path], tmp_path: Path) -> None:
    others = PromptSet(tuple(f"other{i}" for i in range(COUNT)), PROMPTS.prompts, PROMPTS.harmful)
    folders["ppo"] = folder_of(tmp_path / "elsewhere", POLICIES["ppo"], [], others)
    with pytest.raises(UserError, match="dual and PPO answered different prompts") as caught:
        compare(FULL, folders, tmp_path / "out", **BOOTSTRAP)
    assert "\n" not in str(caught.value)


def test_samples_of_something_else(folders: dict[str, Path], tmp_path: Path) -> None:
    folders["ppo"] = folder_of(tmp_path / "sft", POLICIES["ppo"], [], name="demonstrations")
    with pytest.raises(UserError, match="samples are of demonstrations, baseline, not of a policy") as caught:
        compare(FULL, folders, tmp_path / "out", **BOOTSTRAP)
    assert caught.value.where == str(folders["ppo"] / "samples.jsonl")


@pytest.mark.parametrize(
    ("heading", "name"),
    [
        ("PPO-Lagrangian", "ppo-lagrangian"),
        ("reward shaping, nu 1", "reward_shaping_nu_1"),
        ("nu .25", "nu_.25"),
        ("  a/b  (c)", "a_b_c"),
    ],
)
def test_headings_in_names(heading: str, name: str) -> None:
    assert slug(heading) == name


# ------------------------------------------------------------------------------------------------ the arena
def test_all_policies_and_their_baseline_in_the_arena(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    found = compare(CompareConfig(policies=FULL.policies, baseline="SFT"), folders, out, **BOOTSTRAP)
    own = json.loads((folders["strict"] / "metrics.json").read_text())
    # the same games as in each run's own evaluation against its baseline
    assert found["arena/harmless/nu_2_over_sft_win_rate"] == own["policy/harmless_win_rate"] == 0.75
    assert found["arena/helpful/nu_.5_over_dual_win_rate"] == 0.0
    assert found["arena/helpful/sft_elo"] == 0.0
    assert found["arena/harmless/nu_2_elo"] > found["arena/harmless/dual_elo"] > 0
    # every second prompt is harmful; the first 12 of 24 responses of nu .5 are safe, nobody judged refusals
    assert found["arena/safety/nu_.5_attack_success"] == 0.5 and "arena/safety/nu_.5_over_refusal" not in found
    # 5 policies are 10 pairs, with a p-value each; 0.02 is ten times 1 / 501
    adjusted = [name for name in found if name.startswith("arena/helpful/") and name.endswith("_p_holm")]
    assert len(adjusted) == 10 and found["arena/helpful/ppo_over_sft_p_holm"] == pytest.approx(10 / 501)
    said, text = capsys.readouterr().out, (out / "comparison.md").read_text()
    for heading in (
        "arena, helpful by truth: Elo over 24 prompts",
        "arena, harmless by truth: Elo over 24 prompts",
        "arena, the two ways to fail",
    ):
        assert heading in said and f"**{heading}**" in text
    # there is no plane without refusals
    drawn = {name for name in ARENA if (out / name).is_file()}
    assert drawn == set(ARENA) - {"safety.png"}


def test_who_has_no_place_in_the_arena(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A policy without samples, or of other prompts; a baseline that is another one in another run."""
    others = PromptSet(tuple(f"other{i}" for i in range(COUNT)), PROMPTS.prompts, PROMPTS.harmful)
    folders["strict"] = folder_of(tmp_path / "elsewhere", POLICIES["strict"], [], others)
    (folders["half"] / "samples.jsonl").unlink()
    config = CompareConfig(policies=FULL.policies, baseline="SFT")
    found = compare(config, folders, tmp_path / "out", **BOOTSTRAP)
    names = {name for name in found if name.endswith("_elo")}
    assert names == {f"arena/{of}/{name}_elo" for of in ("helpful", "harmless") for name in ("sft", "ppo", "dual")}
    assert "the arena is without nu 2: it answered other prompts than PPO" in capsys.readouterr().out
    # dual began as another policy than PPO
    lines = (folders["ppo_lag"] / "samples.jsonl").read_text().splitlines()
    changed = [json.loads(line) for line in lines]
    for line in changed:
        line["response"] = "c d" if line["policy"] == "baseline" else line["response"]
    (folders["ppo_lag"] / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in changed))
    found = compare(config, folders, tmp_path / "apart", **BOOTSTRAP)
    assert {name for name in found if name.endswith("_elo")} == {name for name in names if "/sft" not in name}
    assert "the arena is without SFT: not all policies began as the same" in capsys.readouterr().out


def test_the_first_judge_of_all_counts(tmp_path: Path) -> None:
    """A judge of one policy alone grades nobody; a cost is better where it is lower."""

    def judged(**by: dict[str, float]) -> PolicyAnswers:
        said = {name: Judged({o: np.full((COUNT, 1), v) for o, v in out.items()}) for name, out in by.items()}
        return replace(SFT, judged=said)

    policies = {
        "a": judged(own={"helpfulness": 9.0}, rewards={"reward": 1.0}, costs={"cost": -2.0}),
        "b": judged(rewards={"reward": 2.0}, costs={"cost": 3.0}),
    }
    found = policy_arena(PROMPTS, policies, draws=50)
    assert found is not None
    assert found.judges == {"helpful": "rewards", "harmless": "costs"}
    metrics = found.metrics("x")
    assert metrics["x/helpful/a_over_b_win_rate"] == 0.0 and metrics["x/harmless/a_over_b_win_rate"] == 1.0
    assert (metrics["x/safety/a_attack_success"], metrics["x/safety/b_attack_success"]) == (0.0, 1.0)
    assert policy_arena(PROMPTS, {"a": policies["a"]}) is None
    assert policy_arena(PROMPTS, {"a b": policies["a"], "A b": policies["b"]}) is None
    nobody = {"a": judged(own={"helpfulness": 9.0}), "b": judged(rewards={"reward": 1.0})}
    assert policy_arena(PROMPTS, nobody) is None
    unscored = {"a": judged(own={"reward": np.nan}), "b": judged(own={"reward": 1.0})}
    assert policy_arena(PROMPTS, unscored) is None


# ------------------------------------------------------------------------------------------------ refusals
@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"policies": {"PPO": "pp"}},
            "unknown stage 'pp' (in pipeline.compare.policies.PPO); did you mean 'ppo'?",
        ),
        ({"fixed": ["PP0"]}, "unknown policy 'PP0' (in pipeline.compare.fixed); did you mean 'PPO'?"),
        ({"learned": ["dul"]}, "unknown policy 'dul' (in pipeline.compare.learned); did you mean 'dual'?"),
        (
            {"differences": ["dual - PPO", "dual - PPO - PPO"]},
            "'dual - PPO - PPO' is no difference (in pipeline.compare.differences[1]);"
            " two policies with ' - ' between them",
        ),
        ({"differences": ["dual-PPO"]}, "'dual-PPO' is no difference (in pipeline.compare.differences[0])"),
        (
            {"differences": ["dual - ppo"]},
            "unknown policy 'ppo' (in pipeline.compare.differences[0]); known: PPO, dual",
        ),
        ({"differences": [" - dual"]}, "unknown policy ''"),
        (
            {"policies": {"PPO": "ppo", "dual": "ppo_lag", "Dual": "ppo"}},
            "'dual' and 'Dual' would have the same names in metrics (in pipeline.compare.policies)",
        ),
    ],
)
def test_names_that_are_none(changes: dict[str, Any], says: str) -> None:
    good: dict[str, Any] = {"policies": {"PPO": "ppo", "dual": "ppo_lag"}, "differences": ["dual - PPO"]}
    check_compare(CompareConfig(**good), ["ppo", "ppo_lag"])
    with pytest.raises(UserError) as caught:
        check_compare(CompareConfig(**{**good, **changes}), ["ppo", "ppo_lag"])
    assert str(caught.value).startswith(says)
    assert "\n" not in str(caught.value)


def test_a_wrong_comparison_is_refused_before_any_stage_is_composed() -> None:
    config = pipeline_config(composed("pipeline=quickstart").pipeline)
    config.compare.policies["PPO"] = "pop"
    with pytest.raises(UserError, match=r"unknown stage 'pop' \(in pipeline.compare.policies.PPO\)"):
        Stages(config, compose=lambda words: pytest.fail("composed"), overrides=[], prefix="x")


# ------------------------------------------------------------------------------------------------ in a pipeline
class Logged:
    """Stands for a tracked run."""

    def __init__(self) -> None:
        self.metrics: dict[str, float] = {}
        self.artifacts: list[str] = []

    def log_metrics(self, metrics: dict[str, float]) -> None:
        self.metrics |= metrics

    def log_artifact(self, path: Path) -> None:
        self.artifacts.append(path.name)


def test_the_comparison_is_in_the_pipelines_folder_and_run(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = [SimpleNamespace(name=name) for name in ("ppo", "ppo_lag")]
    config = CompareConfig(policies={"PPO": "ppo", "dual": "ppo_lag"}, differences=["dual - PPO"])
    evaluation = SimpleNamespace(bootstrap_draws=500, confidence=0.95)
    configs = {name: SimpleNamespace(evaluation=evaluation) for name in ("ppo", "ppo_lag")}
    stages: Any = SimpleNamespace(asked=asked, pipeline=SimpleNamespace(compare=config), configs=configs)
    summary = RunFolder(tmp_path / "pipeline")
    metrics = runner._summary(stages, folders, summary)
    assert json.loads(summary.metrics.read_text()) == metrics
    own = json.loads((folders["ppo"] / "metrics.json").read_text())
    assert metrics["ppo/policy/safe_rate"] == own["policy/safe_rate"] == 0.25
    assert metrics["compare/dual_over_ppo/difference/safe_rate"] == pytest.approx(0.25)

    # called again, the same is printed without being worked out anew; after a change of places it is
    printed = capsys.readouterr().out
    summary.update_status(stages={name: str(path) for name, path in folders.items()})
    monkeypatch.setattr(runner, "compare", lambda *_, **__: {"anew": 1.0})
    assert runner._summary(stages, folders, summary) == metrics
    assert capsys.readouterr().out.split() == printed.split()
    summary.update_status(stages={"ppo": "elsewhere"})
    assert runner._summary(stages, folders, summary)["compare/anew"] == 1.0
    write_json(summary.metrics, metrics)

    parent: Any = runner._Parent.__new__(runner._Parent)
    parent._summary, parent._logger = summary, None
    parent.log(metrics)  # no stage was run, so there is no run to write to
    parent._logger = Logged()
    parent.log(metrics)
    assert parent._logger.metrics == {name: v for name, v in metrics.items() if name.startswith("compare/")}
    assert "compare/dual_over_ppo/helpful_win_rate" in parent._logger.metrics
    assert parent._logger.artifacts == ["comparison.md", "policies.png", "constraint.png", *ARENA[:-1]]


def stages_of(pipeline: str, *chosen: str) -> Stages:
    """Some stages of a pipeline, composed and checked."""
    wanted = pipeline_config(composed(f"pipeline={pipeline}").pipeline)
    wanted.stages = list(chosen)
    return Stages(wanted, compose=lambda words: config(*words), overrides=["debug=fast"], prefix="debug")


@pytest.fixture(scope="module")
def paper() -> dict[str, TrainConfig]:
    """Stage -> config, of those stages of paper_toy that differ from a plain task."""
    fixed = ("shaping_025", "shaping_05", "shaping_1", "shaping_2", "shaping_5")
    labels = ("single_03", "single_07", "beaver_reward", "beaver_cost")
    return stages_of("paper_toy", *fixed, *labels, "ppo", "ppo_lag").configs


def test_the_stages_of_the_paper_are_what_their_headings_say(paper: dict[str, TrainConfig]) -> None:
    shown = pipeline_config(composed("pipeline=paper_toy").pipeline).compare
    weights = {heading: float(heading.removeprefix("nu ")) for heading in shown.fixed if heading != "PPO"}
    assert sorted(weights.values()) == [0.25, 0.5, 1, 2, 5]
    for heading, weight in weights.items():
        constraint: Any = paper[shown.policies[heading]].constraint
        assert (constraint.name, constraint.weight) == ("fixed", weight)
    assert [paper[shown.policies[heading]].constraint.name for heading in ("PPO", "dual")] == ["none", "lagrangian"]
    # who labels what: single preferences of other annotators, and labels like those of BeaverTails
    for stage, share in (("single_03", 0.3), ("single_07", 0.7)):
        run: Any = paper[stage]
        assert (run.task.preference, run.data.annotators.single_safety) == ("single", share)
    reward, cost = paper["beaver_reward"].data.annotators, paper["beaver_cost"].data.annotators
    assert reward == cost
    assert reward is not None and reward.safety_error == 0.1 and 0 < reward.sharpness < 1
    usual = paper["ppo_lag"].data.annotators
    assert usual is not None and (usual.single_safety, usual.sharpness, usual.safety_error) == (0.5, 1.0, 0.0)


def test_models_of_earlier_stages_reach_the_roles_and_the_scorers(tmp_path: Path) -> None:
    stages = stages_of("paper_toy", "ppo_lag", "classifier")
    lagrangian, classifier = sorted(stages.asked, key=lambda stage: stage.name, reverse=True)
    folders = {need: tmp_path / need for need in ("sft", "reward", "cost", "moderator")}
    first: Any = stages.run_config(lagrangian, stages.inputs(lagrangian, folders))
    assert first.init == str(folders["sft"])
    assert first.roles.reward.model == str(folders["reward"])
    assert first.roles.cost.model == str(folders["cost"])
    second: Any = stages.run_config(classifier, stages.inputs(classifier, folders))
    assert second.scorers["cost"].judge.model == str(folders["moderator"])
    assert second.scorers["cost"].judge.how == "max"
    assert second.roles.reward.model == str(folders["reward"])
    # the stage's own process, which is told the same in words, makes the same config of it
    for stage, expected in ((lagrangian, first), (classifier, second)):
        assert config(*stages.overrides(stage, stages.inputs(stage, folders))) == expected
    # and what was composed before is as it was
    assert stages.configs["classifier"].init != str(folders["sft"])


def test_the_quickstart_compares_its_policies() -> None:
    shown = pipeline_config(composed("pipeline=quickstart").pipeline).compare
    assert shown.policies == {"PPO": "ppo", "PPO-Lagrangian": "ppo_lag"}
    stages = stages_of("quickstart", *shown.policies.values())
    assert {stage: run.task.name for stage, run in stages.configs.items()} == {"ppo": "ppo", "ppo_lag": "ppo_lag"}
    assert [stage.needs for stage in stages.asked] == [("sft", "reward", "cost")] * 2
