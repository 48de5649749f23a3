"""The report is one well-formed page that needs nothing else and shows what it was given."""

import re
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest

from saferlhf.data.rows import PreferencePair, as_prompt
from saferlhf.evaluation import plots
from saferlhf.evaluation.report import write_report

VOID = {"meta", "br", "link", "img", "path", "use", "rect", "image"}


class Page(HTMLParser):
    """Checks nesting and gathers ids, links and visible text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.tags: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value)
            if name in ("href", "src", "xlink:href"):
                self.links.append(value)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data):
        self.text += data


METRICS = {
    "test/cost/sign_accuracy": 0.97,
    "test/cost/sign_accuracy_low": 0.95,
    "test/cost/sign_accuracy_high": 0.98,
    "test/cost/sign_accuracy_n": 400.0,
    "test/cost/score_mean": -0.2,
}


def rows_and_scores(n=40):
    rng = np.random.default_rng(0)
    costs = rng.normal(size=(n, 2)) * 2
    rows = [
        PreferencePair(
            f"r{i}",
            as_prompt(f"p{i}"),
            "a",
            "b",
            is_response_0_safe=bool(costs[i, 0] < 0.3),
            is_response_1_safe=bool(costs[i, 1] < 0.3),
            better_response_id=0,
            safer_response_id=int(costs[i, 1] < costs[i, 0]),
        )
        for i in range(n)
    ]
    return rows, costs


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    rows, costs = rows_and_scores()
    path = write_report(
        tmp_path_factory.mktemp("run") / "deep" / "report.html",
        title="cost: tiny on <toyworld> & more",
        subtitle="run 0123456789",
        metrics=METRICS,
        config={"task": {"name": "cost"}, "data": {"path": "<script>alert(1)</script>"}},
        data_report={"train": {"rows": 24000, "dropped": {"identical": 12}}, "splits": ["train", "test"]},
        curves={
            "train/loss": [(step, 1.0 / step) for step in range(1, 300)],
            "val/loss": [(100, 0.5), (200, float("nan")), (300, 0.4)],
            "train/lr": [(1, 1e-3), (300, 0.0)],
            "val/empty": [],
        },
        histograms=plots.score_histograms(rows, costs, kind="cost"),
        lineage={"commit": "abc123", "init": None},
        commands=["python train.py task=cost data=toyworld backbone=tiny seed=0"],
    )
    return path.read_text(encoding="utf-8")


def test_page_is_well_formed_and_needs_nothing_else(page):
    parsed = Page(page)
    assert parsed.open == []
    assert "script" not in parsed.tags
    assert "link" not in parsed.tags
    assert all(link.startswith("#") for link in parsed.links), "a link out of the page"
    assert "url(" not in re.sub(r"url\(#\w+\)", "", page)
    assert "@import" not in page
    assert len(page) < 400_000


def test_ids_are_unique_and_references_hit(page):
    parsed = Page(page)
    assert len(parsed.ids) == len(set(parsed.ids))
    referred = {link[1:] for link in parsed.links} | set(re.findall(r"url\(#(\w+)\)", page))
    assert referred <= set(parsed.ids)


def test_page_shows_what_it_was_given(page):
    text = Page(page).text
    for piece in (
        "cost: tiny on <toyworld> & more",
        "run 0123456789",
        "0.9700",
        "0.9500 .. 0.9800",
        "n = 400",
        "train.dropped.identical",
        "24,000",
        "abc123",
        "python train.py task=cost data=toyworld backbone=tiny seed=0",
        "<script>alert(1)</script>",  # as text
        "safe (",
        "unsafe (",
    ):
        assert piece in text, piece


def test_page_has_one_panel_per_quantity(page):
    captions = re.findall(r"<figcaption>(.*?)</figcaption>", page)
    assert captions == [
        "loss",
        "lr",
        "cost of the two responses",
        "cost by safety label",
        "difference within a pair",
    ]


def test_drawings_follow_the_page_colours(page):
    assert "prefers-color-scheme: dark" in page
    drawings = "".join(re.findall(r"<svg.*?</svg>", page, re.DOTALL))
    assert "currentColor" in drawings
    assert "var(--series-1" in drawings
    assert not re.findall(r"#0[0a]0[0a]0\d|#01010\d|#02020\d", drawings), "a marker colour was left"


def test_same_input_same_bytes_and_no_draft_left(tmp_path):
    arguments = {"title": "t", "metrics": METRICS, "config": "a: 1", "curves": {"train/loss": [(1, 1.0), (2, 0.5)]}}
    first = write_report(tmp_path / "report.html", **arguments).read_bytes()
    second = write_report(tmp_path / "report.html", **arguments).read_bytes()
    assert first == second
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_report_of_almost_nothing(tmp_path):
    page = write_report(tmp_path / "report.html", title="empty", metrics={}, config={}).read_text()
    assert Page(page).open == []
    assert "Verdict" not in page


def test_zero_is_a_bin_edge_when_it_is_a_border():
    values = np.random.default_rng(0).normal(size=500) + 0.3
    edges = plots._bins(values, zero_is_edge=True)
    assert np.abs(edges).min() < 1e-12
    assert edges[0] <= np.quantile(values, 0.001)
    assert edges[-1] >= np.quantile(values, 0.999)
    assert 38 <= len(edges) <= 44
    assert len(plots._bins(np.zeros(5), zero_is_edge=True)) > 2


def test_curves_are_thinned_and_smoothed_without_losing_their_ends():
    points = np.stack([np.arange(5000.0), np.ones(5000)], axis=1)
    thin = plots._thin(points)
    assert len(thin) == 600
    assert (thin[0, 0], thin[-1, 0]) == (0.0, 4999.0)
    assert plots._running_mean(points)[:, 1] == pytest.approx(1.0)
    ramp = np.stack([np.arange(300.0), np.arange(300.0)], axis=1)
    assert plots._running_mean(ramp)[10:-10, 1] == pytest.approx(ramp[10:-10, 1])


def test_score_histograms_split_rows_rightly():
    rows, costs = rows_and_scores()
    panels = plots.score_histograms(rows, costs, kind="cost")
    by_safety = panels[1]
    assert by_safety.zero_line
    assert max(by_safety.groups["safe"]) < 0.3 <= min(by_safety.groups["unsafe"])
    difference = next(iter(panels[2].groups.values()))
    assert (np.asarray(difference) <= 0).all()  # the safer response is the cheaper one in these rows
    reward = plots.score_histograms(rows, costs, kind="reward")
    assert not reward[0].zero_line
    assert np.asarray(reward[0].groups["preferred response"]) == pytest.approx(costs[:, 0])


def test_evaluation_does_not_import_heavy_packages():
    code = (
        "import sys; import saferlhf.evaluation.report, saferlhf.evaluation.truth, saferlhf.evaluation.likelihood; "
        "print([name for name in ('torch', 'matplotlib', 'sklearn', 'mlflow', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
