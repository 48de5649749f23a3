"""Drift from in-domain: drops by hand, MOVER against simulated bounds, and what may not be compared."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from rich.console import Console

from saferlhf.config.paths import conf_dir
from saferlhf.evaluation.drift import Drift, drift_of, independent_difference
from saferlhf.evaluation.drift_report import drift_html, drift_markdown, drift_png, drift_svg, drift_table
from saferlhf.ops.intervals import wilson

Metrics = dict[str, float]


def result(name: str, rows: int, at_home: tuple[str, ...] = (), marks: tuple[str, ...] = ()) -> dict[str, Any]:
    found = {"protocol": name, "measure": "moderation", "rows": rows, "at_home": list(at_home), "marks": list(marks)}
    return found


def metric(name: str, value: float, reach: float | None = None) -> Metrics:
    return {name: value} | ({} if reach is None else {f"{name}_low": value - reach, f"{name}_high": value + reach})


def language(name: str, accuracy: float, auroc: float | None = 0.6, reach: float | None = 0.03) -> Metrics:
    start = f"<far>/by_language/{name}"
    found = metric(f"{start}_accuracy", accuracy, reach) | {f"{start}_accuracy_n": 40.0}
    found |= metric(f"{start}_predicted_rate", 0.2, reach)
    return found if auroc is None else found | {f"{start}_auroc": auroc}


RESULTS = [
    result("small_home", 100, ("gardens", "gardens_qa")),
    result("home", 200, ("gardens",)),
    result("away", 50),
    result("<far>", 120, marks=("off-protocol: texts alone",)),
    {**result("pairs", 70, ("gardens",)), "measure": "preference"},
]
METRICS = (
    metric("home/unsafe/auroc", 0.9, 0.03)
    | metric("home/unsafe/macro_f1", 0.8, 0.05)
    | metric("home/unsafe/prevalence", 0.5, 0.1)
    | metric("small_home/unsafe/auroc", 0.95, 0.03)
    | metric("away/unsafe/auroc", 0.7, 0.04)
    | metric("away/unsafe/macro_f1", 0.82)
    | metric("<far>/unsafe/auroc", 0.5)
    | metric("<far>/baseline_tfidf/by_language/en_accuracy", 0.1)
    | language("de", 0.5)
    | language("en", 0.6, reach=0.04)
    | language("bn", 1.0, auroc=None)
)


def found(trained_on: str | None = "gardens", metrics: Mapping[str, float] = METRICS) -> Drift:
    drift = drift_of(RESULTS, metrics, trained_on)
    assert drift is not None
    return drift


def shown(drift: Drift) -> str:
    console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(drift_table(drift))
    return console.export_text()


def test_drops_from_the_larger_home() -> None:
    """Distances of 0.03 and 0.04 give 0.05 = sqrt(0.03^2 + 0.04^2) on either side."""
    drift = found()
    assert drift.home == "home" and drift.remark == "" and drift.shown
    assert [(line.protocol, line.domain) for line in drift.protocols] == [
        ("small_home", "in-domain"),
        ("home", "in-domain"),
        ("away", "other data"),
        ("<far>", "off-protocol"),
    ]
    small, home, away, far = drift.protocols
    assert small.drops == home.drops == {}  # the smaller home may hold rows of the larger
    assert away.drops["auroc"] == pytest.approx({"value": 0.2, "low": 0.15, "high": 0.25})
    # a side without an interval leaves the drop without one; a gain is a negative drop
    assert away.drops["macro_f1"] == pytest.approx({"value": -0.02})
    assert far.drops["auroc"] == pytest.approx({"value": 0.4}) and "macro_f1" not in far.drops
    assert home.values["prevalence"] == {"value": 0.5} and home.rows == 200


def test_languages_are_held_against_english() -> None:
    languages = found().languages
    assert [(line.protocol, line.language, line.rows) for line in languages] == [
        ("<far>", "en", 40),
        ("<far>", "de", 40),
        ("<far>", "bn", 40),
    ]
    english, german, bengali = languages
    assert english.drops == {} and german.values["predicted_rate"]["value"] == 0.2
    assert german.drops == {"accuracy": pytest.approx({"value": 0.1, "low": 0.05, "high": 0.15})}
    # its rows have one label: what is right on them is another question than in English
    assert bengali.drops == {} and bengali.note == "one label"


def test_english_with_one_label_is_no_measure_of_both() -> None:
    metrics = language("en", 0.6, auroc=None) | language("de", 0.5) | language("bn", 0.9, auroc=None)
    drops = {line.language: line.drops.get("accuracy", {}).get("value") for line in found(metrics=metrics).languages}
    assert drops == {"de": None, "en": None, "bn": pytest.approx(-0.3)}


def test_languages_with_one_label_each_are_comparable() -> None:
    metrics = language("en", 0.6, auroc=None) | language("de", 0.5, auroc=None, reach=None)
    english, german = found(metrics=metrics).languages
    assert german.note == english.note == "" and german.drops == {"accuracy": pytest.approx({"value": 0.1})}


def test_a_protocol_with_one_label_has_no_drop() -> None:
    """Macro-F1 of rows that are all unsafe is that of a class that is not there."""
    for share, drops in ((1.0, {}), (0.0, {}), (0.99, {"macro_f1"})):
        metrics = metric("home/unsafe/auroc", 0.9) | metric("home/unsafe/macro_f1", 0.8)
        metrics |= metric("away/unsafe/macro_f1", 0.4) | metric("away/unsafe/prevalence", share)
        drift = found(metrics=metrics)
        away = next(line for line in drift.protocols if line.protocol == "away")
        assert set(away.drops) == set(drops) and (away.note == "one label") == (not drops)
        assert ("Rows of one label have no drop" in drift_markdown(drift)[0]) == (not drops)


def test_without_english_there_are_no_drops() -> None:
    (line,) = found(metrics=language("de", 0.5)).languages
    assert line.drops == {} and line.note == ""


@pytest.mark.parametrize(
    ("trained_on", "says", "domains"),
    [
        (None, "is not known", ["", "", "", "off-protocol"]),
        ("mix", "data=mix, which names no data set", ["", "", "", "off-protocol"]),
        ("ponds", "protocol of the model's training data, ponds,", ["other data"] * 3 + ["off-protocol"]),
    ],
)
def test_without_a_home_there_are_numbers_and_a_line(trained_on: str | None, says: str, domains: list[str]) -> None:
    drift = found(trained_on)
    assert drift.home is None and says in drift.remark
    assert [line.domain for line in drift.protocols] == domains
    assert not any(line.drops for line in drift.protocols)
    assert [line.values["auroc"]["value"] for line in drift.protocols] == [0.95, 0.9, 0.7, 0.5]
    for text in (" ".join(shown(drift).split()), drift_html(drift).replace("&#x27;", "'"), drift_markdown(drift)[0]):
        assert says in text
    # drops from in-domain have no column on the screen, the one from English has
    assert shown(drift).count("interval") == 1


def test_one_protocol_alone_is_nothing_to_compare() -> None:
    drift = drift_of(RESULTS[:1], METRICS, "gardens")
    assert drift is not None and drift.home == "small_home" and not drift.shown
    assert drift_of(RESULTS[-1:], METRICS, "gardens") is None  # pairs alone


def test_mover_of_two_shares_by_hand() -> None:
    """56 of 70 against 48 of 80: the worked example of Newcombe (1998, method 10), which is MOVER of Wilson's."""
    shares = []
    for good, total in ((56, 70), (48, 80)):
        low, high = wilson(good, total)
        shares.append({"value": good / total, "low": low, "high": high})
    drop = independent_difference(*shares)
    assert drop["value"] == pytest.approx(0.2)
    assert [round(drop["low"], 4), round(drop["high"], 4)] == [0.0524, 0.3339]


