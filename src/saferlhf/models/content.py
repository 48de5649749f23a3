"""Identity of model files by their content, not by where they lie.

A folder's id is SHA-256 over its weights, configuration and tokenizer, file by file; time stamps, paths, cards and
reports do not enter. Hashes of large files are remembered by (path, size, modification time) in the cache folder.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

CONTENT_SUFFIXES = (".safetensors", ".jinja", ".model", ".gguf")
CONTENT_NAMES = (
    "config.json",
    "adapter_config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "model.safetensors.index.json",
)
REMEMBERED_FROM_BYTES = 1 << 20


def cache_root(cache_dir: str | Path | None = None) -> Path:
    """The project's cache folder: `cache_dir`, else $SAFERLHF_CACHE, else ~/.cache/saferlhf."""
    return Path(cache_dir or os.environ.get("SAFERLHF_CACHE") or "~/.cache/saferlhf").expanduser()


def folder_hash(folder: Path, *, extra: str = "", cache_dir: str | Path | None = None) -> str:
    """16 hex digits over the model files right in `folder`, and `extra`."""
    digest = hashlib.sha256(extra.encode())
    for file in sorted(folder.iterdir()):
        if file.is_file() and (file.suffix in CONTENT_SUFFIXES or file.name in CONTENT_NAMES):
            digest.update(f"\x00{file.name}\x00{file_hash(file, cache_dir=cache_dir)}".encode())
    return digest.hexdigest()[:16]


def file_hash(file: Path, *, cache_dir: str | Path | None = None) -> str:
    """SHA-256 of a file's bytes; large files are read again only when their size or modification time changed."""
    status = file.stat()
    if status.st_size < REMEMBERED_FROM_BYTES:
        return hashlib.sha256(file.read_bytes()).hexdigest()
    key = hashlib.sha256(str(file.resolve()).encode()).hexdigest()[:32]
    note = cache_root(cache_dir) / "hashes" / f"{key}.json"
    stamp = [status.st_size, status.st_mtime_ns]
    try:
        remembered = json.loads(note.read_text())
        if remembered["stamp"] == stamp:
            return str(remembered["sha256"])
    except (OSError, ValueError, KeyError, TypeError):
        pass  # never hashed, or the note is damaged: hash again
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    _remember(note, {"stamp": stamp, "sha256": digest})
    return digest


def _remember(note: Path, value: dict[str, object]) -> None:
    try:
        note.parent.mkdir(parents=True, exist_ok=True)
        draft = note.with_suffix(f".{os.getpid()}.tmp")
        draft.write_text(json.dumps(value))
        draft.replace(note)
    except OSError:
        pass  # a cache folder that cannot be written costs time, not correctness


def apply_umask(folder: Path) -> None:
    """Give new files the permissions any new file has; safetensors writes them for their owner alone."""
    umask = os.umask(0)
    os.umask(umask)
    for file in folder.rglob("*"):
        if file.is_file():
            file.chmod(0o666 & ~umask)
