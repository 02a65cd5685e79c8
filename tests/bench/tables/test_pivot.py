import math

import pytest

from bench import __main__ as command
from bench.tables.pivot import pivot, where
from common.records import record


def entry(method, case, seed, value, date="2026-01-01"):
    return {"method": method, "case": case, "seed": seed, "value": value, "date": date, "machine": {"cpu": "x"}}


RUNS = [
    entry("int8", "a", 1, 1.0),
    entry("int8", "a", 2, 3.0),
    entry("int8", "b", 1, 5.0),
    entry("topk", "a", 1, 7.0, "2026-01-02"),
    entry("topk", "a", 1, 6.0, "2026-01-01"),
]


def test_repeats_are_averaged_and_the_newest_of_a_repeat_stands():
    table, shown = pivot(RUNS, ["method"], "case", ["value"])
    assert table.headers == ["method", "a", "b"]
    assert table.rows == [["int8", "2 ± 1.414", "5"], ["topk", "7", None]]
    assert shown == RUNS[:4], "the superseded one does not stand in the table"


def test_a_figure_stands_with_its_own_spread():
    figure = {**entry("int8", "a", None, 2.0), "spread": 0.25}
    table, _ = pivot([figure, entry("topk", "a", None, 3.0)], ["method"], "case", ["value"])
    assert table.rows == [["int8", "2 ± 0.25"], ["topk", "3"]]


def test_a_repeat_that_diverged_is_part_of_the_mean():
    runs = [*RUNS[:2], entry("int8", "a", 3, math.inf), entry("topk", "a", 2, math.nan), RUNS[3]]
    table, _ = pivot(runs, ["method"], "case", ["value"])
    assert table.rows == [["int8", "inf"], ["topk", "nan"]]


def test_several_values_name_their_columns():
    table, _ = pivot(RUNS, ["method"], "case", ["value", "seed"])
    assert table.headers[1:] == ["a: value", "a: seed", "b: value", "b: seed"]


def test_conditions_reach_into_blocks():
    assert where(RUNS, {"machine.cpu": "x", "method": "topk"}) == RUNS[3:]
    assert where(RUNS, {"seed": "2"}) == [RUNS[1]]


def test_nothing_to_show_is_an_error():
    with pytest.raises(ValueError, match="no record has ppl"):
        pivot(RUNS, ["method"], "case", ["ppl"])


def test_the_command_prints_the_table(tmp_path, capsys):
    path = tmp_path / "records.jsonl"
    for run in RUNS:
        record.append(path, run)
    assert command.main(["pivot", str(path), "method", "case", "value", "--where", "case=a", "--markdown"]) == 0
    assert "| int8 | 2 ± 1.414 |" in capsys.readouterr().out
