"""docs/results.md: written from `protocols.json` alone, seeds as their mean, no folder of this machine in it."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml


@pytest.fixture(scope="module")
def protocols(project_root: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("protocols", project_root / "benchmarks" / "protocols.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["protocols"] = module
    spec.loader.exec_module(module)
    return module


def a_result(value: float) -> dict[str, Any]:
    return {
        "protocol": "some_test",
        "about": "answers to questions",
        "rule": "unsafe where harmful",
        "unit": "response",
        "measure": "moderation",
        "kind": "moderator",
        "metric": "unsafe/f1",
        "rows": 12,
        "published_rows": 30,
        "values": {"unsafe/f1": {"value": value, "low": 0.1, "high": 0.9, "tfidf": 0.25}},
        "seen_prompt_rate": 0.25,
        "unseen": {"value": 0.4},
        "marks": ["off-protocol: texts alone"],
        "note": None,
        "peers": [
            {
                "model": "Peer",
                "value": 0.9,
                "ran_by": "own",
                "source": "a paper",
                "mark": "published",
                "metric": None,
                "note": None,
            },
            {
                "model": "Count",
                "value": 0.95,
                "ran_by": "us",
                "source": "the file",
                "mark": "measured",
                "metric": None,
                "note": None,
            },
        ],
        "files": [{"name": "test.json", "sha256": "a" * 64, "rows": 12}],
        "fingerprint": "0" * 16,
    }


def a_folder(
    path: Path, config: dict[str, Any], content: dict[str, Any] | None = None, status: str = "finished"
) -> None:
    path.mkdir(parents=True)
    (path / "status.json").write_text(json.dumps({"status": status, "finished": 1.0}))
    (path / "config.yaml").write_text(yaml.safe_dump(config))
    if content is not None:
        (path / "protocols.json").write_text(json.dumps(content))


def a_model(protocols: ModuleType, **changes: Any) -> Any:
    fields = {
        "heading": "probe",
        "about": "A probe.",
        "train": "python train.py seed={seed}",
        "seeds": (0, 1),
        "run": "runs",
        "evaluate": "python evaluate.py",
    }
    return protocols.Measured(**(fields | changes))


def test_the_page_says_what_the_evaluations_found(protocols: ModuleType, tmp_path: Path) -> None:
    for seed, value in ((0, 0.5), (1, 0.7)):
        run = tmp_path / "runs" / f"r{seed}"
        a_folder(run, {"seed": seed})
        left_out = [["other_test", f"no folder other in {tmp_path}/data (in data.root); give one"]]
        content = {"results": [a_result(value)], "left_out": left_out}
        a_folder(tmp_path / "protocols" / f"e{seed}", {"model": str(run)}, content)
    page = tmp_path / "results.md"
    assert protocols.write([a_model(protocols)], tmp_path, page)
    text = page.read_text()
    assert (
        "| [some_test](#some_test) | `unsafe/f1` | 12 of 30 | **0.600** (0.100 .. 0.900), seeds 0.500 to 0.700 |"
        in text
    )
    assert "| 0.250 | 0.900 Peer |" in text  # a count of ours is no published number
    assert "25.0% of the rows have a prompt" in text and "without them `unsafe/f1` is 0.400" in text
    assert "| Peer | `unsafe/f1` | 0.900 |  | own run, a paper (published) |" in text
    assert "- `other_test`: no folder other in FOLDER" in text and str(tmp_path) not in text
    assert "`test.json` (sha256 `aaaaaaaaaaaaaaaa`)" in text


def a_drift(value: float) -> dict[str, Any]:
    lines = []
    for name, domain, auroc in (("a_test", "in-domain", 0.9), ("another", "other data", value)):
        values = {"auroc": {"value": auroc, "low": auroc - 0.03, "high": auroc + 0.03}}
        drops = {} if domain == "in-domain" else {"auroc": {"value": 0.9 - auroc, "low": 0.1, "high": 0.3}}
        line = {"protocol": name, "language": "", "domain": domain, "rows": 12, "values": values, "drops": drops}
        lines.append(line | {"note": ""})
    return {"trained_on": "gardens", "home": "a_test", "remark": "", "confidence": 0.95, "lines": lines}


def test_the_drift_of_the_first_seed_is_a_section_with_a_picture(protocols: ModuleType, tmp_path: Path) -> None:
    for heading, drifts in (("A (new) probe", (a_drift(0.7), a_drift(0.8))), ("older", (None, None))):
        for seed, drift in enumerate(drifts):
            run = tmp_path / heading / f"r{seed}"
            a_folder(run, {"seed": seed})
            content = {"results": [a_result(0.5)], "left_out": []} | ({} if drift is None else {"drift": drift})
            a_folder(tmp_path / "protocols" / f"{heading}{seed}", {"model": str(run)}, content)
    models = [a_model(protocols, heading=heading, run=heading) for heading in ("A (new) probe", "older")]
    page = tmp_path / "docs" / "results.md"
    page.parent.mkdir()
    assert protocols.write(models, tmp_path, page)
    text = page.read_text()
    assert text.count("## Drift of ") == 1
    section = text.partition("## Drift of A (new) probe\n")[2].partition("\n## ")[0]
    assert "trained on gardens" in section and section.split("\n")[1].endswith(" Seed 0.")
    assert (
        "| **a_test**<br><small>in-domain</small> | 12 |  | 0.900<br><small>0.870..<wbr>0.930</small> |  |" in section
    )
    cells = section.partition("| another<br>")[2].partition("\n")[0].split(" | ")
    assert cells[:3] == ["<small>other data</small>", "12", ""]
    assert cells[3:5] == ["0.700<br><small>0.670..<wbr>0.730</small>", "0.200<br><small>0.100..<wbr>0.300</small>"]
    assert "](images/drift-a-new-probe.png)" in section
    assert (page.parent / "images" / "drift-a-new-probe.png").read_bytes()[:4] == b"\x89PNG"
    assert len(list((page.parent / "images").iterdir())) == 1


def test_what_is_missing_is_said(protocols: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a_folder(tmp_path / "runs" / "r0", {"seed": 0})
    a_folder(tmp_path / "runs" / "r1", {"seed": 1}, status="running")
    content = {"results": [a_result(0.5)], "left_out": []}
    a_folder(tmp_path / "protocols" / "e0", {"model": str(tmp_path / "runs" / "r0")}, content)
    page = tmp_path / "results.md"
    assert not protocols.write([a_model(protocols)], tmp_path, page)
    assert "no finished evaluation of seed 1" in capsys.readouterr().out
    assert "**0.500**" in page.read_text()
    assert not protocols.write([a_model(protocols, run="none")], tmp_path, tmp_path / "not.md")
    assert not (tmp_path / "not.md").exists()


def test_the_models_of_the_page(protocols: ModuleType, project_root: Path) -> None:
    models = protocols.read_models(project_root / "benchmarks" / "protocols.yaml")
    assert models and all("suite=all" in model.evaluate for model in models)
    headings = [model.heading for model in models]
    for model in models:
        if model.train is None:
            assert model.backbone and model.judge in headings and "{judge}" in model.evaluate
        else:
            assert "{seed}" in model.train and model.run


def test_a_backbone_as_it_is_and_its_judge(protocols: ModuleType, tmp_path: Path, monkeypatch: Any) -> None:
    """Nothing is trained for it; it is judged by the first seed of the model that it names."""
    judge = a_model(protocols, heading="judge", evaluate="python evaluate.py suite=all")
    plain = protocols.Measured(
        "plain", "It is.", "python evaluate.py judges=[{judge}]", backbone="smollm2", judge="judge"
    )
    assert plain.commands == "`python evaluate.py judges=[RUN_OF_JUDGE] model=HuggingFaceTB/SmolLM2-135M-Instruct`"
    found = {"judge": "runs/r0", "plain": "some/folder"}
    called: list[str] = []
    monkeypatch.setattr(protocols, "read_models", lambda file: [judge, plain])
    monkeypatch.setattr(protocols, "found_model", lambda model, seed, outputs: found[model.heading])
    monkeypatch.setattr(protocols, "_call", lambda command, outputs: called.append(command))
    monkeypatch.setattr(sys, "argv", ["protocols.py", "run", "--outputs", str(tmp_path)])
    assert protocols.main() == 0
    assert called[-1] == "python evaluate.py judges=[runs/r0] model=some/folder name=protocols"
    assert [c for c in called if "train" in c] == ["python train.py seed=0", "python train.py seed=1"]


def test_a_protocol_is_a_line_for_each_way_to_measure_it(protocols: ModuleType, tmp_path: Path) -> None:
    """Verdicts on prompts, and answers to them."""
    answers = {
        **a_result(0.5),
        "metric": "policy/safe_rate",
        "values": {"policy/safe_rate": {"value": 0.75}},
        "peers": [],
    }
    for number, (name, result) in enumerate((("probe", a_result(0.5)), ("policy", answers))):
        a_folder(tmp_path / name / "r", {"seed": 0})
        content = {"results": [result], "left_out": []}
        a_folder(tmp_path / "protocols" / f"e{number}", {"model": str(tmp_path / name / "r")}, content)
    models = [a_model(protocols, heading=name, run=name, seeds=(0,)) for name in ("probe", "policy")]
    page = tmp_path / "results.md"
    assert protocols.write(models, tmp_path, page)
    overview = [line for line in page.read_text().splitlines() if line.startswith("| [some_test]")]
    assert [line.split(" | ")[1:5] for line in overview] == [
        ["`unsafe/f1`", "12 of 30", "**0.500** (0.100 .. 0.900)", "-"],
        ["`policy/safe_rate`", "12 of 30", "-", "**0.750**"],
    ]
