"""How the arms of the answers' experiment are named and judged; the experiment itself takes an hour."""

import json
from pathlib import Path

import pytest

from bench.experiments import token_answers
from common.records import record


def _row(scorer, schedule, kept, bound=2.0, unseen=10):
    kinds = {"code": {"whole_right": 80, "kept_right": 80}, "dish": {"whole_right": 20, "kept_right": unseen}}
    shares = {"task": "needles", "whole_right": 100, "kept_right": kept, "kinds": kinds}
    read = {"left_out": None, "kept_read": None, "read_right": 0}
    return {"scorer": scorer, "schedule": schedule, "bound": bound, "kv_share": 0.5} | shares | read


def test_every_arm_has_its_own_figure_and_calibrated_ones_are_judged(tmp_path):
    rows = [
        {"scorer": "unpruned", "schedule": "", "whole_right": 100, "samples": 120},
        _row("last_window", "layers=[6]", 0.7),
        _row("random", "layers=[6]", 0.2),
        _row("random", "layers=[8]", 0.1),
        _row("calibrated-2", "layers=[6]", 0.96),
        _row("calibrated-2.5", "layers=[7]", 0.85),
        _row("calibrated-3.5", "layers=[8]", 0.8),
        _row("snap_kv", "keep=0.4", 0.9, 1.0),
    ]
    token_answers._answers(tmp_path / "r.jsonl", Path("model"), "needles", rows, "c" * 40)
    token_answers._answers(tmp_path / "more.jsonl", Path("model"), "needles-more", rows, "c" * 40)
    assert record.read(tmp_path / "more.jsonl")[0][0]["details"]["task"] == "needles-more", "the experiment's"
    found = {one["figure"]: one for one in record.read(tmp_path / "r.jsonl")[0]}
    calibrated = [f"needles{kinds}-calibrated-{speedup}" for speedup in (2, 2.5, 3.5) for kinds in ("", "-unseen")]
    assert list(found) == [
        "needles-last_window-calibrated-2",
        "needles-random-calibrated-2",
        "needles-random-calibrated-3.5",
        *calibrated,
        "needles-snap_kv",
    ]
    assert found["needles-calibrated-2"]["reached"] is True and found["needles-calibrated-2.5"]["reached"] is False
    assert found["needles-random-calibrated-2"]["reached"] is True
    assert found["needles-random-calibrated-2"]["target"] == "≤ 40 %"
    assert found["needles-snap_kv"]["reached"] is None and found["needles-calibrated-2"]["value"] == 96
    assert found["needles-unseen-calibrated-2"]["value"] == 50
    assert "of 20 right answers" in found["needles-unseen-calibrated-2"]["what"]


def test_controls_are_figures_and_what_is_not_guessed_is_counted_apart(tmp_path):
    told = {"left_out": "told", "kept_read": 0.0, "read_right": 40}
    beside = {"left_out": "beside", "kept_read": 0.9, "read_right": 40}
    rows = [
        {"scorer": "unpruned", "schedule": "", "whole_right": 100, "samples": 120},
        _row("answer_left_out", "", 0.6, 1.0) | told,
        _row("sentence_left_out", "", 0.8, 1.0) | beside,
        _row("calibrated-2", "layers=[6]", 0.9) | {"kept_read": 0.95, "read_right": 40},
    ]
    token_answers._answers(tmp_path / "r.jsonl", Path("model"), "questions", rows, "c" * 40)
    found = {one["figure"]: one for one in record.read(tmp_path / "r.jsonl")[0]}
    shares = {name: one["value"] for name, one in found.items() if "unseen" not in name}
    assert shares == {
        "questions-answer_left_out": 60,
        "questions-sentence_left_out": 80,
        "questions-read-sentence_left_out": 90,
        "questions-calibrated-2": 90,
        "questions-read-calibrated-2": 95,
    }
    assert found["questions-answer_left_out"]["what"].endswith("gives without the sentence that tells them, too")
    assert "of 40 right answers" in found["questions-read-calibrated-2"]["what"]
    assert found["questions-read-calibrated-2"]["details"]["task"] == "questions, not guessed"


def test_a_schedule_that_misses_its_speed_up_does_not_count(tmp_path):
    rows = [{"scorer": "unpruned", "schedule": ""}, _row("calibrated-2", "layers=[6]", 1.0, bound=1.9)]
    token_answers._answers(tmp_path / "r.jsonl", Path("model"), "needles", rows, None)
    assert record.read(tmp_path / "r.jsonl")[0][0]["reached"] is False


def test_texts_that_share_documents_are_refused(tmp_path):
    texts = {name: tmp_path / f"{name}.json" for name in ("calibration", "asked", "other")}
    for name, path in texts.items():
        path.write_text(json.dumps([{"text": f"{name} {number}"} for number in range(3)]))
    texts["other"].write_text(json.dumps([{"text": "more"}, {"text": "calibration 1\n"}]))
    with pytest.raises(ValueError, match="calibration and other share 1 documents"):
        token_answers.run(tmp_path / "r.jsonl", tmp_path / "work", tmp_path, texts)
    assert not (tmp_path / "work").exists()


def test_texts_that_are_missing_are_named(tmp_path):
    with pytest.raises(ValueError, match="texts: asked, other missing"):
        token_answers.run(tmp_path / "r.jsonl", tmp_path, tmp_path, {"calibration": tmp_path})
