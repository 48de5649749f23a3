"""Evaluations compared, from folders made by hand: what `models=` means, tables, files, policies."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from saferlhf.data.labels import labels_of
from saferlhf.data.rows import PreferencePair, QuestionAnswer, as_prompt
from saferlhf.errors import UserError
from saferlhf.evaluation.judgements import of_pairs, of_verdicts
from saferlhf.evaluation.policy_answers import Judged, PolicyAnswers, PromptSet
from saferlhf.evaluation.policy_samples import sample_lines
from saferlhf.ops.moderation import Verdicts
from saferlhf.run.compare_models import ComparedRun, compare_models, resolve_models

COUNT = 60
UNSAFE = np.arange(COUNT) % 2 == 0
ROWS = [
    QuestionAnswer(f"r{i}", as_prompt(f"may I pick flower {i // 2}?"), f"answer {i}", not bad)
    for i, bad in enumerate(UNSAFE)
]
OPTIONS: dict[str, Any] = {"draws": 400, "confidence": 0.95, "seed": 0}
PROMPTS = PromptSet(
    tuple(f"p{i}" for i in range(24)),
    tuple(as_prompt(f"please draw frog {i}") for i in range(24)),
    (np.arange(24) % 2).astype(np.float64),
)


def evaluation(path: Path, *, model: str = "outputs/probe/0123456789", **changes: str) -> Path:
    """What a finished evaluation leaves, as far as a comparison looks at it."""
    path.mkdir(parents=True)
    config = {"mode": "score", "suite": {"name": "all"}, "model": model} | changes
    status = config.pop("status", "finished")
    (path / "config.yaml").write_text(yaml.safe_dump(config))
    (path / "status.json").write_text(json.dumps({"status": status}))
    return path


def moderated(path: Path, wrong: int, protocol: str = "flowers", **options: Any) -> Path:
    """An evaluation of a moderator that errs on the first `wrong` rows."""
    folder = path if path.exists() else evaluation(path, **options)
    logits = np.where(UNSAFE ^ (np.arange(COUNT) < wrong), 2.0, -2.0) + np.arange(COUNT) / 100
    verdicts = Verdicts(1 / (1 + np.exp(-logits)), None, None, logits > 0, None, None, logits)
    of_verdicts(protocol, ROWS, labels_of(ROWS, ()), verdicts).save(folder)
    return folder


def answered(path: Path, safe: int, protocol: str = "", prompts: PromptSet = PROMPTS) -> Path:
    """An evaluation of a policy whose first `safe` responses are safe."""
    folder = evaluation(path)
    flags = (np.arange(24) < safe).astype(np.float64)[:, None]
    judged = {"truth": Judged({"is_safe": flags, "helpfulness": 2.0 - flags + np.arange(24)[:, None] % 3})}
    answers = PolicyAnswers((("a frog",),) * 24, np.full((24, 1), 3), np.zeros((24, 1), bool), judged=judged)
    place = folder / protocol
    place.mkdir(exist_ok=True)
    lines = sample_lines(prompts, {"policy": answers, "baseline": answers})
    (place / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def export(folder: Path) -> Path:
    """A plain language model's folder, which names a model as far as a locator sees."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    return folder


# ------------------------------------------------------------------------------------------------ which models
def test_a_list_of_evaluations(tmp_path: Path) -> None:
    one = moderated(tmp_path / "evaluate" / "aaaaaaaaaa", 3, model="outputs/probe/0123456789")
    two = moderated(tmp_path / "evaluate" / "bbbbbbbbbb", 9, model="outputs/probe/9876543210/export")
    three = moderated(tmp_path / "evaluate" / "cccccccccc", 9, model="runs:/0a1b2c3d4e5f")
    found = resolve_models(["evaluate/aaaaaaaaaa", str(two), str(three)], tmp_path)
    assert found == {
        "probe 012345": [ComparedRun("evaluate/aaaaaaaaaa", one.resolve())],
        "probe 987654": [ComparedRun(str(two), two.resolve())],
        "run": [ComparedRun(str(three), three.resolve())],
    }
    assert not any(run.needs_evaluation for runs in found.values() for run in runs)


def test_headings_of_one_model_evaluated_twice(tmp_path: Path) -> None:
    for name in ("aaaaaaaaaa", "bbbbbbbbbb"):
        moderated(tmp_path / name, 3, model="org/guard")
    assert list(resolve_models(["aaaaaaaaaa", "bbbbbbbbbb"], tmp_path)) == ["guard aaaaaa", "guard bbbbbb"]


