"""Sources: where canonical rows come from. Nothing downstream knows which one it was.

`toyworld` generates rows and splits them by prompt itself; `file` reads JSON lines, JSON, CSV or Parquet, local or from
the Hugging Face hub, by a layout and a column mapping; `mix` puts several of these together. A data set with a name is
a file of `conf/data/` that says how `file` reads it. A new source is a function `(cfg, kind, needs) -> SourceRows`
entered in `SOURCES`.
"""

from __future__ import annotations

from collections.abc import Sequence

from saferlhf.config.schema import DataConfig
from saferlhf.data.rows import Row
from saferlhf.data.sources.base import Source, SourceRows
from saferlhf.data.sources.files import file_rows
from saferlhf.data.sources.locate import Located, locate
from saferlhf.data.sources.mix import mix_rows
from saferlhf.data.sources.toy import TOY_ROWS, Generate, toyworld_rows
from saferlhf.errors import UserError


def load_source(cfg: DataConfig, kind: type[Row], needs: Sequence[str]) -> SourceRows:
    """Read or generate the rows of a data config.

    Args:
        kind: the record type wanted; files that hold pairs give pairs where answers or prompts are wanted, which
            `data/melt.py` takes apart after the checks.
        needs: canonical label columns the task cannot do without.

    Raises:
        UserError: unknown source, unreadable or empty file, wrong schema, a file in which no record is right.
    """
    if cfg.source not in SOURCES:
        raise UserError(f"unknown source '{cfg.source}'", "data.source", f"known are {', '.join(SOURCES)}")
    return SOURCES[cfg.source](cfg, kind, needs)


def _mix(cfg: DataConfig, kind: type[Row], needs: Sequence[str]) -> SourceRows:
    return mix_rows(cfg, lambda part: load_source(part, kind, needs))


SOURCES: dict[str, Source] = {"toyworld": toyworld_rows, "file": file_rows, "mix": _mix}

__all__ = [
    "SOURCES",
    "TOY_ROWS",
    "Generate",
    "Located",
    "Source",
    "SourceRows",
    "load_source",
    "locate",
]
