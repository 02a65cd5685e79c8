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
    assert header == "| figure | measured | target | reached | command |"
    assert row_a == "| Prefill speed-up | 2.25 ± 0.125 × | ≥ 2 × | yes | `python -m x` |"
    assert row_b == "| GPU \\| speed | not measured | ≥ 2 × | not measured | `python -m x` |"
    assert "1.5" not in text
    assert text.splitlines()[5].startswith("Measured on ") and records[0]["date"][:10] in text


def test_an_older_date_later_in_the_file_does_not_win(tmp_path):
    path = tmp_path / "figures.jsonl"
    newer = figures.append(path, figure="a", value=2.0, reached=True, **BASE)
    record.append(path, {**newer, "value": 1.0, "date": "2000-01-01T00:00:00+00:00"})
    assert figures.latest(record.read(path)[0])[0]["value"] == 2.0


def test_figures_from_two_machines_are_told_apart(tmp_path):
    path = tmp_path / "figures.jsonl"
    entry = figures.append(path, figure="a", value=2.0, reached=True, **BASE)
    gpu = {**entry["machine"], "gpus": [{"name": "NVIDIA X"}]}
    record.append(path, {**entry, "figure": "b", "machine": gpu})
    lines = figures.render_table(record.read(path)[0]).splitlines()
    assert [line for line in lines if line.startswith("Measured on") and line.endswith("(a).")]
    assert [line for line in lines if line.startswith("Measured on 1 × NVIDIA X") and line.endswith("(b).")]


def test_chosen_figures_in_the_order_asked_for(tmp_path):
    path = tmp_path / "figures.jsonl"
    for name in ("a", "b", "c"):
        figures.append(path, figure=name, value=2.0, reached=None, **{**BASE, "what": name, "target": "report"})
    records, _ = record.read(path)
    rows = figures.render_table(records, ["c", "a"]).splitlines()[2:4]
    assert rows == [
        "| c | 2 × | report | reported | `python -m x` |",
        "| a | 2 × | report | reported | `python -m x` |",
    ]
    with pytest.raises(ValueError, match="no figure d"):
        figures.render_table(records, ["a", "d"])


def test_what_is_no_honest_figure_is_refused(tmp_path):
    path = tmp_path / "figures.jsonl"
    with pytest.raises(ValueError, match="reached is True but value is null"):
        figures.append(path, figure="a", value=None, reached=True, **BASE)
    with pytest.raises(ValueError, match="value"):
        figures.append(path, figure="a", value="fast", reached=True, **BASE)
    assert not path.exists()
    with pytest.raises(ValueError, match="no figure"):
        figures.render_table([])


def test_update_file_replaces_only_what_is_between_the_markers(tmp_path):
    path = tmp_path / "README.md"
    path.write_text("# A\n<!-- begin:figures -->\nold\n<!-- end:figures -->\nlast\n")
    path.chmod(0o600)
    for table in ("| new |\n", "| newer |\n"):
        figures.update_file(path, "figures", table)
        assert path.read_text() == f"# A\n<!-- begin:figures -->\n\n{table}\n<!-- end:figures -->\nlast\n"
    assert path.stat().st_mode & 0o777 == 0o600
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "text",
    [
        "nothing",
        "<!-- begin:figures -->",
        "<!-- end:figures --><!-- begin:figures -->",
        "<!-- begin:figures --><!-- begin:figures --><!-- end:figures -->",
    ],
)
def test_update_file_refuses_missing_markers(tmp_path, text):
    path = tmp_path / "README.md"
    path.write_text(text)
    with pytest.raises(ValueError, match="begin:figures"):
        figures.update_file(path, "figures", "x")
    assert path.read_text() == text


def test_table_command(tmp_path, capsys):
    records, document = tmp_path / "figures.jsonl", tmp_path / "README.md"
    figures.append(records, figure="a", value=2.0, reached=True, **BASE)
    with open(records, "a") as file:
        file.write(json.dumps({"kind": "figure"})[:-3])
    document.write_text("<!-- begin:m --><!-- end:m -->")
    assert main(["table", str(records), "--into", str(document), "--marker", "m"]) == 0
    assert "1 broken line" in capsys.readouterr().err
    assert "| Prefill speed-up | 2 × |" in document.read_text()
    assert main(["table", str(records)]) == 0
    assert "| Prefill speed-up | 2 × |" in capsys.readouterr().out
    assert main(["table", str(records), "--into", str(document)]) == 1
    assert "begin:figures" in capsys.readouterr().err
