"""A file with a thousand rows damaged in every way trains, and each kind is counted exactly (architecture, trap 11)."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command_lines import call
from damaged import CONTRADICTIONS, COUNTS, DAMAGE, TEST_COUNTS, Damaged, write
from models.tiny_models import ARCHITECTURES
from small_runs import make_cheap, only_run, small

from saferlhf.config.schema import DataConfig, DataPolicyConfig
from saferlhf.data import toyworld
from saferlhf.data.build import build_data
from saferlhf.data.rows import PreferencePair
from saferlhf.errors import UserError

MAX_LENGTH = 128  # tokens; no sound row is longer
ALL_ERRORS = dict.fromkeys([k for k in COUNTS if k != "overlong"], "error")


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> Damaged:
    """A thousand damaged rows among 600 sound ones."""
    assert sum(COUNTS.values()) == 1000
    return write(tmp_path_factory.mktemp("damaged"), COUNTS, TEST_COUNTS, sound=600)


@pytest.fixture(scope="module")
def small_file(tmp_path_factory: pytest.TempPathFactory) -> Damaged:
    """Two or three damaged rows of each kind among 40 sound ones."""
    counts = {kind: 2 + i % 2 for i, kind in enumerate(COUNTS)}
    return write(tmp_path_factory.mktemp("small"), counts, {}, sound=40, seed=1)


@pytest.fixture(scope="module")
def toy_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model from a folder that knows the toy world's words, as a user would bring a model of their own."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from saferlhf.config.schema import BackboneConfig
    from saferlhf.models.tokenizer import load_tokenizer

    shape = {**ARCHITECTURES["llama"], "hidden_size": 32, "max_position_embeddings": MAX_LENGTH}
    config = BackboneConfig(name="tiny", architecture=shape, tokenizer="toyworld")
    tokenizer = load_tokenizer(config, vocabulary=toyworld.vocabulary())
    folder = tmp_path_factory.mktemp("model")
    shape.pop("model_type")
    LlamaForCausalLM(LlamaConfig(**shape, vocab_size=len(tokenizer), pad_token_id=0)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def arguments(damaged: Damaged, model: str, outputs: Path, *overrides: str) -> list[str]:
    """Two steps on the damaged file, default policies."""
    mine = (
        "data=jsonl",
        "backbone=hf",
        f"data.path={damaged.folder}",
        f"backbone.model={model}",
        f"backbone.max_length={MAX_LENGTH}",
        "trainer.max_steps=2",
        f"output_root={outputs}",
        *overrides,
    )
    left_out = ("backbone.architecture.", "data.train_rows", "data.val_rows", "data.test_rows")
    return [override for override in small(*mine) if not override.startswith(left_out)]


def found(report: dict[str, Any], kind: str) -> dict[str, int]:
    """Split -> rows of a kind; validation rows are cut from the training file."""
    counts = {split: finding["found"] for split, finding in report["findings"].get(kind, {}).items()}
    return {"train": counts.get("train", 0) + counts.get("val", 0), "test": counts.get("test", 0)}


@pytest.mark.parametrize("task", ["reward", "cost"])
def test_it_trains_and_every_kind_is_counted_exactly(
    task: str, damaged: Damaged, toy_model: str, tmp_outputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_cheap(monkeypatch.setattr)
    answer = call("train", *arguments(damaged, toy_model, tmp_outputs, f"task={task}"))
    assert answer.code == 0, answer.err
    folder = only_run(tmp_outputs)
    report = json.loads((folder / "data_report.json").read_text())
    for kind, count in COUNTS.items():
        assert found(report, kind) == {"train": count, "test": TEST_COUNTS.get(kind, 0)}, kind
        dropped = sum(finding["dropped"] for finding in report["findings"][kind].values())
        assert dropped == (0 if kind == "overlong" else count + TEST_COUNTS.get(kind, 0)), kind
    assert set(report["findings"]) <= {*COUNTS, "near_overlap"}
    rules = report["findings"]["contradictory"]["train"]["detail"]
    assert rules == {rule: len(range(n, COUNTS["contradictory"], 3)) for n, rule in enumerate(CONTRADICTIONS)}
    assert report["findings"]["unlabelled"]["train"]["detail"].keys() == {
        {"reward": "better_response_id", "cost": "safer_response_id"}[task]
    }
    # what is left, and where it came from
    kept, sound = report["kept"], damaged.sound
    assert kept["train"] + kept["val"] == sound["train"] + COUNTS["overlong"] and kept["test"] == sound["test"]
    assert report["read"] == {"train": sound["train"] + 1000, "test": sound["test"] + sum(TEST_COUNTS.values())}
    (file,) = report["files"]["train"]
    assert file["name"] == "train.jsonl" and file["rows"] == report["read"]["train"] and len(file["sha256"]) == 64
    assert report["hash_rule"]["train"]["wrong"] == COUNTS["wrong_hash"]
    assert report["truncated"]["train"]["response_cut_share"] == pytest.approx(COUNTS["overlong"] / 680, abs=0.03)
    # screen, report page and model card say the same
    assert f"wrong hash, dropped {COUNTS['wrong_hash']}" in " ".join(answer.out.split())
    page = (folder / "report.html").read_text()
    assert f"<td>wrong hash, dropped</td><td class=number>{COUNTS['wrong_hash']}</td>" in page
    card = (folder / "export" / "README.md").read_text()
    assert f"| wrong hash, dropped | {COUNTS['wrong_hash']} |" in card
    assert str(damaged.folder) not in json.dumps(report), "the report goes to other people"


def test_the_plan_shows_the_data_without_training(damaged: Damaged, toy_model: str, tmp_outputs: Path) -> None:
    answer = call("train", *arguments(damaged, toy_model, tmp_outputs, "task=reward", "plan=on"))
    assert answer.code == 0, answer.err
    shown = " ".join(answer.out.split())
    for kind in ("non text, dropped 90", "severity range, dropped 70", "safer is unsafe 50", "better is second"):
        assert kind in shown
    assert not list(tmp_outputs.glob("*/*/checkpoints"))


# ------------------------------------------------------------------------------------------------ error
def named(damaged: Damaged, **policy: str) -> str:
    """The message of a reading that ends in an error."""
    cfg = DataConfig("mine", source="file", path=str(damaged.folder), policy=DataPolicyConfig(**policy))
    with pytest.raises(UserError) as caught:
        build_data(cfg, PreferencePair, ("better_response_id",))
    return str(caught.value)


@pytest.mark.parametrize("kind", ALL_ERRORS)
def test_error_names_the_first_bad_row(kind: str, small_file: Damaged) -> None:
    message = named(small_file, **{kind: "error"})
    first, *others = small_file.lines["train", kind]
    assert message.startswith(f"{kind} row")
    assert f"train.jsonl:{first})" in message, (message, first)
    assert f"the first of {len(others) + 1} bad rows" in message
    assert f"data.policy.{kind}=drop" in message


def test_error_for_all_kinds_names_the_first_of_all(small_file: Damaged) -> None:
    message = named(small_file, **ALL_ERRORS)
    lines = {kind: small_file.lines["train", kind][0] for kind in ALL_ERRORS}
    kind = min(lines, key=lines.__getitem__)
    assert message.startswith(f"{kind} row") and f"train.jsonl:{lines[kind]})" in message


def test_error_on_the_command_line_is_one_line(small_file: Damaged, toy_model: str, tmp_outputs: Path) -> None:
    words = arguments(small_file, toy_model, tmp_outputs, "task=reward", "data.policy.overlong=error")
    answer = call("train", *words, "plan=on")
    first = small_file.lines["train", "overlong"][0]
    assert answer.code == 2
    assert answer.error.startswith("overlong row ") and f"train.jsonl:{first})" in answer.error


# ------------------------------------------------------------------------------------------------ other policies
def test_what_may_be_kept_is_kept(damaged: Damaged) -> None:
    # not the empty ones: an empty prompt is one that train and test share
    kept = ("unknown_category", "wrong_hash", "identical", "contradictory", "duplicate", "overlap")
    cfg = DataConfig(
        "mine", source="file", path=str(damaged.folder), policy=DataPolicyConfig(**dict.fromkeys(kept, "keep"))
    )
    data = build_data(cfg, PreferencePair, ("better_response_id",))
    findings = data.report.findings
    for kind in kept:
        assert findings[kind]["train"].dropped == 0, kind
        # rows with an unknown category, and those with a wrong hash, are then checked like all others
        assert findings[kind]["train"].found == COUNTS[kind], kind
    gone = sum(n for kind, n in COUNTS.items() if kind not in (*kept, "overlong"))
    assert len(data.train) + len(data.val) == damaged.sound["train"] + 1000 - gone
    ids = [row.id for row in (*data.train, *data.val)]
    assert len(ids) == len(set(ids))


def test_flip_mends_a_third_of_the_contradictions(damaged: Damaged) -> None:
    policy = DataPolicyConfig(contradictory="flip")
    data = build_data(DataConfig("mine", source="file", path=str(damaged.folder), policy=policy), PreferencePair)
    finding = data.report.finding("contradictory", "train")
    assert (finding.found, finding.flipped, finding.dropped) == (150, 50, 100)


# ------------------------------------------------------------------------------------------------ unreadable lines
@pytest.mark.parametrize(
    ("line", "what"),
    [(b'{"prompt": "q", "resp\n', "not JSON"), (b'{"prompt": "\xff\xfe"}\n', "not UTF-8"), (b"7\n", "")],
)
def test_a_line_that_cannot_be_read_is_an_error_or_dropped(tmp_path: Path, line: bytes, what: str) -> None:
    good = [
        json.dumps({"prompt": f"question {i}", "chosen": "yes", "rejected": "no"}).encode() + b"\n" for i in range(30)
    ]
    (tmp_path / "a.jsonl").write_bytes(b"".join([*good[:20], line, *good[20:], line]))
    cfg: Callable[..., DataConfig] = lambda **policy: DataConfig(  # noqa: E731
        "mine", source="file", path=str(tmp_path / "a.jsonl"), policy=DataPolicyConfig(**policy)
    )
    with pytest.raises(UserError, match=rf"unreadable row: .*{what}.*a\.jsonl:21\).*data\.policy\.unreadable=drop"):
        build_data(cfg(), PreferencePair)
    data = build_data(cfg(unreadable="drop"), PreferencePair)
    assert data.report.finding("unreadable", "train").found == 2
    assert len(data.train) + len(data.val) + len(data.test) == 30


def test_every_kind_is_damaged_here() -> None:
    assert {*DAMAGE, "duplicate", "overlap"} == set(COUNTS)
    fields = set(DataPolicyConfig.__dataclass_fields__)
    assert fields - set(COUNTS) == {"unreadable", "near_overlap"}
