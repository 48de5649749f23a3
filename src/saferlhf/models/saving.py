"""Writing a transformers model to a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from saferlhf.models.quiet import quiet_transformers


def save_in_this_process(model: Any, folder: str | Path) -> None:
    """`save_pretrained` by whichever process calls; of a group, transformers would write in the first alone."""
    model.should_save_on_this_rank = lambda is_main_process: is_main_process
    try:
        with quiet_transformers():
            model.save_pretrained(str(folder))
    finally:
        del model.should_save_on_this_rank
