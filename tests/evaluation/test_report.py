"""The report is one well-formed page that needs nothing else and shows what it was given."""

import re
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
from sklearn import metrics as sk

from saferlhf.data.rows import PreferencePair, as_prompt
from saferlhf.evaluation import moderation_plots, plots
from saferlhf.evaluation.provenance import Provenance
from saferlhf.evaluation.report import write_report
from saferlhf.evaluation.report_style import visible
from saferlhf.ops.calibration import Calibration, decide
from saferlhf.ops.moderation import ModerationLabels, ModerationLogits

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


# ------------------------------------------------------------------------------------------------ hostile text
def test_the_page_lets_a_browser_do_nothing_but_show_it(page):
    policy = re.search(r'<meta http-equiv="Content-Security-Policy" content="([^"]*)">', page)[1]
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == rules["base-uri"] == rules["form-action"] == "'none'"
    assert rules["style-src"] == "'unsafe-inline'" and rules["img-src"] == "data:" and len(rules) == 5
    assert page.index("Content-Security-Policy") < page.index("<title>") < page.index("<style>")


def test_what_cannot_be_seen_becomes_a_sign(tmp_path):
    odd = "a\x00b\x1bc\x7fd\x85e\u202ef\u2066g\ud800h\u2028i"
    page = write_report(tmp_path / "report.html", title=odd, metrics={}, config={"key": "x\x00"}).read_text()
    assert page.count("a␀b␛c␡d⟨U+0085⟩e⟨U+202E⟩f⟨U+2066⟩g⟨U+D800⟩h⟨U+2028⟩i") == 2
    # what belongs to texts of the world stays: lines, tabs, joiners and marks of direction of a letter
    assert visible("a\tb\nc\r\u200d\u200f\u064a👩\u200d🔬é") == "a\tb\nc\r\u200d\u200f\u064a👩\u200d🔬é"


def test_passwords_in_addresses_are_left_out(tmp_path):
    config = {"tracking": {"uri": "https://me:secret@store/x"}}
    page = write_report(tmp_path / "r.html", title="t", metrics={}, config=config, lineage={"uri": "s://me:secret@b"})
    assert "secret" not in page.read_text() and "https://store/x" in page.read_text()


def test_figures_samples_and_provenance_have_their_places(tmp_path):
    drawing = plots.curves_svg("lambda", {"train": [(1, 0.5), (2, 1.0)]})
    broad = drawing.replace('viewBox="0 0 403.2', 'viewBox="0 0 648').replace('"lambda"', '"broad"')
    assert broad.count("648") == 1
    page = write_report(
        tmp_path / "report.html",
        title="t",
        metrics=METRICS,
        config={},
        figures={"Training <x>": [drawing, broad], "none": []},
        samples=["<section><h2>Samples</h2></section>"],
        provenance=Provenance({"seed": "7 <b>"}, (), "python evaluate.py 'a b'"),
    ).read_text()
    assert Page(page).open == []
    assert re.findall("<h2>(.*?)</h2>", page) == [
        *("Verdict", "Training &lt;x&gt;", "Samples", "All metrics", "Provenance"),
    ]
    assert re.findall(r"<figure(.*?)><figcaption>(.*?)<", page) == [("", "lambda"), (" class=broad", "broad")]
    assert "7 &lt;b&gt;" in page and "python evaluate.py &#x27;a b&#x27;" in page


def test_of_many_headlines_the_first_of_each_area_is_a_card(tmp_path):
    names = ("unsafe/macro_f1", "unsafe/accuracy", "unsafe/f1", "unsafe/auroc", "severity/accuracy")

    def cards(protocols):
        metrics = {f"p{i}/{name}": 0.5 for i in range(protocols) for name in names}
        page = write_report(tmp_path / "r.html", title="t", metrics=metrics, config={}).read_text()
        return re.findall(r'<div class="name">(.*?)</div>', page), "metrics</summary>" in page

    assert cards(3) == ([f"p{i}/{n}" for i in range(3) for n in names], False)
    assert cards(4) == ([f"p{i}/{n}" for i in range(4) for n in ("unsafe/macro_f1", "severity/accuracy")], False)
    assert cards(25) == ([], True)  # the table says it, behind a click


