"""Data sets by name: fetched by the hub client, refused in one line when it cannot."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from command_lines import composed
from huggingface_hub import errors

from saferlhf.config.schema import DataConfig
from saferlhf.config.validate import train_config
from saferlhf.data.build import build_data, data_fingerprint
from saferlhf.data.rows import PreferencePair, QuestionAnswer
from saferlhf.data.sources import hub
from saferlhf.errors import UserError

COMMIT = "9421ffa0000000000000000000000000000000aa"


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    hub._fetch.cache_clear()
    yield
    hub._fetch.cache_clear()


@pytest.fixture
def snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """A hub that has PKU-SafeRLHF in the layout of its release; the calls that it got."""
    folder = tmp_path / "snapshots" / COMMIT
    for model in ("Alpaca-7B", "Alpaca2-7B", "Alpaca3-8B"):
        for split, n in (("train", 20), ("test", 2)):
            file = folder / "data" / model / f"{split}.jsonl"
            file.parent.mkdir(parents=True, exist_ok=True)
            rows = [
                {
                    "prompt": f"{model} {split} {i}",
                    "response_0": "a",
                    "response_1": "b",
                    "is_response_0_safe": True,
                    "is_response_1_safe": False,
                    "better_response_id": 1,
                    "safer_response_id": 0,
                }
                for i in range(n)
            ]
            file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    calls: list[dict[str, Any]] = []

    def fake(repo_id: str, **given: Any) -> str:
        calls.append({"repo_id": repo_id, **given})
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake)
    return calls


def config(*words: str) -> DataConfig:
    return train_config(composed("task=reward", *words)).data


def test_a_data_set_comes_from_the_hub_when_no_path_is_given(snapshot: list[dict[str, Any]]) -> None:
    cfg = config("data=pku_saferlhf", "data.revision=v1")
    data = build_data(cfg, PreferencePair, ("better_response_id",))
    assert data.report.read == {"train": 60, "test": 6}
    assert data.report.revision == f"PKU-Alignment/PKU-SafeRLHF@{COMMIT}"
    assert data.report.to_dict()["revision"] == data.report.revision
    assert data.licence == "CC-BY-NC-4.0"
    data_fingerprint(cfg)
    (call,) = snapshot  # asked once for rows and identity
    assert (call["repo_id"], call["repo_type"], call["revision"]) == ("PKU-Alignment/PKU-SafeRLHF", "dataset", "v1")
    assert "*.jsonl" in call["allow_patterns"] and "*.py" not in call["allow_patterns"]


def test_a_subset_of_it(snapshot: list[dict[str, Any]]) -> None:
    data = build_data(config("data=pku_saferlhf", "data.subset=alpaca2-7b"), QuestionAnswer, ("is_safe",))
    assert data.report.read == {"train": 20, "test": 2} and len(data.test) == 4
    assert snapshot[0]["allow_patterns"] == ["*/Alpaca2-7B/*", "Alpaca2-7B/*"]


def test_files_of_the_hub_and_local_copies_are_the_same_data(snapshot: list[dict[str, Any]], tmp_path: Path) -> None:
    here = config("data=pku_saferlhf", f"data.path={tmp_path / 'snapshots' / COMMIT}")
    assert data_fingerprint(config("data=pku_saferlhf")) == data_fingerprint(here)
    assert len(snapshot) == 1


def test_any_data_set_by_name(snapshot: list[dict[str, Any]]) -> None:
    data = build_data(config("data=hub", "data.hub=someone/pairs"), PreferencePair)
    assert snapshot[0]["repo_id"] == "someone/pairs" and data.report.read["train"] == 60


@pytest.mark.parametrize(
    ("raised", "message"),
    [
        (errors.OfflineModeIsEnabled("offline"), "no answer, and its files are not in the local cache"),
        (errors.LocalEntryNotFoundError("nothing cached"), "no answer, and its files are not in the local cache"),
        (errors.HFValidationError("bad name"), "OWNER/NAME"),
        (OSError("no route\nto host"), "OSError: no route"),
    ],
)
def test_no_hub_is_one_line_with_the_mend(monkeypatch: pytest.MonkeyPatch, raised: Exception, message: str) -> None:
    def fail(*_: Any, **__: Any) -> str:
        raise raised

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(UserError) as caught:
        build_data(config("data=beavertails"), QuestionAnswer)
    text = str(caught.value)
    assert message in text and "PKU-Alignment/BeaverTails" in text and "data.hub" in text and "\n" not in text


def test_the_client_of_today_without_a_network() -> None:
    """Not a fake: the tests run in the client's offline mode."""
    with pytest.raises(UserError, match=r"cannot get the data set .*data\.path=FILE_OR_FOLDER, or data\.root="):
        build_data(config("data=pku_saferlhf_30k", "data.hub=nobody/has-this-set"), PreferencePair)
