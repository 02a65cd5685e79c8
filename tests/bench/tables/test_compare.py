import pytest

from bench.__main__ import main
from bench.tables.compare import compare, select
from common.records import record
from common.tables import cell

ONE = {
    "run_name": "one",
    "world_size": 1,
    "comm_time_ms_total": 0.0,
    "comm_ratio": 0.0,
    "comm_time_ms_by_op": {},
    "val_ppl": 30.25,
    "machine": {"cpu": "X"},
}
TWO = {
    "run_name": "two",
    "world_size": 2,
    "comm_time_ms_total": 500.0,
    "comm_ratio": 0.25,
    "comm_time_ms_by_op": {"reduce_scatter": 400.0, "all_gather": 100.0},
    "bytes_raw_total": 123456789,
}
UNKNOWN = {"run_name": "unknown", "comm_time_ms_by_op": None}


def _rows(table):
    assert all(len(row) == len(table.headers) for row in table.rows)
    return {row[0]: [cell(value) for value in row[1:]] for row in table.rows}


def test_share_by_operator_and_what_was_not_recorded():
    table = compare([ONE, TWO, UNKNOWN])
    assert table.headers == ["run", "one", "two", "unknown"]
    rows = _rows(table)
    assert rows["comm share of step"] == ["0.0 %", "25.0 %", "not recorded"]
    assert rows["comm time reduce_scatter (ms)"] == ["0", "400", "not recorded"]
    assert rows["comm share reduce_scatter"] == ["0.0 %", "20.0 %", "not recorded"]
    assert rows["comm share all_gather"] == ["0.0 %", "5.0 %", "not recorded"]
    assert rows["bytes_raw_total (bytes)"] == ["not recorded", "123,456,789", "not recorded"]
    assert rows["val_ppl"] == ["30.25", "not recorded", "not recorded"]


def test_without_operators_the_row_says_so():
    assert _rows(compare([UNKNOWN]))["comm time by operator (ms)"] == ["not recorded"]


def test_select_keeps_the_order_asked_for_and_names_what_is_missing():
    records = [ONE, {"kind": "figure", "figure": "f"}, TWO]
    assert select(records) == [ONE, TWO]
    assert select(records, ["two", "one"]) == [TWO, ONE]
    with pytest.raises(ValueError, match=r"no record of run three; there are: one, two"):
        select(records, ["three"])
    with pytest.raises(ValueError, match="no run records"):
        compare([])


def test_compare_command(tmp_path, capsys):
    path = tmp_path / "results.jsonl"
    for entry in (ONE, TWO):
        record.append(path, entry)
    assert main(["compare", str(path), "--runs", "two,one", "--fields", "world_size,machine.cpu", "--markdown"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "| run | two | one |",
        "| --- | --- | --- |",
        "| world_size (ranks) | 2 | 1 |",
        "| machine.cpu | not recorded | X |",
    ]
    assert main(["compare", str(path)]) == 0
    assert "not recorded" in capsys.readouterr().out
    assert main(["compare", str(path), "--runs", "absent"]) == 1
    assert "there are: one, two" in capsys.readouterr().err
    assert main(["compare", str(tmp_path / "absent.jsonl")]) == 1


def test_numbers_are_readable():
    assert [cell(v) for v in (None, True, 0, 1234567, 0.000123456, 12345.6, 99.99, float("nan"), {}, "a")] == [
        *("not recorded", "yes", "0", "1,234,567", "0.0001235", "12,346", "99.99", "nan", "none", "a"),
    ]
