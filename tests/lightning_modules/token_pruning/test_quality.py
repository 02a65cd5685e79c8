"""The quality bench: its tasks, its intervals, and that its arms differ only in what was dropped."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lightning_modules.data.recall import Recall
from lightning_modules.data.tokenizer import train_bpe
from lightning_modules.token_pruning.evaluation import pruned_nll
from lightning_modules.token_pruning.prefill import PromptPruner
from lightning_modules.token_pruning.quality import tasks
from lightning_modules.token_pruning.quality.measure import Arm, interval, read, summarise
from lightning_modules.token_pruning.quality.module import TokenQuality
from lightning_modules.token_pruning.samples import split_batch
from lightning_modules.token_pruning.schedule import Schedule
from lightning_modules.token_pruning.scorers.hidden_norm import HiddenNorm
from lightning_modules.token_pruning.scorers.random import Random
from lightning_modules.token_pruning.scorers.recency import Recency
from tests.lightning_modules.token_pruning.models import build, shared, tokens

SCHEDULE = Schedule(layers=[1, 3], keep=0.6, sinks=2, tail=0.0, min_tail=3)


@pytest.mark.parametrize("scorer", [HiddenNorm(), Recency()], ids=lambda s: s.name)
def test_pruning_by_mask_equals_the_pruned_prefill(scorer):
    """What training and validation compute is what inference does: same survivors, same loss."""
    model, ids = shared("llama"), tokens(2, 40)
    arm, whole = Arm(), Arm()
    window = tasks.suffix_windows(ids, 6)
    read(model, window, PromptPruner(scorer, SCHEDULE), arm)
    read(model, window, None, whole)
    with torch.no_grad():
        nll, count, pruning = pruned_nll(model, split_batch({"input_ids": ids, "labels": ids}, 6), SCHEDULE, scorer)
    torch.testing.assert_close(torch.tensor(arm.nll), nll / count, rtol=1e-4, atol=1e-4)
    assert arm.kept == [pytest.approx(int(pruning.alive[3][0, :34].sum()) / 34)] * 2
    assert whole.kept == [1.0, 1.0] and abs(arm.nll[0] - whole.nll[0]) > 1e-3


def test_the_unpruned_arm_is_the_model_s_own_loss():
    model, ids = shared("gpt2"), tokens(2, 30)
    arm = Arm()
    read(model, tasks.suffix_windows(ids, 5), None, arm)
    logits = model(ids).logits[:, -6:-1]
    expected = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, -5:], reduction="none").mean(1)
    torch.testing.assert_close(torch.tensor(arm.nll), expected.detach(), rtol=1e-4, atol=1e-5)


def test_a_repeated_passage_stands_beyond_what_is_protected():
    ids = torch.arange(100).repeat(2, 1)
    window = tasks.repeated_windows(ids, 10)
    assert window.prompt.shape == (2, 90) and window.suffix[0].tolist() == list(range(16, 26))
    assert not Schedule().protected(90)[16:26].any()
    with pytest.raises(ValueError, match="too short"):
        tasks.repeated_windows(ids[:, :40], 10)


def test_recall_asks_after_the_context_was_read():
    data = Recall(context=40, facts=6, questions=4, batch_size=3, max_val_blocks=3)
    data.setup("fit")
    (window,) = tasks.stack(list(tasks.response_windows(next(iter(data.val_dataloader())), 1)))
    assert window.prompt.shape == (3, 40) and window.suffix.shape == (3, 8)
    assert ((window.labels != -100).sum(1) == 4).all()
    logits = torch.zeros(3, 8, len(data.tokenizer))
    logits.scatter_(2, window.suffix[..., None], 1.0)
    logits[0, 1] = 0
    right, asked = tasks.answered(logits, window.labels)
    assert right.tolist() == [3, 4, 4] and asked.tolist() == [4, 4, 4]


def test_longbench_files_keep_their_contexts(tmp_path):
    tokenizer = train_bpe(iter([["the quick brown fox jumps over the lazy dog " * 20]]), 300)
    path = tmp_path / "qa.jsonl"
    sample = {"context": "the fox " * 50 + "the dog " * 50, "input": "quick?", "answers": ["brown"]}
    path.write_text(json.dumps(sample) + "\n" + json.dumps({**sample, "context": "short"}) + "\n")
    long, short = tasks.longbench_windows(path, tokenizer, 40)
    assert long.prompt.shape == (1, 40) and short.prompt.shape[1] < 40
    text = tokenizer.decode(long.prompt[0])
    assert "fox" in text and "dog" in text and text.endswith("quick?\n")  # the middle is lost, the question never
    assert tokenizer.decode(long.suffix[0]) == "brown"
    for wrong in ({"context": ""}, {"context": "  "}, {"answers": []}):
        path.write_text(json.dumps([sample, {**sample, **wrong}]))
        with pytest.raises(ValueError, match=f"sample 2: {next(iter(wrong))}"):
            list(tasks.longbench_windows(path, tokenizer, 40))
    with pytest.raises(ValueError, match="neither JSON"):
        path.write_text("{")
        list(tasks.longbench_windows(path, tokenizer, 40))


def test_the_bootstrap_interval_covers_the_mean_as_often_as_it_says():
    draw = np.random.default_rng(0)
    found = [interval(draw.normal(1.0, 2.0, size=60), seed, 200)[1:] for seed in range(200)]
    covered = sum(low <= 1.0 <= high for low, high in found) / 200
    assert 0.89 <= covered <= 0.99


def test_a_row_compares_sample_by_sample():
    whole = Arm(nll=[1.0, 9.0], accuracy=[1.0, 0.0], kept=[1.0, 1.0], milliseconds=[2.0, 4.0])
    arm = Arm(nll=[1.5, 9.5], accuracy=[0.0, 0.0], kept=[0.5, 0.25], milliseconds=[1.0, 1.0])
    row = summarise("suffix", "random", 0.5, arm, whole)
    assert row["nll_rise"] == row["nll_rise_low"] == row["nll_rise_high"] == 0.5
    assert row["accuracy"] == 0 and row["kept_by_sample"] == [0.5, 0.25] and row["prefill_ms_unpruned"] == 3.0


def test_the_command_measures_every_scorer_on_every_task(tmp_path):
    build("llama", vocab_size=512).save_pretrained(tmp_path)
    data = Recall(context=40, facts=6, questions=4, batch_size=4, max_val_blocks=8)
    data.setup("fit")
    bench = TokenQuality(str(tmp_path), SCHEDULE, [Random(), Recency()], [0.5], ["response", "suffix"], 6, 8)
    rows = bench.verify(data, torch.device("cpu"))["token_quality"]
    assert [(r["task"], r["scorer"]) for r in rows[:3]] == [
        ("response", "unpruned"),
        ("response", "random"),
        ("response", "recency"),
    ]
    assert len(rows) == 6 and all(r["samples"] == 6 for r in rows)
    saved = [r["saved_over"] for r in rows[1:3]]
    assert [list(s) for s in saved] == [["recency"], ["random"]]
    assert saved[0]["recency"][0] == pytest.approx(rows[2]["nll_rise"] - rows[1]["nll_rise"], abs=1e-6)
    assert saved[0]["recency"][0] == -saved[1]["random"][0]
    assert all(r["kept"] < 1 for r in rows if r["scorer"] != "unpruned")


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"windows": 0}, "windows"),
        ({"keep": [0.0]}, "keep"),
        ({"tasks": ["longbench"]}, "longbench"),
        ({"scorers": []}, "scorers"),
        ({"scorers": [Random(), Random(seed=1)]}, "one of each name"),
    ],
)
def test_what_is_wrong_is_named(options, names):
    with pytest.raises(ValueError, match=names):
        TokenQuality("b", SCHEDULE, **{"scorers": [Random()], **options})


def test_an_empty_data_set_is_refused(tmp_path):
    build("llama").save_pretrained(tmp_path)
    nothing = SimpleNamespace(name="nothing", tokenizer=None, val_dataloader=lambda: [])
    with pytest.raises(ValueError, match="no sample in nothing"):
        TokenQuality(str(tmp_path), SCHEDULE, [Random()]).verify(nothing, torch.device("cpu"))
