"""`report.html` in a real browser: hostile text stays text, nothing is fetched, nothing runs, harm waits for a click.

Chromium, headless, without a profile. Dark ground is the browser's own preference (`preferredColorScheme=0`), so that
the page's media query answers as it would for a reader. A page narrower than a browser window may be (500 px) is
looked at in a frame of that width. That the checks can fail is shown by a page without its policy.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from saferlhf.config.evaluate_schema import PeerConfig, ProtocolConfig
from saferlhf.config.schema import DataConfig
from saferlhf.data.rows import Turn
from saferlhf.evaluation.moderation import evaluate_moderation
from saferlhf.evaluation.moderation_plots import moderation_drawings
from saferlhf.evaluation.policy_answers import Judged, PolicyAnswers, PromptSet
from saferlhf.evaluation.policy_plots import scatter_svg
from saferlhf.evaluation.protocol_results import protocol_result, protocols_html
from saferlhf.evaluation.provenance import DataSource, Provenance
from saferlhf.evaluation.report import write_report
from saferlhf.evaluation.report_curves import training_drawings
from saferlhf.evaluation.report_samples import samples_section
from saferlhf.ops.calibration import Calibration, decide
from saferlhf.ops.moderation import ModerationLabels, ModerationLogits

_NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next((found for name in _NAMES if (found := shutil.which(name))), "")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CHROMIUM, reason="no Chromium on PATH"),
]

FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"),
    *("--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-extensions"),
    *("--disable-sync", "--virtual-time-budget=2000", "--enable-logging=stderr", "--v=0"),
)
LIGHT, DARK = "--blink-settings=preferredColorScheme=1", "--blink-settings=preferredColorScheme=0"


# ------------------------------------------------------------------------------------------------ the browser
class Browser:
    """Pages opened one after the other, in a profile that is thrown away."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def _run(self, page: Path, *flags: str) -> subprocess.CompletedProcess[str]:
        profile = f"--user-data-dir={self.folder / 'profile'}"
        command = [CHROMIUM, *FLAGS, profile, *flags, page.resolve().as_uri()]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)

    def open(self, page: Path) -> tuple[str, list[str]]:
        """(the document as the browser has it, what it says on its console)."""
        done = self._run(page, "--dump-dom")
        return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]

    def picture(self, page: Path, name: str, ground: str = LIGHT, size: tuple[int, int] = (1280, 2400)) -> Path:
        """A PNG of the page."""
        path = self.folder / f"{name}.png"
        self._run(page, ground, f"--window-size={size[0]},{size[1]}", f"--screenshot={path}")
        return path


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Browser:
    return Browser(tmp_path_factory.mktemp("browser"))