def test_models_are_to_be_evaluated_first(tmp_path: Path) -> None:
    done = moderated(tmp_path / "evaluate" / "aaaaaaaaaa", 3)
    model = export(tmp_path / "some" / "model")
    found = resolve_models({"ours": [str(done)], "theirs": str(model), "hub": "org/model@main"}, tmp_path)
    assert [run.needs_evaluation for runs in found.values() for run in runs] == [False, True, True]
    assert list(found) == ["ours", "theirs", "hub"]
    assert list(resolve_models([str(done), str(model)], tmp_path)) == ["probe", "model"]


def test_the_folder_of_a_name_stands_for_its_one_run(tmp_path: Path) -> None:
    moderated(tmp_path / "evaluate" / "aaaaaaaaaa", 3)
    model = export(tmp_path / "model")
    found = resolve_models(["evaluate", str(model)], tmp_path)
    assert found["probe"][0].folder == (tmp_path / "evaluate" / "aaaaaaaaaa").resolve()


def test_a_tracked_evaluation(tmp_path: Path) -> None:
    """Named by its MLflow id; a tracked training run is a model."""
    from saferlhf.config.schema import TrackingConfig
    from saferlhf.tracking import build_logger

    folders = [moderated(tmp_path / "evaluate" / "aaaaaaaaaa", 3), export(tmp_path / "sft" / "bbbbbbbbbb")]
    ids = []
    for folder in folders:
        tracker = build_logger(
            TrackingConfig(name="mlflow", experiment="x", system_metrics=False),
            output_root=tmp_path,
            run_folder=folder,
            run_name=folder.name,
            identity=folder.name,
            tags={"export_folder": str(folder)},
        )
        tracker.finish("FINISHED")
        ids.append(tracker.run_id)
    done, model = resolve_models([f"runs:/{code}" for code in ids], tmp_path).values()
    assert done[0].folder == folders[0] and model[0].needs_evaluation
    with pytest.raises(UserError, match="no tracked run 0123"):
        resolve_models(["runs:/0123", str(folders[0])], tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"status": "killed"}, r"not finished \(killed\).*type its command again"),
        ({"mode": "moderate"}, "mode=moderate and measured nothing"),
        ({}, "kept nothing of single rows"),
    ],
)
def test_evaluations_that_are_of_no_use(tmp_path: Path, changes: dict[str, str], message: str) -> None:
    evaluation(tmp_path / "aaaaaaaaaa", **changes)
    moderated(tmp_path / "bbbbbbbbbb", 3)
    with pytest.raises(UserError, match=message):
        resolve_models(["aaaaaaaaaa", "bbbbbbbbbb"], tmp_path)


def test_what_is_no_list_of_models(tmp_path: Path) -> None:
    for name in ("aaaaaaaaaa", "bbbbbbbbbb"):
        moderated(tmp_path / name, 3)
    with pytest.raises(UserError, match="two models at least"):
        resolve_models(["aaaaaaaaaa"], tmp_path)
    with pytest.raises(UserError, match="two models at least"):
        resolve_models({"a": ["aaaaaaaaaa"], "b": []}, tmp_path)
    with pytest.raises(UserError, match="'aaaaaaaaaa' is named twice"):
        resolve_models({"a": ["aaaaaaaaaa"], "b": ["bbbbbbbbbb", "aaaaaaaaaa"]}, tmp_path)
    with pytest.raises(UserError, match="'A 1' and 'a 1' would have the same"):
        resolve_models({"A 1": "aaaaaaaaaa", "a 1": "bbbbbbbbbb"}, tmp_path)
    with pytest.raises(UserError, match="no such folder"):
        resolve_models(["aaaaaaaaaa", "./nothing/here"], tmp_path)


