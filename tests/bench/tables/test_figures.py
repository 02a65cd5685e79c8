import json

import pytest

from bench.__main__ import main
from bench.tables import figures
from common.records import record

BASE = {"what": "Prefill speed-up", "unit": "×", "target": "≥ 2 ×", "command": "python -m x"}


def test_the_newest_record_of_a_figure_wins_and_order_is_kept(tmp_path):
    path = tmp_path / "figures.jsonl"
    figures.append(path, figure="a", value=1.5, reached=False, **BASE)
    figures.append(path, figure="b", value=None, reached=None, **{**BASE, "what": "GPU | speed"})
    figures.append(path, figure="a", value=2.25, reached=True, spread=0.125, details={"repeats": 5}, **BASE)
    record.append(path, {"kind": "run", "run_name": "x"})
    records, _ = record.read(path)
    first, second = [e["figure"] for e in figures.latest(records)]
    assert (first, second) == ("a", "b")
    text = figures.render_table(records)
    header, _, row_a, row_b = text.splitlines()[:4]
    assert header == "| figure | measured | target | reached |"
    assert row_a == "| Prefill speed-up | 2.25 ± 0.125 × | ≥ 2 × | yes |"
    assert row_b == "| GPU \\| speed | not measured | ≥ 2 × | not measured |"
    assert "1.5" not in text
    assert text.splitlines()[5].startswith("Measured on ") and records[0]["date"][:10] in text
    assert text.endswith("\nMeasured again by `python -m x`.\n")


def test_an_older_date_later_in_the_file_does_not_win(tmp_path):
    path = tmp_path / "figures.jsonl"
    newer = figures.append(path, figure="a", value=2.0, reached=True, **BASE)
    record.append(path, {**newer, "value": 1.0, "date": "2000-01-01T00:00:00+00:00"})
    assert figures.latest(record.read(path)[0])[0]["value"] == 2.0


def test_figures_of_two_machines_and_two_commits_are_told_apart(tmp_path):
    path = tmp_path / "figures.jsonl"
    entry = {**figures.append(path, figure="a", value=2.0, reached=True, **BASE), "git_commit": "a" * 40}
    gpu = {**entry["machine"], "gpus": [{"name": "NVIDIA X"}]}
    later = {**entry, "figure": "b", "machine": gpu, "git_commit": "b" * 40, "git_dirty": True}
    text = figures.render_table([{**entry, "git_dirty": False}, later])
    header, _, row_a, row_b = text.splitlines()[:4]
    assert header.endswith("| reached | commit |")
    assert row_a.endswith(f"| {'a' * 10} |") and row_b.endswith(f"| {'b' * 10} with local changes |")
    of_a, of_b = [line for line in text.splitlines() if line.startswith("Measured on")]
    assert f"({'a' * 10}, " in of_a and "NVIDIA" not in of_a
    assert of_b.startswith("Measured on 1 × NVIDIA X") and f"({'b' * 10} with local changes, " in of_b


def test_one_cards_figures_do_not_hide_anothers(tmp_path):
    entry = figures.append(tmp_path / "figures.jsonl", figure="gpu-a", value=2.0, reached=True, **BASE)
    records = [
        {**entry, "machine": {**entry["machine"], "gpus": [{"name": f"NVIDIA {card}"}]}, "value": value}
        for card, value in (("X", 1.0), ("Y", 3.0), ("X", 2.0))
    ]
    header, _, first, second = figures.render_table(records).splitlines()[:4]
    assert header.endswith("| reached | GPU |")
    assert "| 2 × |" in first and first.endswith("| NVIDIA X |") and second.endswith("| NVIDIA Y |")
    assert len(figures.latest(records)) == 2
    older = {**records[1], "date": "2000-01-01T00:00:00+00:00"}
    assert figures.newest([records[0], older])["gpu-a"]["value"] == 1.0


def test_chosen_figures_in_the_order_asked_for(tmp_path):
    path = tmp_path / "figures.jsonl"
    for name in ("a", "b", "c"):
        figures.append(path, figure=name, value=2.0, reached=None, **{**BASE, "what": name, "target": "report"})
    records, _ = record.read(path)
    rows = figures.render_table(records, ["c", "a"]).splitlines()[2:4]
    assert rows == ["| c | 2 × | report | reported |", "| a | 2 × | report | reported |"]
    assert figures.render_table(records, ["b", "*"], ["measured", "figure"]).splitlines()[2:5] == [
        "| 2 × | b |",
        "| 2 × | a |",
        "| 2 × | c |",
    ]
    with pytest.raises(ValueError, match="no figure d"):
        figures.render_table(records, ["a", "d"])
    with pytest.raises(ValueError, match="no column speed"):
        figures.render_table(records, ["a"], ["speed"])


def test_what_is_no_honest_figure_is_refused(tmp_path):
    path = tmp_path / "figures.jsonl"
    with pytest.raises(ValueError, match="reached is True but value is null"):
        figures.append(path, figure="a", value=None, reached=True, **BASE)
    with pytest.raises(ValueError, match="value"):
        figures.append(path, figure="a", value="fast", reached=True, **BASE)
    assert not path.exists()
    with pytest.raises(ValueError, match="no figure"):
        figures.render_table([])


def test_table_command_shows_one_file(tmp_path, capsys):
    records = tmp_path / "figures.jsonl"
    figures.append(records, figure="a", value=2.0, reached=True, **BASE)
    with open(records, "a") as file:
        file.write(json.dumps({"kind": "figure"})[:-3])
    assert main(["table", str(records)]) == 0
    shown = capsys.readouterr()
    assert "1 broken line" in shown.err and "| Prefill speed-up | 2 × |" in shown.out
    assert main(["table", str(records), "--only", "b*"]) == 1
    assert "no figure b*" in capsys.readouterr().err


def test_value_rounded_to_digits_has_no_spread(tmp_path):
    entry = figures.append(tmp_path / "f.jsonl", figure="a", value=104716.2, reached=None, spread=3.0, **BASE)
    assert figures.measured(entry, 2) == "100,000 ×" and figures.measured({**entry, "value": 1.0549}, 3) == "1.05 ×"
    assert figures.measured({**entry, "value": None}, 2) == "not measured"