def test_mover_covers_as_often_as_it_says() -> None:
    """Shares of 300 and of 150 independent rows: the true drop is inside about 95 times in 100."""
    stream = np.random.default_rng(0)
    inside = []
    for good, fewer in zip(stream.binomial(300, 0.93, 2000), stream.binomial(150, 0.7, 2000), strict=True):
        sides = []
        for count, total in ((good, 300), (fewer, 150)):
            low, high = wilson(int(count), total)
            sides.append({"value": count / total, "low": low, "high": high})
        drop = independent_difference(*sides)
        inside.append(drop["low"] <= 0.93 - 0.7 <= drop["high"])
    assert np.mean(inside) == pytest.approx(0.95, abs=0.012)


def test_the_same_lines_on_the_screen_in_the_report_and_in_the_docs(tmp_path: Path) -> None:
    drift = found()
    screen, page, text = shown(drift), drift_html(drift), "\n".join(drift_markdown(drift))
    assert "0.200 0.150..0.250" in screen and "bn (one label)" in screen and "home (in-domain) minus here" in screen
    cells = text.partition("| away<br>")[2].partition("\n")[0].split(" | ")
    assert cells[:4] == ["<small>other data</small>", "50", "", "0.700<br><small>0.660..<wbr>0.740</small>"]
    assert cells[4:7] == ["0.200<br><small>0.150..<wbr>0.250</small>", "0.820", "-0.020"]
    assert "| **home**<br>" in text and "| small_home<br>" in text and "| <far>: de | 40 |" in text
    assert '0.200<br><span class="note">0.150..0.250' in page and "&lt;far&gt;" in page and "<far>" not in page
    assert "<strong>home</strong>" in page and "by MOVER" in page
    svg = drift_svg(drift)
    assert svg is not None and svg in page and svg == drift_svg(drift)
    # the drawing tells domains apart, and leaves out the language that is not to be compared
    assert "off-protocol" in svg and "dashed: English" in svg and "bn" not in svg and "&lt;far&gt;" in svg
    assert drift_png(tmp_path / "drift.png", drift) and (tmp_path / "drift.png").read_bytes()[:4] == b"\x89PNG"


def test_without_any_auroc_there_is_no_picture(tmp_path: Path) -> None:
    drift = found(metrics=metric("home/unsafe/macro_f1", 0.8))
    assert drift_svg(drift) is None and "<svg" not in drift_html(drift)
    assert not drift_png(tmp_path / "drift.png", drift)


def test_it_comes_back_from_json_as_it_was() -> None:
    drift = found()
    assert Drift.read(json.loads(json.dumps(drift.plain()))) == drift and Drift.read(None) is None
    assert dataclasses.asdict(drift) == drift.plain()


def test_data_at_home_are_data_sets_that_train() -> None:
    """Every name is one that a model of this project can have been trained on."""
    names = {}
    for path in (conf_dir() / "data").glob("*.yaml"):
        held = yaml.safe_load(path.read_text())
        names[held["name"]] = held.get("split")
    at_home = {}
    for path in (conf_dir() / "protocol").glob("*.yaml"):
        at_home[path.stem] = yaml.safe_load(path.read_text())["at_home"]
    for protocol, listed in at_home.items():
        assert all(name in names and names[name] != "test" for name in listed), protocol
    assert "pku_saferlhf" in at_home["pku_saferlhf_both"] and at_home["beavertails_30k_test"] == ["beavertails"]
    assert at_home["pku_saferlhf_response_0"] == at_home["pku_saferlhf_both"] and at_home["xsafety"] == []
