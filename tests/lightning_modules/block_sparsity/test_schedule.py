"""Schedules: the committed one, generated ones, and what the loader says about wrong files."""

import pytest

from lightning_modules.block_sparsity.schedule import CsvSchedule, CubicSchedule, LinearSchedule
from tests.conftest import ROOT

SEED = (ROOT / "configs/block_sparsity/progressive.csv").read_text()


def _csv(tmp_path, text):
    (tmp_path / "s.csv").write_text(text)
    return CsvSchedule(str(tmp_path / "s.csv"))


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


@pytest.mark.parametrize(
    ("change", "names"),
    [
        (("3,0.65,", "3,0.70,"), "row 3, column dense"),
        (("2,0.80,0.10,", "2,0.80,0.20,"), "row 2, column mid_2_4"),
        (("5,0.35,0.45,0.20,", "5,0.35,0.45,0.25,"), "row 5, column topk"),
        (("\n4,", "\n5,"), "row 4, column iteration"),
        (("0.15,0.05,2\n4", "abc,0.05,2\n4"), "column dense_to_2_4: 'abc'"),
        (("0.10,0.00,2", "0.10,0.00,1.5"), "column epochs"),
        (("0.10,0.00,2", "0.10,0.00,-1"), "row 1, column epochs"),
        ((",epochs", ",epoch"), "missing column epochs"),
        (("0.35,0.45,0.20,0.15,0.00", "0.60,0.20,0.20,-0.10,0.00"), "row 5, column dense_to_2_4.*un-demoted"),
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


@pytest.mark.parametrize("kind", [CubicSchedule, LinearSchedule])
def test_generated_schedules_obey_the_identities_and_end_where_asked(kind, tmp_path):
    rows = kind(iterations=4, dense=0.2, mid_2_4=0.5, topk=0.3, epochs=1).rows
    fields = ("iteration", "dense", "mid_2_4", "topk", "dense_to_2_4", "mid_2_4_to_topk", "epochs")
    lines = [",".join(fields)] + [",".join(str(getattr(row, f)) for f in fields) for row in rows]
    assert len(_csv(tmp_path, "\n".join(lines)).rows) == 4
    assert (rows[-1].dense, rows[-1].mid_2_4, rows[-1].topk) == pytest.approx((0.2, 0.5, 0.3))


def test_cubic_moves_more_at_first():
    cubic, linear = CubicSchedule().rows, LinearSchedule().rows
    assert cubic[0].dense_to_2_4 > linear[0].dense_to_2_4 and cubic[-1].dense_to_2_4 < linear[-1].dense_to_2_4
    assert cubic[0].dense == pytest.approx(1 - 0.65 * (1 - 0.8**3))


def test_generated_shares_must_sum_to_one():
    with pytest.raises(ValueError, match="sum to 1"):
        CubicSchedule(dense=0.5, mid_2_4=0.4, topk=0.2)
    with pytest.raises(ValueError, match="iterations"):
        LinearSchedule(iterations=0)
