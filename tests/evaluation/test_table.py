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
    assert lines["test/reward/pair_accuracy"][1:] == (1.0, 0.93, 1.0, 1234)


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
