"""Pictures and tables of models beside each other, from comparisons made by hand."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from saferlhf.evaluation.comparison_plots import dots_png, dots_svg, figures_html, forest_png, forest_svg
from saferlhf.evaluation.comparison_table import comparison_html, comparison_lines, comparison_markdown
from saferlhf.evaluation.model_comparison import Difference, MetricComparison, ProtocolComparison
from saferlhf.evaluation.paired_intervals import Estimate
from saferlhf.ops.intervals import Interval

NONE = {"a <b>": 0, "c": 0}


def comparison(p_holm: float = 0.01, headline: bool = True, metric: str = "unsafe/f1") -> ProtocolComparison:
    values = {"a <b>": Estimate(0.9, Interval(0.85, 0.95)), "c": Estimate(0.8, None)}
    d = Difference("a <b>", "c", Estimate(0.1, Interval(0.02, 0.18)), 0.004, p_holm, 0.0004, 0.114)
    found = MetricComparison(metric, headline, values, (d,))
    return ProtocolComparison("toy", 1200, 30, {"a <b>": 3, "c": 1}, NONE | {"c": 2}, NONE, (found,), ("look out",))


def cells(comparisons: Sequence[ProtocolComparison]) -> list[tuple[str, tuple[str, ...], bool]]:
    return [(line.name, line.cells, line.sure) for line in comparison_lines(comparisons)]


def test_lines_of_the_table() -> None:
    assert cells([comparison()]) == [
        ("toy  unsafe/f1", ("1,200 rows, 30 prompts",), False),
        ("a <b> (mean of 3 runs)", ("0.900 [0.850, 0.950]",), False),
        ("c", ("0.800",), False),
        ("a <b> − c", ("+0.100 [+0.020, +0.180]", "0.004", "0.010", "<0.001", "0.114"), True),
    ]
    # sure is what stays below the level when all questions are counted
    assert not cells([comparison(p_holm=0.06)])[-1][2] and not cells([comparison(p_holm=np.nan)])[-1][2]
    assert cells([comparison(headline=False)]) == []


def test_what_was_not_tested_is_a_dash() -> None:
    found = comparison()
    d = Difference("a <b>", "c", Estimate(np.nan, None))
    metric = dataclasses.replace(found.metrics[0], differences=(d,))
    assert cells([dataclasses.replace(found, metrics=(metric,))])[-1][1] == ("-",) * 5


def test_notes_and_escaping() -> None:
    text, page = comparison_markdown([comparison()]), comparison_html([comparison()])
    for shown in (text, page):
        assert "c has 2 rows that another lacks" in shown and "toy: look out" in shown
        assert "one run of c: what another seed would give" in shown
    assert "**a <b> − c**" in text and "<th>a &lt;b&gt; − c</th>" in page and "a <b>" not in page


def test_pictures(tmp_path: Path) -> None:
    both = [comparison(), comparison(p_holm=0.5, metric="unsafe/auroc")]
    for svg, png in ((forest_svg, forest_png), (dots_svg, dots_png)):
        drawn = svg(both)
        assert drawn is not None and drawn == svg(both) and drawn.startswith('<svg role="img" aria-label="')
        assert "a &lt;b&gt;" in drawn and "unsafe/auroc" in drawn
        assert png(tmp_path / "one.png", both) and png(tmp_path / "two.png", both)
        assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()
        # nothing but headlines is drawn
        assert svg([comparison(headline=False)]) is None and not png(tmp_path / "none.png", [])
    assert not (tmp_path / "none.png").exists()
    assert figures_html(both).count("<svg") == 2 and figures_html([]) == ""
    # a sure difference is filled, which needs other drawing commands
    assert forest_svg([comparison()]) != forest_svg([comparison(p_holm=0.5)])
