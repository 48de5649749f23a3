"""Checks of `evaluate.py mode=moderate input=... output=...`: verdicts as a stream of lines."""

from __future__ import annotations

from dataclasses import replace

from saferlhf.config.evaluate_schema import EvaluateConfig
from saferlhf.config.schema import DataConfig
from saferlhf.errors import UserError


def check_stream(config: EvaluateConfig) -> DataConfig:
    """Refuse keys that say nothing of a stream.

    Returns:
        The data config; of a stream, which has no rows but its own, as one of a file.
    """
    data = config.data
    if config.input is None:
        if config.output is not None:
            mend = "add input=FILE, or input=- for standard input"
            raise UserError("nothing is read for it", f"output={config.output}", mend)
        return data
    if config.mode != "moderate":
        raise UserError("lines are judged by a moderator", f"input={config.input}", "add mode=moderate")
    if data.path is not None:
        mend = "leave out data=, or leave out input="
        raise UserError("rows of a file and a stream of lines are two things", "input, data.path", mend)
    for key, value in (("split", config.split), ("evaluation.max_rows", config.evaluation.max_rows)):
        if value is not None:
            raise UserError("a stream is judged from its first line to its last", key, f"{key}=null")
    if config.trainer.devices > 1:
        raise UserError("a stream is judged by one process", f"trainer.devices={config.trainer.devices}", "use 1")
    # the default rows are the toy world's; columns are needed to read lines, and a generated world has none
    return replace(data, source="file", annotators=None) if data.source == "toyworld" else data
