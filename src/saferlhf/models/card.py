"""The model card: what a stranger must know before using an exported model, as Markdown.

Numbers come with their intervals, data with its licence, scores with their sign. Sections without content say so
instead of vanishing, so that a reader sees what is not known.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from saferlhf.models.metadata import ExportMetadata

INTENDED_USE = {
    "sft": "Starting point and reference policy for safety alignment; not aligned itself, and it may comply with"
    " harmful requests.",
    "ppo": "A policy trained on learned scores of its own responses. What those scores miss it may have learned to"
    " exploit; how safe it is, the metrics below say for these prompts and these judges only.",
    "reward": "Ranking responses to one prompt by helpfulness. Scores of different prompts are not comparable, and text"
    " optimised against the model can fool it.",
    "cost": "Judging whether a response is harmful: cost > 0 means unsafe. A research instrument, not the only"
    " safeguard of a product.",
    "moderator": "Saying whether an answer is harmful, of which harm categories, and how severe (0 safe, 1 minor, 2"
    " moderate, 3 severe). Trained on one annotation scheme; what it was not shown it may miss. A research instrument,"
    " not the only safeguard of a product.",
}


def model_card(
    metadata: ExportMetadata,
    *,
    name: str,
    data_report: Mapping[str, Any] | str | None = None,
    metrics: Mapping[str, float] | None = None,
    config: str | None = None,
    data_licence: str | None = None,
    protocol: str | None = None,
) -> str:
    """The card's text.

    Args:
        metadata: as `save_export` completes it (an incomplete one gives an incomplete card).
        name: of the model or run.
        data_report: what the data were, as Markdown; nested mappings become indented lists.
        metrics: flat metric names; `x_low` and `x_high` become the interval of `x`.
        config: excerpt of the resolved configuration, YAML.
        data_licence: licence of the training data; None: not known, and the card says so.
        protocol: how the metrics were measured: split, number of rows, seed, kind of interval.
    """
    lines = ["---", "library_name: saferlhf", "tags: [saferlhf, " + metadata.kind + "]", "---", "", f"# {name}", ""]
    lines += [f"A **{metadata.kind}** model trained with saferlhf.", ""]
    lines += ["## Use", "", INTENDED_USE.get(metadata.kind, "Not described."), ""]
    lines += [f"Sign convention: {metadata.sign_convention}.", ""]
    lines += ["```python", "from saferlhf.models.loading import load_export", ""]
    lines += ['loaded = load_export("this folder")  # loaded.model, loaded.tokenizer, loaded.heads', "```", ""]
    lines += ["## Model", "", *_facts(metadata), ""]
    if metadata.calibration is not None:
        lines += ["## Calibration", "", *_calibration(metadata.calibration, metadata), ""]
    lines += ["## Metrics", "", *([protocol, ""] if protocol else []), *_metric_table(metrics or {}), ""]
    lines += ["## Data", "", f"Licence of the training data: {data_licence or 'not stated by its source'}.", ""]
    if data_licence and "nc" in data_licence.lower().replace("-", " ").split():
        lines += ["The data's licence excludes commercial use; ask a lawyer what follows for models trained on it.", ""]
    report = [data_report] if isinstance(data_report, str) else _nested(data_report or {})
    lines += [*(report or ["No data report."]), ""]
    lines += ["## Lineage", "", *_lineage(metadata.lineage), ""]
    if config:
        lines += ["## Configuration", "", "```yaml", config.rstrip(), "```", ""]
    return "\n".join(lines)


def _facts(metadata: ExportMetadata) -> list[str]:
    base = metadata.base
    facts = {
        "Base": base.get("name") or base.get("backbone", {}).get("model") or base.get("backbone", {}).get("name"),
        "Base identity": base.get("content_id"),
        "Weights in this folder": metadata.weights,
        "Heads": ", ".join(f"{head} ({width})" for head, width in metadata.heads.items()) or "none",
        "Pooling": metadata.pooling,
        "Chat template": metadata.template,
        "Longest sequence": f"{metadata.max_length} tokens" if metadata.max_length else None,
        "Quantisation in training": _inline(metadata.quantization),
        "Adapter": _inline(metadata.adapter),
        "Thresholds": _inline(metadata.thresholds),
    }
    lines = [f"- {key}: {value}" for key, value in facts.items() if value]
    if metadata.merge_exact is False:
        lines.append(
            "- The adapter was merged into unpacked 4-bit weights; scores differ from the trained model's by the"
            f" rounding of {(metadata.quantization or {}).get('compute_dtype')} products."
        )
    return lines


def _calibration(calibration: Mapping[str, Any], metadata: ExportMetadata) -> list[str]:
    """Thresholds and temperatures of a moderator, or that there are none of its own."""
    what = "prompts alone" if metadata.input == "prompt" else "prompts with responses"
    if not calibration["rows"]:
        lines = [
            "**Not calibrated**: there were no held-out rows to fit on, so all temperatures are 1 and thresholds 0.5."
        ]
    else:
        rows, source = calibration["rows"], calibration["fitted_on"]
        objectives = ", ".join(f"{head}: {objective}" for head, objective in calibration["objectives"].items())
        lines = [f"Fitted on {rows:,} rows ({source}), never on test rows. Thresholds maximise {objectives}."]
    heads = [head for head in ("unsafe", "category", "severity") if head in metadata.heads]
    temperatures = ", ".join(f"{head} {_number(calibration[f'temperature_{head}'])}" for head in heads)
    second, third = calibration["thresholds_severity"]
    lines += ["", f"- Reads: {what}", f"- Temperatures: {temperatures}"]
    share = calibration.get("severity_share", 0.0)
    by_severity = f", {_number(share)} of which the severity head says" if share else ""
    lines.append(f"- Unsafe from p = {_number(calibration['threshold_unsafe'])}{by_severity}")
    if metadata.heads.get("severity"):
        lines.append(f"- Given unsafe, severity 2 from p(2 or 3) = {_number(second)}, 3 from p(3) = {_number(third)}")
    if calibration["categories"]:
        names = zip(calibration["categories"], calibration["thresholds_category"], strict=True)
        lines += ["", "| harm category | from p |", "|---|---|"]
        lines += [f"| {name} | {_number(threshold)} |" for name, threshold in names]
    return lines


def _metric_table(metrics: Mapping[str, float]) -> list[str]:
    names = [n for n in metrics if not (n.endswith(("_low", "_high")) and n.rsplit("_", 1)[0] in metrics)]
    if not names:
        return ["None measured."]
    rows = ["| metric | value | interval |", "|---|---|---|"]
    for name in sorted(names):
        low, high = metrics.get(f"{name}_low"), metrics.get(f"{name}_high")
        interval = "" if low is None or high is None else f"{_number(low)} to {_number(high)}"
        rows.append(f"| {name} | {_number(metrics[name])} | {interval} |")
    return rows


def _lineage(lineage: Sequence[Mapping[str, Any]]) -> list[str]:
    if not lineage:
        return ["Trained directly on the base."]
    return [f"{number}. {_inline(parent)}" for number, parent in enumerate(lineage, start=1)]


def _nested(report: Mapping[str, Any], depth: int = 0) -> list[str]:
    lines = []
    for key, value in report.items():
        if isinstance(value, Mapping):
            lines += [f"{'  ' * depth}- {key}:", *_nested(value, depth + 1)]
        else:
            lines.append(f"{'  ' * depth}- {key}: {_number(value)}")
    return lines


def _inline(value: Mapping[str, Any] | None) -> str:
    return ", ".join(f"{key} {_number(item)}" for key, item in (value or {}).items())


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
