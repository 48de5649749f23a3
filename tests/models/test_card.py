"""The model card says what is known and what is not."""

from __future__ import annotations

from dataclasses import replace

from tiny_models import metadata

from saferlhf.models.card import model_card
from saferlhf.models.metadata import ExportMetadata
from saferlhf.ops.calibration import Calibration


def complete() -> ExportMetadata:
    return ExportMetadata(
        kind="cost",
        pooling="last",
        heads={"cost": 1},
        weights="merged",
        merge_exact=False,
        quantization={"name": "nf4", "compute_dtype": "bfloat16"},
        base={"name": "org/model", "content_id": "org/model@main", "backbone": {}},
        lineage=[{"role": "init", "locator": "outputs/sft/1", "content_id": "abc"}],
        max_length=512,
    )


def test_everything_known_is_on_the_card() -> None:
    metrics = {
        "test/cost/pair_accuracy": 0.75123,
        "test/cost/pair_accuracy_low": 0.7,
        "test/cost/pair_accuracy_high": 0.8,
        "test/loss": 1.5,
    }
    text = model_card(
        complete(),
        name="cost/0123456789",
        data_report={"train": {"rows": 100, "dropped": {"identical": 2}}, "revision": "r1"},
        metrics=metrics,
        config="task:\n  name: cost\n",
        data_licence="CC-BY-NC-4.0",
        protocol="test split, 100 rows, seed 0",
    )
    assert text.startswith("---\n")
    assert "# cost/0123456789" in text
    assert "cost > 0 means unsafe" in text
    assert "| test/cost/pair_accuracy | 0.7512 | 0.7 to 0.8 |" in text
    assert "| test/loss | 1.5 |  |" in text
    assert "pair_accuracy_low" not in text
    assert "Licence of the training data: CC-BY-NC-4.0." in text
    assert "excludes commercial use" in text
    assert "    - identical: 2" in text
    assert "1. role init, locator outputs/sft/1, content_id abc" in text
    assert "```yaml\ntask:\n  name: cost\n```" in text
    assert "rounding of bfloat16 products" in text
    assert "test split, 100 rows, seed 0" in text
    assert "None" not in text


def test_who_says_what_is_unsafe() -> None:
    fitted = Calibration(threshold_unsafe=0.4, severity_share=0.25, rows=50, fitted_on="val")
    moderator = ExportMetadata("moderator", heads={"unsafe": 1, "severity": 3}, calibration=fitted.to_dict())
    assert "- Unsafe from p = 0.4, 0.25 of which the severity head says" in model_card(moderator, name="x")
    alone = ExportMetadata("moderator", heads={"unsafe": 1}, calibration=replace(fitted, severity_share=0.0).to_dict())
    assert "- Unsafe from p = 0.4\n" in model_card(alone, name="x")


def test_what_is_not_known_is_said() -> None:
    text = model_card(metadata("sft"), name="x")
    for sentence in ("not stated by its source", "None measured.", "No data report.", "Trained directly on the base."):
        assert sentence in text
    assert "excludes commercial use" not in text
    assert "may comply with harmful requests" in text


def test_a_metric_that_only_looks_like_a_bound_is_shown() -> None:
    text = model_card(metadata(), name="x", metrics={"severity_low": 0.5})
    assert "| severity_low | 0.5 |  |" in text
