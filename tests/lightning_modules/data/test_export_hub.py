import json
import re

import pytest

from lightning_modules.data import export_hub
from lightning_modules.data.readers import document_text, read_json_array

ROWS = [{"id": str(i), "url": "x", "title": f"Größe {i}", "text": "word " * 100} for i in range(50)]


@pytest.fixture
def rows(monkeypatch):
    rows = list(ROWS)
    monkeypatch.setattr(export_hub, "hub_rows", lambda dataset, config, split: (row for row in rows))
    return rows


def test_export_is_a_json_array_that_can_be_trained_on(rows, tmp_path):
    output = tmp_path / "out.json"
    assert export_hub.export("some/dataset", output) == 50
    assert json.loads(output.read_text()) == [{key: row[key] for key in ("id", "title", "text")} for row in ROWS]
    assert [document_text(record, where) for record, where, _ in read_json_array(output)] == [
        f"{row['title']}\n{row['text']}" for row in ROWS
    ]
    assert list(tmp_path.iterdir()) == [output]


def test_export_stops_at_the_size_asked_for(rows, tmp_path):
    output = tmp_path / "out.json"
    records = export_hub.export("some/dataset", output, max_mb=0.01)
    assert 0 < records < 50
    assert 0.009e6 < output.stat().st_size < 0.0101e6


def test_failed_export_leaves_what_was_there(rows, tmp_path):
    output = tmp_path / "out.json"
    output.write_text("before")
    rows.append({"content": "?"})
    with pytest.raises(ValueError, match="some/dataset, row 51 has no field 'text'"):
        export_hub.export("some/dataset", output, overwrite=True)
    assert output.read_text() == "before"
    assert list(tmp_path.iterdir()) == [output]


def test_arguments_are_checked(rows, tmp_path):
    with pytest.raises(ValueError, match="max_mb must be positive"):
        export_hub.export("some/dataset", tmp_path / "out.json", max_mb=0)
    with pytest.raises(FileNotFoundError, match="output: no such folder"):
        export_hub.export("some/dataset", tmp_path / "nowhere" / "out.json")
    rows.clear()
    with pytest.raises(ValueError, match="has no rows"):
        export_hub.export("some/dataset", tmp_path / "out.json")


def test_command_without_a_network_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["export_hub", "--dataset", "a/b", "--output", "out.json"])
    with pytest.raises(SystemExit) as ended:
        export_hub.main()
    assert re.fullmatch("error: Hub dataset 'a/b'.*Offline, give a file or folder instead.*", ended.value.code)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_there_is_replaced_only_when_asked(rows, tmp_path):
    output = tmp_path / "out.json"
    output.write_text("mine")
    with pytest.raises(ValueError, match=r"^output: .*out\.json is a file that exists"):
        export_hub.export("some/dataset", output)
    assert output.read_text() == "mine"
    assert export_hub.export("some/dataset", output, overwrite=True) == 50
