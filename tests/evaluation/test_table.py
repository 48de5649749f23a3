"""The table on the screen says what the flat metrics say."""

import io

from rich.console import Console

from saferlhf.evaluation.table import format_number, headline_lines, metric_lines, metrics_table

METRICS = {
    "val/loss": 0.5,
    "test/reward/tie_rate": 0.0,
    "test/reward/pair_accuracy": 1.0,
    "test/reward/pair_accuracy_low": 0.93,
    "test/reward/pair_accuracy_high": 1.0,
    "test/reward/pair_accuracy_n": 1234.0,
    "test/cost/fraction_high": 0.25,
    "test/cost/sign_accuracy": 0.9712,
}


def test_intervals_fold_into_their_metric():
    lines = {line.name: line for line in metric_lines(METRICS)}
    assert set(lines) == {
        "val/loss",
        "test/reward/tie_rate",
        "test/reward/pair_accuracy",
        "test/cost/fraction_high",  # ends like a bound, but belongs to no metric
        "test/cost/sign_accuracy",
    }
    assert lines["test/reward/pair_accuracy"][1:5] == (1.0, 0.93, 1.0, 1234)


def test_headlines_come_first_in_their_area():
    names = [line.name for line in metric_lines(METRICS)]
    assert names.index("test/reward/pair_accuracy") < names.index("test/reward/tie_rate")
    assert names[0] == "val/loss"
    assert [line.name for line in headline_lines(METRICS)] == ["test/reward/pair_accuracy", "test/cost/sign_accuracy"]


def rendered(table) -> str:
    console = Console(file=io.StringIO(), width=100, color_system=None)
    console.print(table)
    return console.file.getvalue()


def test_table_shows_value_interval_and_count():
    text = rendered(metrics_table(METRICS, title="reward", confidence=0.9))
    line = next(line for line in text.splitlines() if "pair_accuracy" in line)
    assert "1.0000" in line  # an estimate, not a count
    assert "0.9300 .. 1.0000" in line
    assert "1,234" in line
    assert "90% interval" in text
    assert "val/loss" in text


def test_short_table_holds_headlines_only():
    text = rendered(metrics_table(METRICS, headlines_only=True))
    assert "pair_accuracy" in text
    assert "sign_accuracy" in text
    assert "tie_rate" not in text


def test_empty_metrics_give_an_empty_table():
    assert "metric" in rendered(metrics_table({}))


def test_numbers():
    assert [format_number(value) for value in (0.0, 3.0, 12345.0, 0.12345, 1e-5, -0.5, 123456.7)] == [
        "0",
        "3",
        "12,345",
        "0.1235",
        "1e-05",
        "-0.5000",
        "1.235e+05",
    ]
    assert format_number(float("nan")) == "nan"


MODERATION = {
    "test/unsafe/nll": 0.3,
    "test/unsafe/macro_f1": 0.9,
    "test/unsafe/macro_f1_low": 0.88,
    "test/unsafe/macro_f1_high": 0.92,
    "test/unsafe/macro_f1_n": 1138.0,
    "test/severity/quadratic_kappa": 0.78,
    "test/category/f1_drugs": 0.7,
    "test/baseline_tfidf/unsafe/macro_f1": 0.8512,
    "test/baseline_tfidf/unsafe/macro_f1_low": 0.83,
    "test/baseline_constant/unsafe/macro_f1": 0.3333,
    "test/baseline_constant/reward/pair_accuracy": 0.5,
    "test/over_tfidf/unsafe/macro_f1": 0.05,
}


def test_baselines_stand_beside_their_metric():
    lines = {line.name: line for line in metric_lines(MODERATION)}
    assert lines["test/unsafe/macro_f1"].baselines == {"tfidf": 0.8512, "constant": 0.3333}
    assert lines["test/unsafe/nll"].baselines == {}
    assert "test/baseline_tfidf/unsafe/macro_f1" not in lines
    assert "test/baseline_constant/reward/pair_accuracy" in lines, "it belongs to no metric here"
    heads = [line.name for line in headline_lines(MODERATION)]
    assert heads == ["test/unsafe/macro_f1", "test/severity/quadratic_kappa"]
    text = rendered(metrics_table(MODERATION, headlines_only=True))
    (line,) = [line for line in text.splitlines() if "unsafe/macro_f1" in line]
    assert line.split() == ["test/unsafe/macro_f1", "0.9000", "0.8800..0.9200", "1,138", "0.333", "0.851"]


def test_the_headlines_of_a_moderator_fit_eighty_columns():
    names = ("test/unsafe/tpr", "test/severity/quadratic_kappa")
    metrics = {}
    for name in names:
        metrics |= {name: 0.5, f"{name}_low": 0.4, f"{name}_high": 0.6, f"{name}_n": 1138.0}
        for baseline in ("constant", "length", "tfidf"):
            area, _, rest = name.partition("/")
            metrics[f"{area}/baseline_{baseline}/{rest}"] = 0.25
    out = io.StringIO()
    Console(file=out, width=80).print(metrics_table(metrics))
    lines = [line for line in out.getvalue().splitlines() if "quadratic" in line]
    assert len(lines) == 1 and lines[0].split()[0] == names[1] and lines[0].split()[-1] == "0.250"