# ------------------------------------------------------------------------------------------------ comparing
def test_tables_numbers_and_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, bad = moderated(tmp_path / "a", 6), moderated(tmp_path / "b", 24)
    for folder, wrong in ((good, 10), (bad, 12)):
        moderated(folder, wrong, protocol="weeds")
    out = tmp_path / "out"
    found = compare_models({"ours": [good], "theirs": [bad]}, out=out, **OPTIONS)
    # 54 of 60 rows right, and 36
    assert found["compare/flowers/unsafe/accuracy/ours"] == pytest.approx(0.9)
    assert found["compare/flowers/unsafe/accuracy/ours_minus_theirs"] == pytest.approx(0.3)
    name = "compare/flowers/unsafe/macro_f1/ours_minus_theirs"
    assert found[f"{name}_low"] < found[name] < found[f"{name}_high"]
    assert found[f"{name}_p"] < 0.05 and found[f"{name}_p_holm"] == pytest.approx(2 * found[f"{name}_p"])
    assert found["compare/flowers/prompts"] == 30
    assert json.loads((out / "metrics.json").read_text()) == found
    said = capsys.readouterr().out
    text = (out / "comparison.md").read_text()
    page = (out / "report.html").read_text()
    for shown in (said, text, page):
        assert "flowers  unsafe/macro_f1" in shown and "ours − theirs" in shown
        assert f"{found[name]:+.3f} [{found[f'{name}_low']:+.3f}, {found[f'{name}_high']:+.3f}]" in shown
        assert "what another seed would give is not in the intervals" in " ".join(shown.split())
    assert page.count("<svg") == 2 and "pick flower" not in page
    for picture in ("differences.png", "models.png"):
        assert (out / picture).read_bytes().startswith(b"\x89PNG")
    content = json.loads((out / "comparison.json").read_text())
    assert [protocol["protocol"] for protocol in content["protocols"]] == ["flowers", "weeds"]
    first = content["protocols"][0]["metrics"][0]
    assert first["metric"] == "unsafe/macro_f1" and first["headline"] is True
    assert first["differences"][0]["estimate"]["value"] == found[name]
    assert content["models"] == {"ours": [str(good)], "theirs": [str(bad)]}


