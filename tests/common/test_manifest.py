"""What was written is known by name, size and content: damage is noticed."""

import json
from pathlib import Path

import pytest

from common import manifest as manifests
from common.files import check_output, replacing
from common.manifest import DamagedError, check_manifest
from tests.common.writers import write


def test_a_manifest_names_kind_and_every_file(tmp_path):
    write(tmp_path / "model", "weights")
    manifest = check_manifest(tmp_path / "model")
    assert manifest == json.loads((tmp_path / "model/pare.json").read_text())
    assert manifest["pare"] == 1 and manifest["kind"] == "model" and manifest["ranks"] is None
    assert {name: entry["bytes"] for name, entry in manifest["files"].items()} == {"config.json": 2, "sub/weights": 7}


def test_folders_without_a_manifest_pass(tmp_path):
    assert check_manifest(tmp_path) is None


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_flip, "is not what was written"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "6 bytes instead of 7"),
        (Path.unlink, "is missing"),
    ],
)
def test_damage_is_noticed_and_the_file_named(damage, message, tmp_path):
    write(tmp_path / "model", "weights")
    damage(tmp_path / "model/sub/weights")
    with pytest.raises(DamagedError, match=rf"sub/weights .*{message}|sub/weights {message}"):
        check_manifest(tmp_path / "model")


def test_much_is_read_with_progress_each_file_once_and_the_damaged_one_named(tmp_path, monkeypatch, caplog):
    with replacing(tmp_path / "out", "cache") as beside:
        for number in range(20):
            (beside / f"{number:02}").write_text(f"file {number}")
    read = []
    monkeypatch.setattr(manifests, "_sha256", lambda path, real=manifests._sha256: read.append(path.name) or real(path))
    with caplog.at_level("INFO"):
        check_manifest(tmp_path / "out")
    assert not caplog.records and sorted(read) == [f"{number:02}" for number in range(20)]
    monkeypatch.setattr(manifests, "_SILENT", 100)
    with caplog.at_level("INFO"):
        check_manifest(tmp_path / "out")
    assert f"Checking {tmp_path / 'out'}" in caplog.text
    (tmp_path / "out/13").write_text("FILE 13")
    with pytest.raises(DamagedError, match="out/13 is not what was written"):
        check_manifest(tmp_path / "out")


def test_a_damaged_manifest_is_named(tmp_path):
    write(tmp_path / "model", "weights")
    whole = (tmp_path / "model/pare.json").read_text()
    flipped = (whole.replace('"model"', '"nodel"'), whole.replace('"bytes": 7', '"bytes": 6'), whole[:-3])
    for text in ("", "{}", "[]", '{"pare": 1, "kind": "model", "files": {"a": 1}}', '{"pare": 1}', *flipped):
        (tmp_path / "model/pare.json").write_text(text)
        with pytest.raises(DamagedError, match=r"pare\.json is damaged"):
            check_manifest(tmp_path / "model")
        with pytest.raises(ValueError, match="did not write"):
            check_output(tmp_path / "model", "output")


def test_processes_can_share_the_check(tmp_path):
    write(tmp_path / "model", "weights")
    _flip(tmp_path / "model/sub/weights")
    check_manifest(tmp_path / "model", part=(0, 2))  # config.json
    with pytest.raises(DamagedError, match="weights"):
        check_manifest(tmp_path / "model", part=(1, 2))


def test_a_model_card_may_be_edited_and_is_still_pares_to_replace(tmp_path):
    with replacing(tmp_path / "model", "model") as folder:
        (folder / "README.md").write_text("# model")
        (folder / "weights").write_text("1")
    (tmp_path / "model/README.md").write_text("# my model")
    check_manifest(tmp_path / "model")
    check_output(tmp_path / "model", "model.output")