# ------------------------------------------------------------------------------------------------ a moderator's plots
def moderated(n=300, names=("White-Collar Crime", "Drugs", "costs $5 and $6")):
    rng = np.random.default_rng(0)
    unsafe = (rng.random(n) < 0.4).astype(np.int64)
    category = ((rng.random((n, len(names))) < 0.4) & (unsafe[:, None] == 1)).astype(np.int64)
    labels = ModerationLabels(np.where(np.arange(n) < 9, -1, unsafe), np.full(n, -1), category, names)
    logits = ModerationLogits(
        2 * unsafe + rng.normal(size=n).round(1), None, 3.0 * category - 2 + rng.normal(size=(n, 3))
    )
    return labels, decide(logits, Calibration.default(names))


def test_the_curves_are_scikit_learns(monkeypatch):
    labels, verdicts = moderated()
    drawn = {}

    def keep(figure, title):
        drawn[title] = [(line.get_xdata(), line.get_ydata(), line.get_label()) for line in figure.axes[0].lines]
        return f'<svg aria-label="{title}"/>'

    monkeypatch.setattr(moderation_plots, "to_svg", keep)
    moderation_plots.moderation_drawings(labels, verdicts)
    known = labels.unsafe >= 0
    truth, scores, said = labels.unsafe[known], verdicts.unsafe_logit[known], verdicts.unsafe[known]
    _, (fpr, tpr, area), _ = drawn["ROC of unsafe"]
    expected = sk.roc_curve(truth, scores, drop_intermediate=False)
    assert np.allclose(fpr, expected[0]) and np.allclose(tpr, expected[1])
    assert area == f"AUROC {sk.roc_auc_score(truth, scores):.3f}"
    base, (recall, precision, area), threshold = drawn["precision and recall of unsafe"]
    expected = sk.precision_recall_curve(truth, scores)
    assert np.allclose(recall[1:], expected[1][:-1][::-1]) and np.allclose(precision[1:], expected[0][:-1][::-1])
    assert area == f"average precision {sk.average_precision_score(truth, scores):.3f}"
    # the area under the steps as they are drawn is the number beside them
    assert np.sum(np.diff(recall) * precision[1:]) == pytest.approx(sk.average_precision_score(truth, scores))
    assert base[1] == pytest.approx([truth.mean()] * 2)
    place = (threshold[0][0], threshold[1][0])
    assert place == pytest.approx((sk.recall_score(truth, said), sk.precision_score(truth, said)))


def test_what_is_taken_for_what_by_hand():
    has = np.array([[1, 0], [1, 0], [1, 1], [0, 1], [0, 0], [0, 0]], dtype=bool)
    said = np.array([[1, 0], [1, 1], [1, 1], [1, 0], [0, 0], [0, 1]], dtype=bool)
    shares, counts = moderation_plots.mixed_up_shares(has, said)
    assert counts.tolist() == [3, 2, 2]
    # first: found on 3 of 3; on 1 of the 2 without the second the second was called; never nothing
    # second: found on 1 of 2; on the 1 without the first the first was called; never nothing
    # none: 2 answers, on none the first, on 1 the second, on 1 nothing
    assert shares == pytest.approx(np.array([[1, 1 / 2, 0], [1, 1 / 2, 0], [0, 1 / 2, 1 / 2]]))
    always = np.ones((3, 2), dtype=bool)
    shares, _ = moderation_plots.mixed_up_shares(always, always)
    assert np.isnan(shares[0, 1]) and shares[0, 0] == 1 and np.isnan(shares[2]).all()


def test_names_of_categories_are_no_formulas():
    labels, verdicts = moderated()
    drawings = moderation_plots.moderation_drawings(labels, verdicts)
    titles = [svg.split('aria-label="')[1].split('"')[0] for svg in drawings]
    assert titles[:2] == ["ROC of unsafe", "precision and recall of unsafe"]
    assert titles[-2:] == ["harm categories", "harm categories taken for others"]
    assert all("costs $5 and $6" in svg for svg in drawings[-2:])


def test_evaluation_does_not_import_heavy_packages():
    code = (
        "import sys; import saferlhf.evaluation.report, saferlhf.evaluation.truth, saferlhf.evaluation.likelihood; "
        "print([name for name in ('torch', 'matplotlib', 'sklearn', 'mlflow', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