def test_seeds_under_one_heading(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [moderated(tmp_path / f"s{wrong}", wrong) for wrong in (2, 8, 14)]
    theirs = moderated(tmp_path / "b", 24)
    found = compare_models({"ours": runs, "theirs": [theirs]}, out=tmp_path / "out", **OPTIONS)
    assert found["compare/flowers/unsafe/accuracy/ours"] == pytest.approx(1 - 8 / 60)
    said = " ".join(capsys.readouterr().out.split())
    assert "ours (mean of 3 runs)" in said and "one run of theirs: what another seed" in said


def test_a_baseline_and_models_that_lack_a_protocol(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    models = {name: [moderated(tmp_path / name, wrong)] for name, wrong in (("a", 3), ("b", 9), ("c", 15))}
    moderated(models["a"][0], 3, protocol="weeds")
    moderated(models["c"][0], 9, protocol="weeds")
    moderated(models["a"][0], 3, protocol="alone")
    found = compare_models(models, out=tmp_path / "out", baseline="b", **OPTIONS)
    pairs = {name.rpartition("/")[2] for name in found if name.startswith("compare/flowers/unsafe/f1/")}
    assert {"a_minus_b", "c_minus_b"} <= pairs and not any(p.startswith(("b_minus", "a_minus_c")) for p in pairs)
    said = " ".join(capsys.readouterr().out.split())
    assert "weeds: b was not measured by it" in said and "alone: b and c were not measured by it" in said
    assert not any("/weeds/" in name or "/alone/" in name for name in found)
    everyone = compare_models(models, out=tmp_path / "all", **OPTIONS)
    assert "compare/weeds/unsafe/macro_f1/a_minus_c_p" in everyone


def test_nothing_in_common(tmp_path: Path) -> None:
    models = {"a": [moderated(tmp_path / "a", 3)], "b": [moderated(tmp_path / "b", 3, protocol="weeds")]}
    with pytest.raises(UserError, match="a and b were not measured by a common protocol; flowers: b was not measured"):
        compare_models(models, out=tmp_path / "out", **OPTIONS)
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="two models at least"):
        compare_models({"a": models["a"]}, out=tmp_path / "out", **OPTIONS)
    with pytest.raises(UserError, match="'a' and 'c' are the same model"):
        compare_models({"a": models["a"], "c": models["a"]}, out=tmp_path / "out", **OPTIONS)


def test_rewards_are_not_compared_with_costs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pairs = [
        PreferencePair(f"p{i}", as_prompt(f"q {i}"), "a", "b", True, False, better_response_id=0, safer_response_id=0)
        for i in range(20)
    ]
    models = {}
    for name, kind in (("r1", "reward"), ("r2", "reward"), ("c1", "cost")):
        folder = evaluation(tmp_path / name)
        of_pairs("pairs", pairs, np.random.default_rng(len(models)).normal(size=(20, 2)), kind=kind).save(folder)  # type: ignore[arg-type]
        models[name] = [folder]
    found = compare_models(models, out=tmp_path / "out", **OPTIONS)
    differences = {name for name in found if name.startswith("compare/pairs") and "_minus_" in name}
    assert differences and all("/reward/pair_accuracy/r1_minus_r2" in name for name in differences)
    said = " ".join(capsys.readouterr().out.split())
    assert "only models of one kind are compared: r1 (reward), r2 (reward), c1 (cost)" in said


# ------------------------------------------------------------------------------------------------ policies
def test_policies(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    models = {"ours": [answered(tmp_path / "a", 18)], "theirs": [answered(tmp_path / "b", 6)]}
    found = compare_models(models, out=tmp_path / "out", **OPTIONS)
    name = "compare/policy/policy/safe_rate/ours_minus_theirs"
    assert found[name] == pytest.approx(0.5) and found[f"{name}_p_holm"] < 0.05
    assert found["compare/policy/policy/safe_rate/ours"] == pytest.approx(0.75)
    # 12 responses became safe and lost 1 in helpfulness, the others are as helpful: ties count one half
    assert found["compare/policy/policy/helpful_win_rate/ours_over_theirs"] == pytest.approx(12 / 2 / 24)
    assert found["compare/policy/policy/mean_helpfulness/ours_minus_theirs"] == pytest.approx(-0.5)
    assert 0.1 < found[f"{name}_mde"] < 0.6
    said, page = capsys.readouterr().out, (tmp_path / "out" / "report.html").read_text()
    assert "policy  policy/safe_rate" in said and "win rates, and differences" in said
    assert "draw frog" not in said + page


def test_policies_in_the_arena(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    models = {f"p{safe}": [answered(tmp_path / f"p{safe}", safe)] for safe in (0, 12, 24)}
    out = tmp_path / "out"
    found = compare_models(models, out=out, baseline="p0", **OPTIONS)
    # a safe response is 1 less helpful than an unsafe one to the same prompt: half of them lose, the others tie
    area = "compare/policy/arena"
    assert found[f"{area}/helpful/p12_over_p0_win_rate"] == pytest.approx(0.25)
    assert found[f"{area}/helpful/p24_over_p0_win_rate"] == 0.0
    assert found[f"{area}/helpful/p0_elo"] == 0.0 > found[f"{area}/helpful/p12_elo"] > found[f"{area}/helpful/p24_elo"]
    assert [found[f"{area}/safety/p{safe}_attack_success"] for safe in (0, 12, 24)] == [1.0, 0.5, 0.0]
    assert not any("/harmless/" in name for name in found)  # nobody graded it
    said, page, text = capsys.readouterr().out, (out / "report.html").read_text(), (out / "comparison.md").read_text()
    title = "helpful by truth: Elo over 24 prompts"
    assert f"policy: arena, {title}" in said and f"**policy: arena, {title}**" in text and title in page
    assert "<h2>Arena: policy</h2>" in page
    assert page.count("<svg") == 4 and 'aria-label="win rates, helpful"' in page
    assert {path.name for path in out.glob("*.png")} == {
        "differences.png",
        "models.png",
        "win_rates_helpful.png",
        "ratings_helpful.png",
    }
    assert json.loads((out / "metrics.json").read_text()) == found


def test_pictures_of_the_arena_of_a_protocol(tmp_path: Path) -> None:
    models = {name: [answered(tmp_path / name, safe, "frogs")] for name, safe in (("a", 6), ("b", 18))}
    found = compare_models(models, out=tmp_path / "out", **OPTIONS)
    assert found["compare/frogs/arena/helpful/a_over_b_win_rate"] == pytest.approx(0.75)
    assert {"win_rates_helpful_frogs.png", "ratings_helpful_frogs.png"} < {p.name for p in (tmp_path / "out").iterdir()}


def test_policies_of_a_protocol_and_of_several_runs(tmp_path: Path) -> None:
    ours = [answered(tmp_path / f"a{safe}", safe, "frogs") for safe in (6, 18)]
    models = {"ours": ours, "theirs": [answered(tmp_path / "b", 6, "frogs")]}
    found = compare_models(models, out=tmp_path / "out", **OPTIONS)
    # the responses of both runs count alike
    assert found["compare/frogs/policy/safe_rate/ours"] == pytest.approx(0.5)
    assert found["compare/frogs/policy/safe_rate/ours_minus_theirs"] == pytest.approx(0.25)
    assert "responses of several runs are put together" in (tmp_path / "out" / "comparison.md").read_text()


def test_policies_on_different_prompts(tmp_path: Path) -> None:
    others = PromptSet(tuple(f"x{i}" for i in range(24)), PROMPTS.prompts, PROMPTS.harmful)
    models = {"a": [answered(tmp_path / "a", 18)], "b": [answered(tmp_path / "b", 6, prompts=others)]}
    with pytest.raises(UserError, match="a and b answered different prompts of policy"):
        compare_models(models, out=tmp_path / "out", **OPTIONS)
