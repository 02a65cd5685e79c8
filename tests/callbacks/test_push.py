"""`--push`: refused before any work, uploaded after it, and told how to repeat."""

import base64
import json
import shutil
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from unittest import mock

import pytest
from huggingface_hub import constants

import main
from callbacks.model_card import HFExport
from callbacks.push import Push, left
from common.files import replacing
from common.manifest import DamagedError
from lightning_modules.block_sparsity import BlockSparsity
from lightning_modules.card import card
from lightning_modules.data.embedded import EmbeddedDocs
from tests.command_line import TINY

NAME = "somebody/small"
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Lightning calls jsonargparse by an old name


class _Hub(ThreadingHTTPServer):
    """As much of the Hub as an upload asks: one repository, all of whose files are regular ones."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answers)
        self.files = {}
        self.made = None
        self.tokens = set()
        self.refuse = None


class _Answers(BaseHTTPRequestHandler):
    server: _Hub

    def do_GET(self) -> None:
        files = [{"type": "file", "path": name, "size": 1, "oid": "0" * 40} for name in self.server.files]
        known = "/tree/" in self.path  # what else the client asks for it would keep for later, in the user's cache
        self._answer(files if known else {"error": "unknown"}, 200 if known else 404)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.tokens.add(self.headers["Authorization"])
        address = f"http://127.0.0.1:{self.server.server_port}/{NAME}"
        if self.server.refuse and self.server.refuse in self.path:
            self._answer({"error": "no room left for somebody"}, 403)
        elif self.path == "/api/repos/create":
            self.server.made = json.loads(body)
            self._answer({"url": address})
        elif "/preupload/" in self.path:
            files = [file["path"] for file in json.loads(body)["files"]]
            self._answer({"files": [{"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in files]})
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    self.server.files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "deletedFile":
                    del self.server.files[value["path"]]
            self._answer({"commitUrl": f"{address}/commit/{'1' * 40}", "commitOid": "1" * 40, "pullRequestUrl": None})
        else:  # what the card says is checked first
            self._answer({"errors": [], "warnings": []})

    def _answer(self, found, status: int = 200) -> None:
        text = json.dumps(found).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def hub(monkeypatch):
    server = _Hub()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    yield server
    server.shutdown()
    server.server_close()


def _leave(folder) -> None:
    with replacing(folder, "model") as beside:
        (beside / "model.safetensors").write_bytes(b"weights")
        (beside / "README.md").write_text(card("small", "A model."))


def test_weights_that_pare_did_not_write_stay(hub, tmp_path):
    hub.files = {"model.safetensors": b"somebody's"}
    push = Push(NAME, tmp_path / "a model")
    _leave(push.folder)
    with pytest.raises(RuntimeError, match="weights that Pare did not write"):
        push.upload()
    assert hub.files == {"model.safetensors": b"somebody's"} and (push.folder / "model.safetensors").is_file()


def test_the_whole_folder_arrives_and_weights_of_an_earlier_result_go(hub, tmp_path):
    hub.files = {"model-00001-of-00002.safetensors": b"old", "model.safetensors.index.json": b"{}", "NOTES": b"kept"}
    hub.files["pare.json"] = b"{}"
    push = Push(NAME, tmp_path / "a model")
    _leave(push.folder)
    assert push.upload() == f"{constants.ENDPOINT}/{NAME}"
    assert hub.made.get("visibility") == "private" or hub.made.get("private") is True  # its newer and older name
    assert hub.tokens == {"Bearer hf_secret"}
    assert hub.files.keys() == {"NOTES", "README.md", "model.safetensors", "pare.json"}
    assert hub.files["model.safetensors"] == b"weights"
    assert hub.files["README.md"].startswith(b"---\nlibrary_name: transformers")


@pytest.mark.parametrize("refused", ["/api/repos/create", "/preupload/", "/commit/"])
def test_a_failed_upload_leaves_the_folder_and_says_how_to_repeat_it(hub, refused, tmp_path):
    hub.refuse = refused
    push = Push(NAME, tmp_path / "a model")
    _leave(push.folder)
    with pytest.raises(RuntimeError, match="no room left for somebody") as told:
        push.upload()
    assert f"Again: hf upload {NAME} '{push.folder}' . --private --delete '*.safetensors*'" in str(told.value)
    assert (push.folder / "model.safetensors").read_bytes() == b"weights"


def test_only_what_the_command_wrote_and_nothing_damaged_is_uploaded(hub, tmp_path):
    _leave(tmp_path / "model")
    push = Push(NAME, tmp_path / "model")
    with pytest.raises(RuntimeError, match="nothing was written"):
        push.upload()
    _leave(push.folder)
    (push.folder / "model.safetensors").write_bytes(b"wEights")
    with pytest.raises(DamagedError):
        push.upload()
    assert hub.made is None


@pytest.mark.parametrize(
    ("name", "offline", "token", "says"),
    [
        ("small", False, True, "has no owner; give OWNER/NAME"),
        ("a/b/c", False, True, "push: Repo id"),
        ("some body/small", False, True, "push: Repo id"),
        (NAME, True, True, "HF_HUB_OFFLINE is set"),
        (NAME, False, False, "run `hf auth login`, or set HF_TOKEN"),
    ],
)
def test_what_cannot_succeed_is_refused(name, offline, token, says, monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr("callbacks.push.get_token", lambda: "hf_secret" if token else None)
    with pytest.raises(ValueError, match=says):
        Push(name, tmp_path)


def _main(*arguments: str) -> int:
    with mock.patch.object(sys, "argv", ["main.py", *arguments]):
        try:
            main.main()
        except SystemExit as stop:
            return int(stop.code or 0)
    return 0


@pytest.mark.parametrize(
    ("command", "arguments", "says"),
    [
        ("fit", [], "fit leaves no folder to upload"),  # without HFExport
        ("validate", [], "validate leaves no folder"),
        ("generate", [], "generate leaves no folder"),
        ("check", ["--command", "validate"], "validate leaves no folder"),
        ("fit", ["--trainer.fast_dev_run", "true"], "a trial run leaves nothing"),
        ("fit", ["--trainer.callbacks+=HFExport", "--trainer.callbacks.dirpath", "model"], "HF_HUB_OFFLINE is set"),
    ],
)
def test_a_command_refuses_before_any_work(command, arguments, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(EmbeddedDocs, "prepare_data", lambda self: pytest.fail("text was read"))
    assert _main(command, *TINY, *arguments, "--push", NAME) == 2
    assert says in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_fit_pushes_its_export_with_the_record_in_the_card(hub, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    export = ["--trainer.callbacks+=HFExport", "--trainer.callbacks.dirpath", "runs/model"]
    alone = ["--trainer.strategy", "auto", "--trainer.devices", "1", "--trainer.max_steps", "8"]
    assert _main("fit", *TINY, *alone, *export, "--push", NAME) == 0
    assert hub.files.keys() >= {"model.safetensors", "config.json", "tokenizer.json", "README.md"}
    assert b"| val_ppl |" in hub.files["README.md"]
    assert f"uploaded: {constants.ENDPOINT}/{NAME}" in capfd.readouterr().out
    assert hub.files["model.safetensors"] == (tmp_path / "runs/model/model.safetensors").read_bytes()
    shutil.rmtree(tmp_path / "runs")


def test_every_module_says_what_its_commands_leave(tmp_path):
    sparse = BlockSparsity(str(tmp_path), str(tmp_path / "out"))
    assert [left(command, [], sparse) for command in ("fit", "prune", "export")] == [tmp_path / "out"] * 3
    assert left("verify", [], sparse) is None and left("export", [], SimpleNamespace()) is None
    assert left("fit", [HFExport(str(tmp_path / "hf"))], sparse) == tmp_path / "hf"


def test_a_card_names_no_folder_as_its_base(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/base").mkdir(parents=True)
    for base in ("runs/base", str(tmp_path / "gone"), "owner/name/file.gguf", None):
        assert "base_model" not in card("small", "A model.", base)
    assert "base_model: somebody/dense\n" in card("small", "A model.", "somebody/dense")
