"""Earlier scores on disk: one small file per question, named by a hash of everything that makes the answer."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from saferlhf.config.files import write_text


def question_key(question: dict[str, Any]) -> str:
    """64 hex digits over everything that makes an answer: server, model, turns, settings."""
    return hashlib.sha256(json.dumps(question, sort_keys=True, ensure_ascii=True).encode()).hexdigest()


class AnswerCache:
    """Scores by the key of their question; texts are not kept.

    Args:
        folder: made when the first answer is kept; None: nothing is kept.

    Several processes may share a folder: files appear whole.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder

    def get(self, key: str) -> dict[str, float] | None:
        """The scores that were kept; None: none, or a file that is damaged."""
        if self.folder is None:
            return None
        try:
            scores = json.loads(self._path(key).read_text())["scores"]
            return {str(name): float(value) for name, value in scores.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None

    def put(self, key: str, scores: dict[str, float]) -> None:
        """Keep scores."""
        if self.folder is not None:
            write_text(self._path(key), json.dumps({"scores": scores}) + "\n")

    def _path(self, key: str) -> Path:
        assert self.folder is not None
        return self.folder / key[:2] / f"{key}.json"