@pytest.fixture
def server() -> Iterator[tuple[str, list[str]]]:
    """(address of a server, the paths that were asked of it)."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(200)
            self.send_header("Access-Control-Allow-Origin", "*")
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as found:
        threading.Thread(target=found.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{found.server_port}", asked
        found.shutdown()


def title_of(dom: str) -> str:
    return re.search(r"<title>(.*?)</title>", dom, re.DOTALL)[1]  # type: ignore[index]


# ------------------------------------------------------------------------------------------------ pages
def moderation_page(path: Path, *, n: int = 400, names: tuple[str, ...] = ("Drugs", "Insults"), odd: str = "") -> Path:
    """A moderator by two protocols, with `odd` wherever the page takes a text of others."""
    stream = np.random.default_rng(0)
    severity = np.where(stream.random(n) < 0.5, 0, stream.integers(1, 4, n))
    unsafe = (severity > 0).astype(np.int64)
    names = tuple(name + odd for name in names)
    category = ((stream.random((n, len(names))) < 0.3) & (unsafe[:, None] == 1)).astype(np.int64)
    first = np.sort(stream.normal(size=(n, 3)) + severity[:, None] - 1.5, axis=1)[:, ::-1].copy()
    seen = 3.5 * category - 2.5 + stream.normal(size=category.shape)
    logits = ModerationLogits(2 * stream.normal(size=n) + 3 * unsafe - 1.5, first, seen)
    labels = ModerationLabels(unsafe, severity, category, names)
    verdicts = decide(logits, Calibration.default(names))
    metrics: dict[str, float] = {}
    results = []
    for name in ("made_up_test", "second_test"):
        metrics |= evaluate_moderation([str(i) for i in range(n)], labels, logits, verdicts, prefix=name, draws=50)
        metrics |= {f"{name}/baseline_tfidf/unsafe/macro_f1": 0.71, f"{name}/baseline_constant/unsafe/macro_f1": 0.33}
        protocol = ProtocolConfig(
            name, "made-up answers" + odd, "a row is unsafe by a coin" + odd, ["moderation"], "unsafe/macro_f1",
            DataConfig("made_up", "file"), published_rows=900, note="nothing here was measured" + odd,
            peers=[PeerConfig("Another guard" + odd, 0.8, "own", "a paper" + odd),
                   PeerConfig("A third guard", 0.75, "others", "a table of theirs", "second-hand")],
        )  # fmt: skip
        files = [{"name": "rows.jsonl", "sha256": "ab" * 32, "rows": n}]
        marks = ["off-protocol: read without prompts" + odd]
        results.append(
            protocol_result(protocol, metrics, measure="moderation", kind="moderator", rows=n, marks=marks, files=files)
        )
    left_out = [("third_test" + odd, "no such folder" + odd)]
    drawings = moderation_drawings(labels, verdicts, logits)
    source = DataSource("made_up_test" + odd, "made_up" + odd, "name@" + "0" * 40, "cc-by-nc-4.0", "f" * 64,
                        (("test", "rows.jsonl" + odd, n, "ab" * 32),))  # fmt: skip
    facts = {"model": "outputs/moderator/0123456789" + odd, "thresholds": "fitted on 900 held-out rows (val)" + odd,
             "code": "saferlhf, git commit " + "c" * 40}  # fmt: skip
    return write_report(
        path,
        title="moderator model on suite all" + odd,
        subtitle="outputs/moderator/0123456789" + odd,
        metrics=metrics | ({f"test/{odd}/f1": 0.5} if odd else {}),
        config={"model": "outputs/moderator" + odd, "data": {"path": odd or "rows.jsonl"}, "seed": 0},
        sections=[protocols_html(results, left_out)],
        histograms=[*((name, svg) for name in ("made_up_test" + odd, "second_test") for svg in drawings)],
        lineage={"model": odd} if odd else None,
        commands=["python evaluate.py" + odd],
        provenance=Provenance(facts, [source, source], "python evaluate.py suite=all seed=0" + odd),
    )


def policy_page(path: Path, *, n: int = 60, odd: str = "", text: str = "You could water it twice a week. ") -> Path:
    """A policy against its baseline, trained under a constraint."""
    stream = np.random.default_rng(1)
    harmful = np.where(np.arange(n) % 3 == 0, 1.0, 0.0)
    prompts = PromptSet(
        tuple(f"row{i}{odd}" for i in range(n)),
        tuple((Turn("user" + odd, f"How do I keep plant {i} alive?" + odd),) for i in range(n)),
        harmful,
    )
    policies = {}
    for place, name in enumerate(("policy", "baseline")):
        scores = {"reward": stream.normal(size=(n, 1)) + 1 - place, "cost": stream.normal(size=(n, 1)) - 1 + place}
        texts = tuple((text * int(stream.integers(1, 90)) + odd,) for _ in range(n))
        tokens = np.array([[len(one[0]) // 4] for one in texts])
        said = {"judge" + odd: Judged(scores), "truth": Judged({"safe" + odd: (scores["cost"] < 0).astype(float)})}
        policies[name] = PolicyAnswers(texts, tokens, tokens > 600, np.abs(stream.normal(size=(n, 1))), said)
    steps = range(1, 61)
    curves = {
        "train/lambda": [(i, 1 - np.exp(-i / 20)) for i in steps],
        "train/kl": [(i, i / 30) for i in steps],
        "train/mean_reward": [(i, np.log(i) + 0.2 * stream.normal()) for i in steps],
        "train/mean_cost": [(i, 2 * np.exp(-i / 15) + 0.1 * stream.normal()) for i in steps],
    }
    metrics = {}
    for name, value in (("helpful_win_rate", 0.61), ("harmless_win_rate", 0.72), ("safe_rate", 0.88)):
        metrics |= {f"policy/{name}": value, f"policy/{name}_low": value - 0.05, f"policy/{name}_high": value + 0.04}
    facts = {"model": "outputs/ppo/0123456789 (ppo)" + odd, "judges": "truth: the toy world's ground truth" + odd}
    return write_report(
        path,
        title="ppo model on made-up prompts" + odd,
        subtitle="outputs/ppo/0123456789",
        metrics=metrics,
        config={"model": "outputs/ppo" + odd, "seed": 0},
        histograms=[str(scatter_svg(policies))],
        figures={"Training": training_drawings(curves, [0.0])},
        samples=[samples_section(prompts, policies, heading="Samples" + odd)],
        provenance=Provenance(facts, [DataSource("policy", "made_up", None, None, "f" * 64)], "python evaluate.py"),
    )


# ------------------------------------------------------------------------------------------------ hostile text
def hostile(address: str) -> str:
    """What a model might write to get out of the page."""
    return (
        "<script>document.title='owned'</script>"
        f'<img src="{address}/img" onerror="document.title=\'owned\'">'
        f"</details></pre></td></style></title><link rel=stylesheet href={address}/css>"
        f"\"><svg onload=\"fetch('{address}/svg')\">' onmouseover='x"
        f"<style>@import url({address}/import);</style><base href={address}/><iframe src={address}/frame></iframe>"
        "&lt;script&gt; {{7*7}} ${title} {body} %s \\ $x_1$ <!-- <plaintext> ]]> "
        "NUL\x00 bell\x07 escape\x1b turned\u202eback\u202c line\u2028 half\ud800."
    )


@pytest.mark.parametrize("make", [moderation_page, policy_page])
def test_hostile_text_stays_text(tmp_path: Path, browser: Browser, server: tuple[str, list[str]], make: Any) -> None:
    address, asked = server
    clean, _ = browser.open(make(tmp_path / "clean.html"))
    dom, console = browser.open(make(tmp_path / "hostile.html", odd=hostile(address)))
    assert "owned" not in title_of(dom).replace("document.title='owned'", "")
    assert title_of(dom).startswith(title_of(clean))
    assert console == []
    assert asked == []
    # the browser has built the same elements: no text has become one
    tags, odd_tags = (set(re.findall(r"<([a-zA-Z][\w-]*)", page)) for page in (clean, dom))
    assert odd_tags == tags and not tags & {"script", "img", "iframe", "link", "base", "object"}
    assert dom.count("<details") == clean.count("<details") and dom.count("<svg") == clean.count("<svg")
    assert not re.search(r"<[^>]*\son\w+=", dom)
    # and the reader sees what was written
    shown = "&lt;script&gt;document.title='owned'&lt;/script&gt;"
    assert dom.count(shown) > 10
    assert "&amp;lt;script&amp;gt; {{7*7}} ${title} {body} %s \\ $x_1$ &lt;!-- &lt;plaintext&gt; ]]&gt; " in dom
    assert "NUL␀ bell␇ escape␛ turned⟨U+202E⟩back⟨U+202C⟩ line⟨U+2028⟩ half⟨U+D800⟩." in dom
    assert not re.search("[\x00\x07\x1b\u202a-\u202e\u2066-\u2069\ufffd]", dom)


def test_what_forgot_to_escape_meets_the_second_wall(
    tmp_path: Path, browser: Browser, server: tuple[str, list[str]]
) -> None:
    """The policy of the page holds where an escape does not; without it the same text runs, fetches and is heard of."""
    address, asked = server
    section = (
        f"<script>document.title='owned'</script><img src='{address}/img'><link rel=stylesheet href='{address}/css'>"
    )
    page = write_report(tmp_path / "walled.html", title="walled", metrics={}, config={}, sections=[section])
    dom, console = browser.open(page)
    assert title_of(dom) == "walled" and asked == []
    assert any("Content Security Policy" in line for line in console)
    open_page = tmp_path / "open.html"
    open_page.write_text(re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page.read_text()))
    dom, _ = browser.open(open_page)
    assert title_of(dom) == "owned" and {"/img", "/css"} <= set(asked)


# ------------------------------------------------------------------------------------------------ what is seen
def test_no_sample_is_seen_before_the_click(tmp_path: Path, browser: Browser) -> None:
    """Two pages that differ in their responses alone look the same until they are opened."""
    pages = [policy_page(tmp_path / f"{i}.html", text=text) for i, text in enumerate(("Much of it. ", "None of it! "))]
    assert "Much of it." in pages[0].read_text() and "None of it!" in pages[1].read_text()
    size = (1000, 5000)
    closed = [browser.picture(page, f"closed{i}", size=size).read_bytes() for i, page in enumerate(pages)]
    assert closed[0] == closed[1]
    for page in pages:
        page.write_text(page.read_text().replace('<details class="samples">', '<details class="samples" open>'))
    opened = [browser.picture(page, f"opened{i}", size=size).read_bytes() for i, page in enumerate(pages)]
    assert opened[0] != opened[1] and opened[0] != closed[0]


def test_the_page_follows_the_ground(tmp_path: Path, browser: Browser) -> None:
    from matplotlib.image import imread

    page = moderation_page(tmp_path / "report.html")
    corner = {}
    for name, ground in (("light", LIGHT), ("dark", DARK)):
        pixels = imread(str(browser.picture(page, name, ground, size=(1000, 800))))
        corner[name] = pixels[2, 2, :3]
    assert corner["light"].min() > 0.95 and corner["dark"].max() < 0.15


@pytest.mark.parametrize("make", [moderation_page, policy_page])
def test_nothing_sticks_out_of_a_narrow_page(tmp_path: Path, browser: Browser, make: Any) -> None:
    """At 400 px the page itself never scrolls sideways: what is broad does so in its own box."""
    words = "https://example.org/" + "unbroken" * 30
    page = make(tmp_path / "report.html", odd=words)
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page.read_text())
    text = text.replace("<details", "<details open")
    tell = "<script>parent.document.title = [innerWidth, document.documentElement.scrollWidth].join(' ')</script>"
    frame = tmp_path / "frame.html"
    inner = (text + tell).replace("&", "&amp;").replace('"', "&quot;")
    frame.write_text(f'<title>none</title><iframe style="width:400px;height:900px;border:0" srcdoc="{inner}"></iframe>')
    inner_width, needed = map(int, title_of(browser.open(frame)[0]).split())
    assert inner_width == 400 and needed <= 400
