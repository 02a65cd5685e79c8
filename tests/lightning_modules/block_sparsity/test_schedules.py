"""Schedules: the laws of all, the committed one, and what the reader says about wrong files."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from common.variants import variants
from lightning_modules.block_sparsity.schedules.base import START, Row, Schedule, check_row
from lightning_modules.block_sparsity.schedules.csv_file import COLUMNS, CsvSchedule
from lightning_modules.block_sparsity.schedules.cubic import CubicSchedule
from lightning_modules.block_sparsity.schedules.linear import LinearSchedule
from lightning_modules.block_sparsity.schedules.original import OriginalSchedule
from tests.conftest import ROOT

SEED = (ROOT / "configs/block_sparsity/progressive.csv").read_text()
EXAMPLES = [example for kind in variants(Schedule) for example in kind.examples()]  # type: ignore[type-abstract]


def _csv(folder, text, encoding="utf-8"):
    (folder / "s.csv").write_bytes(text if isinstance(text, bytes) else text.encode(encoding))
    return CsvSchedule(str(folder / "s.csv"))


@pytest.mark.parametrize("schedule", EXAMPLES, ids=lambda one: type(one).__name__)
def test_every_schedule_obeys_the_identities_from_all_dense_on(schedule):
    before = START
    for number, row in enumerate(schedule.rows, 1):
        assert row.iteration == number and schedule.row(number) is row
        assert row.dense == pytest.approx(before.dense - row.dense_to_2_4, abs=1e-6)
        assert row.topk == pytest.approx(before.topk + row.mid_2_4_to_topk, abs=1e-6)
        assert row.dense + row.mid_2_4 + row.topk == pytest.approx(1) and row.dense_to_2_4 >= -1e-6
        assert row.mid_2_4_to_topk >= -1e-6 and row.epochs >= 0
        before = row
    assert schedule.name in type(schedule).__module__ and "object at" not in repr(schedule)


def test_a_schedule_that_moves_upwards_is_refused_whoever_wrote_it():
    class Wrong(Schedule):
        def iterations_in_order(self):
            return [Row(1, 0.5, 0.5, 0, 0.5, 0, 1), Row(2, 0.6, 0.4, 0, -0.1, 0, 1)]

    with pytest.raises(ValueError, match=r"Wrong, row 2, column dense_to_2_4.*un-demoted"):
        _ = Wrong().rows


def test_the_committed_schedule_is_the_original_five_iterations():
    rows = CsvSchedule(str(ROOT / "configs/block_sparsity/progressive.csv")).rows
    assert [(r.dense, r.mid_2_4, r.topk) for r in rows] == [
        (0.9, 0.1, 0.0),
        (0.8, 0.1, 0.1),
        (0.65, 0.2, 0.15),
        (0.5, 0.3, 0.2),
        (0.35, 0.45, 0.2),
    ]
    assert [r.epochs for r in rows] == [2, 2, 2, 2, 3]
    for row, built_in in zip(rows, OriginalSchedule().rows, strict=True):
        assert vars(built_in) == pytest.approx(vars(row))


@pytest.mark.parametrize(
    ("change", "names"),
    [
        (("3,0.65,", "3,0.70,"), r"s\.csv, row 3 \(line 4\), column dense"),
        (("2,0.80,0.10,", "2,0.80,0.20,"), "row 2 .*column mid_2_4"),
        (("5,0.35,0.45,0.20,", "5,0.35,0.45,0.25,"), "row 5 .*column topk"),
        (("\n4,", "\n5,"), "row 4 .*column iteration"),
        (("0.15,0.05,2\n4", "abc,0.05,2\n4"), "column dense_to_2_4: 'abc'"),
        (("0.10,0.00,2", "0.10,0.00,1.5"), "column epochs"),
        (("0.10,0.00,2", "0.10,0.00,-1"), "row 1 .*column epochs"),
        ((",epochs", ""), "missing column epochs"),
        ((",epochs", ",epoch"), "unknown column 'epoch'"),
        ((",epochs", ",topk"), "line 1: column topk is there twice"),
        (("0.10,0.00,2", "0.10,0.00,inf"), "row 1 .*column epochs: inf is not a finite number"),
        (("0.10,0.00,2", "0.10,0.00,1e300"), "row 1 .*column epochs: 1e.300 is not a whole number"),
        (("0.10,0.00,2", "0.10,nan,2"), "row 1 .*column mid_2_4_to_topk: nan is not a finite number"),
        (("0.10,0.00,2", "0.10,,2"), "row 1 .*column mid_2_4_to_topk: '' is not a number"),
        (("0.10,0.00,2", "0.10,0.00,2,7"), "row 1 .*8 values for 7 columns"),
        (("0.10,0.00,2", "0.10,0.00"), "row 1 .*6 values for 7 columns"),
        (("1,0.90,0.10", "1,-0.90,0.10"), "row 1 .*column dense: -0.9 is not between"),
        ((",epochs", ',"epochs'), "line 1 cannot be read"),
        (("0.35,0.45,0.20,0.15,0.00", "0.60,0.20,0.20,-0.10,0.00"), "row 5 .*column dense_to_2_4.*un-demoted"),
        ((SEED[SEED.index("\n") :], "\n"), "no iteration"),
    ],
)
def test_wrong_files_are_refused_by_row_and_column(change, names, tmp_path):
    assert change[0] in SEED
    with pytest.raises(ValueError, match=names):
        _csv(tmp_path, SEED.replace(*change))


def test_a_missing_file_and_an_iteration_that_is_not_there_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no\.csv"):
        CsvSchedule(str(tmp_path / "no.csv"))
    with pytest.raises(ValueError, match="1 to 5"):
        _csv(tmp_path, SEED).row(6)


def test_a_file_as_spreadsheets_and_people_write_it_is_the_same_schedule(tmp_path):
    lines = SEED.splitlines()
    header, first, *rest = lines
    text = "\r\n".join(["# for the small model", "", header, first, "  # slower from here", ",,,,,,", *rest, ""])
    spaced = text.replace(",", ", ").replace("0.90", '"0.90"')
    for written in (text, spaced):
        for encoding in ("utf-8", "utf-8-sig"):
            assert _csv(tmp_path, written, encoding).rows == _csv(tmp_path, SEED).rows
    order = [6, 3, 2, 1, 0, 5, 4]
    swapped = "\n".join(",".join(line.split(",")[i] for i in order) for line in lines)
    assert _csv(tmp_path, swapped).rows == _csv(tmp_path, SEED).rows


def test_shares_and_epochs_are_enough_and_what_follows_from_them_may_be_left_out(tmp_path):
    table = [line.split(",") for line in SEED.splitlines()]
    for columns in ([1, 2, 3, 6], [6, 3, 1, 2], [1, 2, 3, 4, 6], [0, 1, 2, 3, 6]):
        text = "\n".join(",".join(line[i] for i in columns) for line in table)
        for mine, whole in zip(_csv(tmp_path, text).rows, _csv(tmp_path, SEED).rows, strict=True):
            assert vars(mine) == pytest.approx(vars(whole))
    with pytest.raises(ValueError, match=r"row 2 .*dense_to_2_4: -0\.1 is not between 0 and 1: a block is never"):
        _csv(tmp_path, "dense,mid_2_4,topk,epochs\n0.8,0.2,0,1\n0.9,0.1,0,1")


def test_a_file_in_another_encoding_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"s\.csv is not UTF-8 text"):
        _csv(tmp_path, SEED.encode("utf-16"))


_NUMBER = st.one_of(st.floats().map(str), st.integers().map(str), st.sampled_from(["", "0.1", "1", "0", "-0.1", "x"]))
_LINE = st.lists(_NUMBER, min_size=5, max_size=8).map(",".join)
_TABLE = st.lists(_LINE, max_size=4).map(lambda lines: "\n".join([",".join(COLUMNS), *lines]))


@given(st.one_of(st.binary(), _TABLE.map(str.encode)))
@example(SEED.encode())
def test_any_file_is_a_checked_schedule_or_an_error_that_names_it(tmp_path_factory, content):
    folder = tmp_path_factory.getbasetemp()
    try:
        rows = _csv(folder, content).rows
    except ValueError as error:
        assert str(error).startswith("s.csv")
        assert not isinstance(error, UnicodeError)
        return
    for before, row in zip([START, *rows], rows, strict=False):
        check_row("again", row, before)


@given(st.integers(0, len(SEED) - 1), st.integers(0, 255))
def test_a_changed_byte_is_an_error_that_names_the_file_or_still_a_checked_schedule(tmp_path_factory, place, byte):
    changed = bytearray(SEED.encode())
    changed[place] = byte
    try:
        _csv(tmp_path_factory.getbasetemp(), bytes(changed))
    except ValueError as error:
        assert str(error).startswith("s.csv")


def test_generated_schedules_end_where_asked():
    for kind in (CubicSchedule, LinearSchedule):
        rows = kind(iterations=4, dense=0.2, mid_2_4=0.5, topk=0.3, epochs=1).rows
        assert (rows[-1].dense, rows[-1].mid_2_4, rows[-1].topk) == pytest.approx((0.2, 0.5, 0.3))


def test_cubic_moves_more_at_first():
    cubic, linear = CubicSchedule().rows, LinearSchedule().rows
    assert cubic[0].dense_to_2_4 > linear[0].dense_to_2_4 and cubic[-1].dense_to_2_4 < linear[-1].dense_to_2_4
    assert cubic[0].dense == pytest.approx(1 - 0.65 * (1 - 0.8**3))


@pytest.mark.parametrize("shares", [(0.5, 0.4, 0.2), (float("nan"), 0.5, 0.5), (1.5, -0.5, 0.0)])
def test_generated_shares_must_sum_to_one(shares):
    with pytest.raises(ValueError, match="sum to 1"):
        CubicSchedule(*(5, *shares))
    with pytest.raises(ValueError, match="iterations"):
        LinearSchedule(iterations=0)
