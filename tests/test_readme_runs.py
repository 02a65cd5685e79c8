"""README.md's commands run as they stand, one after another, in a folder that has nothing but what the repository has.

Only sizes are added, so that each takes seconds; a command without an entry must be short by itself. `FOLDER` is a
small random Llama. Left out are installing and testing, the tour (CI makes it), and what must find facts, which takes
a model that answers questions: the tour trains one.
"""

import json
import os
import re
import runpy
import shlex
import sys
import warnings
from pathlib import Path

import pytest
import torch

from lightning_modules.data.tokenizer import train_bpe
from tests.conftest import ROOT
from tests.lightning_modules.structured_pruning.toy import tiny
from tests.ranks import FORKED
from tests.test_readme import _commands

CHAT = "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + ' ' }}{% endfor %}assistant: "
LEFT_OUT = re.compile(r"^pip |bench tour|calibrate")
TEXT = ["--data.block_size=64", "--data.batch_size=2", "--data.max_val_blocks=4"]
DOCS = ["--data.sources=[topics]", *TEXT]
STEPS = ["--trainer.max_steps=2", "--trainer.val_check_interval=2", "--model.warmup_steps=1"]
GPT = ["--model.config={n_layer: 2, n_embd: 32, n_head: 2}", "--data.vocab_size=300"]
# Arguments are added by the first of these that a command has in it.
SIZES = {
    "generate": ["--max_new_tokens=4"],
    "fit --config configs/quickstart.yaml": [*DOCS, *STEPS, *GPT],
    "--data TextCorpus": [*TEXT, *STEPS, *GPT],
    "fit --config configs/pretraining/gpt2_tiny.yaml": [*DOCS, *STEPS, *GPT],
    "validate --config configs/quickstart.yaml": DOCS,
    "bench/smoke.yaml": ["--only=local/int8"],
    "mine/prune.yaml": [*DOCS, "--model.calibration_blocks=16", "--model.probe_blocks=1"],
    "structured_pruning/prune.yaml": [*DOCS, "--model.calibration_blocks=16", "--model.probe_blocks=1"],
    "structured_pruning/recover.yaml": [*DOCS, *STEPS],
    "block_sparsity/oneshot.yaml": [*DOCS, "--model.calibration_blocks=2"],
    "block_sparsity/progressive.yaml": [
        *DOCS, "--model.calibration_blocks=2", "--trainer.limit_train_batches=1", "--model.warmup_steps=1",
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("readme")
    for name in ("configs", "main.py"):
        (folder / name).symlink_to(ROOT / name)
    words = "the quick brown fox jumps over the lazy dog and reads what a river is, and why it returns. "
    tokenizer = train_bpe(iter([[words * 20]]), 300)
    tokenizer.chat_template = CHAT
    sizes = {"hidden_size": 64, "intermediate_size": 96, "max_position_embeddings": 512, "head_dim": 16}
    tiny(vocab_size=len(tokenizer), num_attention_heads=4, num_key_value_heads=2, **sizes).save_pretrained(
        folder / "FOLDER"
    )
    tokenizer.save_pretrained(folder / "FOLDER")
    texts = [{"id": str(i), "title": f"a{i}", "text": words * 4} for i in range(200)]
    (folder / "my_corpus.json").write_text(json.dumps(texts))
    return folder


def _typed(words: list[str], folder: Path, log: Path) -> None:
    """Be the process that this command line starts; most of what it would take is importing."""
    os.chdir(folder)
    os.environ.update({"PYTHONPATH": str(ROOT), "PARE_CACHE": "cache", "OMP_NUM_THREADS": "1"})
    torch.set_num_threads(1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT), 1)
    os.dup2(1, 2)
    warnings.resetwarnings()
    if words[:2] == ["-m", "bench"]:
        sys.argv = ["bench", *words[2:]]
        runpy.run_module("bench", run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")


@pytest.mark.timeout(600)
def test_every_command_of_the_readme_runs(place):
    ran = []
    for line in _commands((ROOT / "README.md").read_text()):
        for command in re.split(r" && ", line):
            if LEFT_OUT.search(command) or not command.startswith("python "):
                continue
            added = next((sizes for part, sizes in SIZES.items() if part in command), [])
            words, log = [*shlex.split(command, comments=True)[1:], *added], place / f"{len(ran)}.log"
            process = FORKED.Process(target=_typed, args=(words, place, log))
            process.start()
            process.join(240)
            if process.is_alive():  # else pytest would wait for it at its end
                process.kill()
                process.join()
            assert process.exitcode == 0, f"{command}\n{log.read_text()[-5000:]}"
            ran.append(command)
    assert len(ran) >= 17 and (place / "report.html").is_file()
