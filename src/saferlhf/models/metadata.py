"""`saferlhf.json`: what a Hugging Face folder does not say about an exported model.

Kind, heads, pooling, template, sign convention, quantisation, adapter, what the adapter sits on, and where the weights
came from. Written beside the weights; read back without loading any.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from saferlhf.errors import UserError

FORMAT_VERSION = 1
METADATA_FILE = "saferlhf.json"
HEADS_FILE = "heads.safetensors"
SIGN_CONVENTION = "cost > 0 means unsafe; label positive = unsafe"


@dataclass
class ExportMetadata:
    """What `saferlhf.json` holds. The caller fills the first block; `save_export` fills the second.

    Attributes:
        kind: sft, reward, cost, ...; "plain" for a Hugging Face model that this project did not write.
        pooling: last | mean; None without heads.
        layers: numbers of the hidden states that the heads read; None: the last one (`models/layers.py`).
        span: all | prompt | response | both: the tokens that are pooled; None without heads.
        kernel: "gaussian": it stands between pooled states and heads (`models/kernel_map.py`); None: nothing does.
        template: native | paper: the chat format the model was trained in.
        max_length: tokens of prompt + response.
        lineage: parents, oldest first: {"role", "locator", "content_id", ...}.
        thresholds: name -> value, for kinds that decide.
        categories: harm categories, in the order of the category head; None without such a head.
        calibration: a moderator's temperatures and thresholds (`ops/calibration.py`); None for other kinds.
        input: prompt_and_response | prompt: what a moderator reads; None for other kinds.
        extra: anything else worth keeping (seed, data revision, run identity); plain JSON.
        heads: name -> number of scores.
        weights: full | adapter | merged | base (heads on a base that nothing was changed in, named as an adapter's is).
        base: what an adapter sits on, and how the base is loaded again; how the base was loaded otherwise.
        quantization: of the base as it was trained; with `weights: merged` the stored weights are no longer packed.
        adapter: LoRA's configuration, None without.
        merge_exact: None if nothing was merged; False if merged scores differ from the trained model's by more than
            rounding, since it multiplied packed weights in less than float32.
    """

    kind: str
    template: str = "native"
    pooling: str | None = None
    layers: list[int] | None = None
    span: str | None = None
    kernel: str | None = None
    max_length: int | None = None
    lineage: list[dict[str, Any]] = field(default_factory=list)
    thresholds: dict[str, float] = field(default_factory=dict)
    categories: list[str] | None = None
    calibration: dict[str, Any] | None = None
    input: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    heads: dict[str, int] = field(default_factory=dict)
    weights: str = "full"
    base: dict[str, Any] = field(default_factory=dict)
    quantization: dict[str, Any] | None = None
    adapter: dict[str, Any] | None = None
    merge_exact: bool | None = None
    sign_convention: str = SIGN_CONVENTION
    format_version: int = FORMAT_VERSION

    def identity(self) -> str:
        """The part that changes what the model computes, as text; the base enters by its content."""
        parts: list[Any] = [self.kind, self.template, self.pooling, self.heads, self.weights, self.quantization]
        parts.append(self.thresholds)
        if self.weights in ("adapter", "base"):
            parts.append(self.base.get("content_id"))
        if self.layers is not None or self.span not in (None, "all"):  # left out where exports never had them
            parts.append([self.layers, self.span])
        if self.kernel is not None:
            parts.append(self.kernel)
        if self.calibration is not None:
            parts.append([self.categories, self.calibration, self.input])
        return json.dumps(parts, sort_keys=True)

    def write(self, folder: Path) -> None:
        """Write `saferlhf.json` into the folder."""
        (folder / METADATA_FILE).write_text(json.dumps(asdict(self), indent=2, sort_keys=True) + "\n")


def read_metadata(folder: Path) -> ExportMetadata:
    """`saferlhf.json` of an export folder; UserError if it is missing, damaged or of a newer format."""
    file = folder / METADATA_FILE
    try:
        raw: Mapping[str, Any] = json.loads(file.read_text())
        version = raw["format_version"]
        kind = raw["kind"]
    except FileNotFoundError:
        raise UserError("not an export folder: no saferlhf.json", str(folder), "name a run or its export/") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"damaged {METADATA_FILE}: {error!r}", str(folder), "export the model again") from error
    if version > FORMAT_VERSION:
        raise UserError(
            f"export format {version} is newer than this program's {FORMAT_VERSION}", str(folder), "upgrade"
        )
    known = {f.name for f in fields(ExportMetadata)}
    return ExportMetadata(**{"kind": kind, **{key: value for key, value in raw.items() if key in known}})
