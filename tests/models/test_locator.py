"""One string names any model; every mistake is one clear line."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_models import folder_of, metadata, score_model, tokenizer

from saferlhf.errors import UserError
from saferlhf.models.export import save_export
from saferlhf.models.locator import Location, content_id_of, resolve
from saferlhf.models.metadata import FORMAT_VERSION, METADATA_FILE, read_metadata


@pytest.fixture
def outputs(tmp_path: Path) -> Path:
    """One finished run, one running, one plain folder beside them."""
    root = tmp_path / "outputs"
    run = root / "cost" / "0123456789"
    run.mkdir(parents=True)
    (run / "status.json").write_text('{"status": "finished"}')
    save_export(run / "export", model=score_model(), tokenizer=tokenizer(), metadata=metadata())
    young = root / "cost" / "abcdef0123"
    young.mkdir()
    (young / "status.json").write_text('{"status": "running"}')
    return root


def test_a_run_its_export_and_a_path_under_the_root_are_the_same_model(outputs: Path) -> None:
    export = outputs / "cost" / "0123456789" / "export"
    for text in (str(export), str(export.parent), "cost/0123456789", "cost/0123456789/"):
        found = resolve(text, output_root=outputs, require_heads=True)
        assert (found.kind, found.folder, found.run_folder) == ("export", export.resolve(), export.parent.resolve())


def test_the_folder_of_a_name_is_its_only_run(outputs: Path) -> None:
    shutil.rmtree(outputs / "cost" / "abcdef0123")
    found = resolve("cost", output_root=outputs, require_heads=True)
    assert found.run_folder == (outputs / "cost" / "0123456789").resolve()


def test_hub_names_and_plain_folders(tmp_path: Path) -> None:
    assert resolve("org/model", output_root=tmp_path) == Location("org/model", "hub", name="org/model")
    assert resolve("org/model@v1", output_root=tmp_path).revision == "v1"
    assert resolve("gpt2", output_root=tmp_path).kind == "hub"
    folder = folder_of(tmp_path / "model")
    assert resolve(folder, output_root=tmp_path).kind == "folder"


def test_paths_are_never_taken_for_hub_names(outputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(outputs.parent)
    for text in ("outputs/nothing", "./model", "../x/y", "/no/where", "a/b/c", "~/nothing", "no such", "outputs/"):
        with pytest.raises(UserError, match=r"no such folder|is no model"):
            resolve(text, output_root=outputs)


def test_each_mistake_is_one_clear_line(outputs: Path, tmp_path: Path) -> None:
    plain = folder_of(tmp_path / "plain")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.txt").write_text("x")
    mistakes = {
        "cost/abcdef0123": r"has no export yet \(status: running\)",
        "cost": r"holds several runs \(0123456789, abcdef0123\).*name one: cost/0123456789",
        str(tmp_path / "empty"): "neither saferlhf.json nor config.json",
        str(tmp_path / "file.txt"): "is a file, not a model",
        "  ": "empty locator",
    }
    for text, message in mistakes.items():
        with pytest.raises(UserError, match=message) as caught:
            resolve(text, output_root=outputs)
        assert "\n" not in str(caught.value)
    for text in (plain, "org/model"):
        with pytest.raises(UserError, match="has no score heads"):
            resolve(text, output_root=outputs, require_heads=True)


def test_damaged_or_newer_metadata_is_said_so(outputs: Path) -> None:
    file = outputs / "cost" / "0123456789" / "export" / METADATA_FILE
    whole = json.loads(file.read_text())
    file.write_text(json.dumps({**whole, "format_version": FORMAT_VERSION + 1}))
    with pytest.raises(UserError, match="newer than this program's"):
        read_metadata(file.parent)
    file.write_text("{")
    with pytest.raises(UserError, match=r"damaged saferlhf\.json"):
        read_metadata(file.parent)
    # a key that a later version of the same format adds does no harm
    file.write_text(json.dumps({**whole, "invented_later": 1}))
    assert read_metadata(file.parent).kind == "cost"


def test_content_id_follows_weights_heads_and_kind_not_place_card_or_time(outputs: Path, tmp_path: Path) -> None:
    run = outputs / "cost" / "0123456789"

    def identity(locator: Path) -> str:
        return content_id_of(str(locator), output_root=outputs, cache_dir=tmp_path / "cache")

    first = identity(run)
    assert len(first) == 16
    (run / "export" / "README.md").write_text("another card")
    os.utime(run / "export" / "model.safetensors", (1, 1))
    assert identity(run) == first
    (run / "export").rename(tmp_path / "moved")
    assert identity(tmp_path / "moved") == first

    model = score_model()
    save_export(tmp_path / "b", model=model, tokenizer=tokenizer(), metadata=metadata())
    assert identity(tmp_path / "b") == first, "the same model exported again"
    save_export(tmp_path / "b", model=model, tokenizer=tokenizer(), metadata=metadata(kind="reward"))
    assert identity(tmp_path / "b") != first
    model.heads["cost"].bias.data += 1e-3
    save_export(tmp_path / "b", model=model, tokenizer=tokenizer(), metadata=metadata())
    assert identity(tmp_path / "b") != first, "the bias is part of the model"
    assert content_id_of("org/model", output_root=outputs) == "org/model@main"
    assert content_id_of("org/model", output_root=outputs, revision="v2") == "org/model@v2"
    assert content_id_of("org/model@v1", output_root=outputs) == "org/model@v1"


def test_what_peft_keeps_in_sets_is_written_in_order(tmp_path: Path) -> None:
    """The order of a set changes from process to process; the identity of an adapter must not."""
    save_export(tmp_path / "export", model=score_model(lora=True), tokenizer=tokenizer(), metadata=metadata())
    targets = json.loads((tmp_path / "export" / "adapter_config.json").read_text())["target_modules"]
    assert len(targets) == 14
    assert targets == sorted(targets)


def test_resolving_imports_nothing_heavy() -> None:
    script = (
        "import sys; from saferlhf.models import card, content, locator, metadata, source\n"
        "print([m for m in ('torch', 'transformers', 'peft', 'bitsandbytes', 'mlflow') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_a_large_file_is_hashed_once_and_again_when_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from saferlhf.models import content

    file, cache = tmp_path / "big.safetensors", tmp_path / "cache"
    file.write_bytes(b"a" * (content.REMEMBERED_FROM_BYTES + 1))
    first = content.file_hash(file, cache_dir=cache)
    reads: list[int] = []
    digest = content.hashlib.file_digest
    monkeypatch.setattr(content.hashlib, "file_digest", lambda *a: (reads.append(1), digest(*a))[1])
    assert content.file_hash(file, cache_dir=cache) == first
    assert reads == []
    file.write_bytes(b"b" * (content.REMEMBERED_FROM_BYTES + 1))
    os.utime(file, ns=(10**18, 10**18))
    assert content.file_hash(file, cache_dir=cache) != first
    assert reads == [1]
    next((cache / "hashes").glob("*.json")).write_text("{")  # a damaged note
    content.file_hash(file, cache_dir=cache)
    assert reads == [1, 1]


def test_cache_folder_by_argument_environment_and_default(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from saferlhf.models.content import cache_root

    monkeypatch.setenv("SAFERLHF_CACHE", str(tmp_path))
    assert cache_root() == tmp_path
    assert cache_root(tmp_path / "x") == tmp_path / "x"
    monkeypatch.delenv("SAFERLHF_CACHE")
    assert cache_root() == Path.home() / ".cache" / "saferlhf"


@pytest.mark.slow
def test_tracked_runs(outputs: Path, tmp_path: Path) -> None:
    mlflow = pytest.importorskip("mlflow")
    export = outputs / "cost" / "0123456789" / "export"
    uri = f"sqlite:///{outputs / 'mlflow.db'}"
    client = mlflow.tracking.MlflowClient(tracking_uri=uri)
    experiment = client.create_experiment("e", artifact_location=str(tmp_path / "artefacts"))

    tagged = client.create_run(experiment, tags={"export_folder": str(export)}).info.run_id
    found = resolve(f"runs:/{tagged}", output_root=outputs, require_heads=True)
    assert (found.kind, found.folder, found.run_folder) == ("export", export.resolve(), export.parent.resolve())

    moved = client.create_run(experiment, tags={"export_folder": str(tmp_path / "gone")}).info.run_id
    client.log_artifacts(moved, str(export), "export")
    copy = resolve(f"runs:/{moved}", output_root=outputs, tracking_uri=uri)
    assert content_id_of(copy, output_root=outputs) == content_id_of(found, output_root=outputs)

    bare = client.create_run(experiment).info.run_id
    with pytest.raises(UserError, match="has no export"):
        resolve(f"runs:/{bare}", output_root=outputs)
    with pytest.raises(UserError, match="no tracked run 0000") as caught:
        resolve("runs:/0000", output_root=outputs)
    assert "\n" not in str(caught.value)
