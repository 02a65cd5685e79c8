"""How `main.py` answers: help at once, results as JSON, silence, exit statuses, starter configurations."""

import json
import os
import re
import shlex
import subprocess
import sys
from unittest import mock

import pytest
import yaml

from common.front import answer, screens, starters
from lightning_modules import EmbeddedDocs
from tests.command_line import TINY
from tests.conftest import ROOT
from tests.lightning_modules.structured_pruning.toy import tiny
from tests.test_cli import _parse, main

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Lightning calls jsonargparse by an old name

PAGE = (ROOT / "docs/commands.md").read_text()
IMPORTS_NOTHING = """
import sys
sys.argv = ["main.py", *sys.argv[1:]]
from main import main
try:
    main()
finally:
    print("torch" in sys.modules, len(sys.modules), file=sys.stderr)
"""


@pytest.mark.parametrize(
    ("arguments", "status"),
    [([], 2), (["--help"], 0), (["fit", "-h"], 0), (["fitt"], 2), (["init"], 2), (["fitt", "--json"], 2)],
)
def test_help_and_mistakes_are_answered_without_importing_torch(arguments, status):
    done = subprocess.run([sys.executable, "-c", IMPORTS_NOTHING, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == status and done.stderr.splitlines()[-1].startswith("False"), done.stderr
    said = done.stdout + done.stderr
    assert ("fit" in said or "init FOLDER" in said) and "Traceback" not in said


def _run(*arguments):
    """Exit status; what was printed goes where it goes."""
    with mock.patch.object(sys, "argv", ["main.py", *arguments]):
        try:
            main.main()
        except SystemExit as stop:
            return stop.code or 0
    return 0


def test_each_command_has_a_screen_and_each_fits():
    from callbacks.command_line import PareCLI

    assert set(screens.COMMANDS) - {"init", "completion"} == PareCLI.subcommands().keys()
    for text in (screens.overview(), *map(screens.screen, screens.COMMANDS)):
        assert len(text.splitlines()) <= 40 and max(map(len, text.splitlines())) <= 120


def test_only_the_command_that_is_asked_for_gets_its_arguments(capsys, monkeypatch):
    from callbacks.command_line import PareCLI

    given, add = [], PareCLI.add_core_arguments_to_parser
    monkeypatch.setattr(PareCLI, "add_core_arguments_to_parser", lambda *a: given.append(a) or add(*a))
    assert _parse(capsys, "validate", *TINY, "--print_config")[0] == 0 and len(given) == 1
    code, out, err = _parse(capsys, "validate", *TINY, "--data.tokenizer", "fit", "--print_config")
    assert code == 0 and "tokenizer: fit" in out, err


@pytest.mark.parametrize("name", sorted(set(screens.COMMANDS) - {"init", "completion"}))
def test_screens_show_options_and_examples_that_are_accepted(name, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    command = screens.COMMANDS[name]
    own = [option.split()[0] for option, _ in command.options if not option.startswith(("--model.", "--data."))]
    if own:
        code, out, _ = _parse(capsys, name, "--help_all")
        assert code == 0 and all(option in out for option in own if not option.startswith("--trainer.strategy."))
    config = next(line for line in command.example if "mine/" not in line)
    code, _, err = _parse(capsys, *shlex.split(config), "--print_config")
    assert code == 0, err


def _one_object(capfd):
    out, err = capfd.readouterr()
    (line,) = out.splitlines()
    return json.loads(line), err


def test_json_is_one_object_on_stdout_and_the_rest_on_stderr(capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert _run("prepare", *TINY, "--json") == 0
    answer, err = _one_object(capfd)
    assert answer.keys() == {"command", "status", "result", "error"} and answer["command"] == "prepare"
    assert answer["status"] == 0 and answer["error"] is None and answer["result"]
    assert "data ready" in err


def test_json_tells_what_was_refused(capfd):
    assert _run("--json", "check", *TINY, "--model.learning_rate", "0") == 2
    answer, err = _one_object(capfd)
    assert answer["status"] == 2 and "learning_rate" in answer["error"] and answer["result"] is None
    assert err.startswith("error: ")


@pytest.mark.parametrize(
    ("arguments", "command", "said"),
    [
        (["--json", "--quiet"], "", "give a command"),
        (["prepaer", "--json"], "prepaer", "did you mean prepare?"),
        (["--json", "fitt"], "fitt", "did you mean fit?"),
        (["init", "--json"], "init", "give a new folder"),
        (["--json", "init", "--nothing"], "init", "--nothing"),
        (["completion", "--json", "cmd"], "completion", "give a shell"),
    ],
)
def test_mistakes_are_told_in_json(arguments, command, said, capfd):
    assert _run(*arguments) == 2
    answer, err = _one_object(capfd)
    assert answer == {"command": command, "status": 2, "result": None, "error": answer["error"]}
    assert said in answer["error"] and err.startswith("error: ") and said in err


def test_forms_before_a_command_change_nothing_else(capfd):
    assert _run("--quiet", "fit", "--help") == 0
    assert capfd.readouterr().out.startswith("usage: python main.py fit")
    assert _run("--quiet", "fitt") == 2 and "did you mean fit?" in capfd.readouterr().err


def test_a_fault_is_status_1_and_told_in_json(capfd, monkeypatch):
    def full(self):
        raise RuntimeError("the moon is full")

    monkeypatch.setattr(EmbeddedDocs, "prepare_data", full)
    with pytest.raises(RuntimeError):  # Python's status for it is 1
        _run("prepare", *TINY, "--json")
    answer, _ = _one_object(capfd)
    assert answer["status"] == 1 and answer["error"] == "RuntimeError: the moon is full"


@pytest.mark.parametrize(("signal", "status"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_signal_is_told_in_json(signal, status, capfd, monkeypatch):
    import signal as signals

    monkeypatch.setattr(EmbeddedDocs, "prepare_data", lambda self: os.kill(os.getpid(), signals.Signals[signal]))
    assert _run("prepare", *TINY, "--json") == status
    answer, _ = _one_object(capfd)
    assert answer["status"] == status and answer["error"] == f"stopped by {signal}"


def test_quiet_says_nothing_but_errors(capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert _run("prepare", *TINY, "--quiet") == 0
    assert capfd.readouterr().out == ""
    assert _run("check", *TINY, "--quiet", "--model.learning_rate", "0") == 2
    assert "learning_rate" in capfd.readouterr().err
    assert "PARE_QUIET" not in os.environ


def test_exit_statuses_are_documented():
    assert set(re.findall(r"^\| (\d+) \|", PAGE, re.M)) == {"0", "1", "2", "130", "143"}
    assert all(status in screens.screen("fit") for status in ("0 done", "1 it", "2 wrong", "130 ", "143 "))


def test_a_shell_completes_commands_options_and_folders(tmp_path):
    pytest.importorskip("shtab")
    script = tmp_path / "pare"
    with open(script, "w") as file:
        subprocess.run([sys.executable, "main.py", "completion", "bash"], cwd=ROOT, stdout=file, check=True)
    ask = 'source {}; COMP_WORDS=({}); COMP_CWORD={}; _shtab_pare; echo "${{COMPREPLY[@]}}"'

    def completed(*words):
        line = ask.format(script, " ".join(words), len(words) - 1)
        return subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=True).stdout.split()

    assert completed("pare", "cal") == ["calibrate"]
    assert {"--config", "--ckpt_path", "--json"} <= set(completed("pare", "fit", "--"))
    assert completed("pare", "init", "--task", "sp") == ["sparsify"]


# ---- starter configurations -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A Llama with a tokenizer and a chat template."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("model") / "my model"
    tiny(num_key_value_heads=4, max_position_embeddings=2048).save_pretrained(folder)
    vocabulary = {f"w{i}": i for i in range(96)} | {"<unk>": 96}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="w1")
    fast.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    fast.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("task", starters.tasks())
def test_what_init_writes_passes_check_and_its_commands_are_accepted(task, model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    checks = answer(["init", "mine", "--task", task, "--model", str(model)])
    run, then = starters.next_commands((tmp_path / f"mine/{task}.yaml").read_text())
    said = capsys.readouterr().out
    assert run in said and then in said and "configs/starter" not in run + then
    if task == "recover":
        (tmp_path / "mine/pruned").symlink_to(model)  # it starts from what `prune` left
    assert _run(*checks) == 0, capsys.readouterr().err
    text = (tmp_path / f"mine/{task}.yaml").read_text()
    assert starters.MODEL not in text and starters.OUTPUT not in text and text.count("#") > 8
    for line in (run, then):
        code, _, err = _parse(capsys, *shlex.split(line)[2:], "--print_config")
        assert code == 0, err


def test_init_refuses_to_overwrite_and_what_is_no_model(model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/prune.yaml").write_text("mine")
    asked = ["init", "mine", "--task", "prune", "--model"]
    (tmp_path / "notes.txt").touch()
    for folder, given, named in (
        ("mine", str(model), "mine/prune.yaml is there already"),
        ("new", "./nowhere", "there is no ./nowhere"),
        ("new", str(tmp_path / "mine"), "has no config.json"),
        ("new", "notes.txt", "neither a folder nor a GGUF file"),
        ("two words", str(model), "letters, digits"),
    ):
        asked[1] = folder
        assert answer([*asked, given]) == 2 and named in capsys.readouterr().err
    assert (tmp_path / "mine/prune.yaml").read_text() == "mine" and not (tmp_path / "new").exists()


def test_init_asks_two_questions_where_somebody_can_answer(model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert answer(["init", "mine"]) == 2 and "give --task" in capsys.readouterr().err
    replies = iter(["sparsify", str(model)])
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda question: next(replies))
    assert answer(["init", "mine"])[0] == "check"
    written = yaml.safe_load((tmp_path / "mine/sparsify.yaml").read_text())["model"]["init_args"]
    assert written["pretrained"] == str(model) and written["output"] == "mine/sparse"


def test_generate_takes_what_a_starter_left(model, tmp_path, monkeypatch, capsys):
    """The third command of a newcomer; pruning itself is tested elsewhere."""
    monkeypatch.chdir(tmp_path)
    assert isinstance(answer(["init", "mine", "--task", "prune", "--model", str(model)]), list)
    chat = ["generate", "--config", "mine/prune.yaml", "--chat", "true", "--prompt", "w3 w4", "--max_new_tokens", "3"]
    with pytest.raises(Exception, match=r"mine/pruned"):
        _run(*chat)
    (tmp_path / "mine/pruned").symlink_to(model)
    capsys.readouterr()
    assert _run(*chat, "--quiet") == 0
    assert capsys.readouterr().out.strip()
