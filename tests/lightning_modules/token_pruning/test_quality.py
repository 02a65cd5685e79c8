"""The quality bench: its tasks, its intervals, and that its arms differ only in what was dropped."""

import copy
import json
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lightning_modules.data.recall import Recall
from lightning_modules.data.tokenizer import train_bpe
from lightning_modules.token_pruning.evaluation import pruned_nll
from lightning_modules.token_pruning.flops import Cost
from lightning_modules.token_pruning.identity import identity_of
from lightning_modules.token_pruning.networks.mlp import MLP
from lightning_modules.token_pruning.peers.fast_kv import FastKV
from lightning_modules.token_pruning.peers.gem_filter import GemFilter
from lightning_modules.token_pruning.peers.snap_kv import SnapKV
from lightning_modules.token_pruning.prefill import PromptPruner
from lightning_modules.token_pruning.pruner import TokenPruner
from lightning_modules.token_pruning.pruning_file import content
from lightning_modules.token_pruning.quality import asking, longbench, tasks
from lightning_modules.token_pruning.quality.answers import Answer, is_right
from lightning_modules.token_pruning.quality.arms import CHANGES, GUESSES, UNPRUNED, in_words, of_peers, of_schedules
from lightning_modules.token_pruning.quality.asked import Asked
from lightning_modules.token_pruning.quality.measure import Arm, interval, proportion, read, summarise
from lightning_modules.token_pruning.quality.module import TokenQuality
from lightning_modules.token_pruning.quality.planted import plant
from lightning_modules.token_pruning.samples import split_batch
from lightning_modules.token_pruning.schedule import Schedule
from lightning_modules.token_pruning.scorers.blocks import Blocks
from lightning_modules.token_pruning.scorers.duplication import Duplication
from lightning_modules.token_pruning.scorers.hidden_norm import HiddenNorm
from lightning_modules.token_pruning.scorers.key_norm import KeyNorm
from lightning_modules.token_pruning.scorers.last_window import LastWindow
from lightning_modules.token_pruning.scorers.learned import Learned
from lightning_modules.token_pruning.scorers.oracle import Oracle
from lightning_modules.token_pruning.scorers.random import Random
from lightning_modules.token_pruning.scorers.recency import Recency
from lightning_modules.token_pruning.scorers.saliency import SaliencyOracle
from lightning_modules.token_pruning.scorers.stride import UniformStride
from lightning_modules.token_pruning.targets.future_attention import FutureAttention
from tests.lightning_modules.token_pruning.models import build, shared, tokens

CPU = torch.device("cpu")
SCHEDULE = Schedule(layers=[1, 3], keep=0.6, sinks=2, tail=0.0, min_tail=3)


@pytest.mark.parametrize("sharp", [1.0, 5.0])
@pytest.mark.parametrize(
    "scorer",
    [HiddenNorm(), Recency(), UniformStride(), Duplication(4), KeyNorm(), LastWindow(4), Blocks(LastWindow(4), 3)],
    ids=repr,
)
def test_pruning_by_mask_equals_the_pruned_prefill(scorer, sharp):
    """What training and validation compute is what inference does: same survivors, same loss."""
    model, ids = build("llama"), tokens(2, 40)
    for layer in model.model.layers:
        for project in (layer.self_attn.q_proj, layer.self_attn.k_proj):
            project.weight.data *= sharp
    arm, whole = Arm(), Arm()
    window = tasks.suffix_windows(ids, 6)
    read(model, window, PromptPruner(scorer, SCHEDULE), arm)
    read(model, window, None, whole)
    with torch.no_grad():
        nll, count, pruning = pruned_nll(model, split_batch({"input_ids": ids, "labels": ids}, 6), SCHEDULE, scorer)
    torch.testing.assert_close(torch.tensor(arm.nll), nll / count, rtol=1e-4, atol=1e-4)
    assert arm.kept == [pytest.approx(int(pruning.alive[3][0, :34].sum()) / 34)] * 2
    assert whole.kept == [1.0, 1.0] and abs(arm.nll[0] - whole.nll[0]) > 5e-4


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
    long, short = longbench.windows(path, tokenizer, 40)
    assert long.prompt.shape == (1, 40) and short.prompt.shape[1] < 40
    text = tokenizer.decode(long.prompt[0])
    assert "fox" in text and "dog" in text and text.endswith("quick?\n")  # the middle is lost, the question never
    assert tokenizer.decode(long.suffix[0]) == "brown"
    wrongs = [{"context": wrong} for wrong in ("", "  ", ["a"], 5, None)] + [{"input": wrong} for wrong in (" ", 5)]
    for wrong in (*wrongs, *({"answers": wrong} for wrong in ([], [""], ["a", " "], [None], None))):
        path.write_text(json.dumps([sample, {**sample, **wrong}]))
        with pytest.raises(ValueError, match=f"sample 2: {next(iter(wrong))}"):
            list(longbench.windows(path, tokenizer, 40))
    with pytest.raises(ValueError, match="neither JSON"):
        path.write_text("{")
        list(longbench.windows(path, tokenizer, 40))


def test_questions_of_longbench_files_are_asked_freely_and_any_answer_is_right(tmp_path):
    words = "the quick brown fox jumps over the lazy dog of Fenwick near York. "
    tokenizer = train_bpe(iter([[words * 20, "Question: Answer: Who is it?"]]), 400)
    path = tmp_path / "qa.jsonl"
    sample = {"context": words * 30, "input": "Who is it?", "answers": ["Fenwick", "York"]}
    records = [sample, {**sample, "input": ""}, {**sample, "context": words, "answers": ["nobody"]}]
    path.write_text("".join(json.dumps(one) + "\n" for one in records))
    long, short = longbench.asked(path, tokenizer, 120, 9)  # a summary asks nothing
    assert 100 < len(long.ids) <= 120 and len(short.ids) < 100
    assert tokenizer.decode(long.ids).endswith("Who is it?\nAnswer:")
    assert "Fenwick" in tokenizer.decode(long.ids[long.evidence]) and not short.evidence.any()
    assert is_right(long, "It is York, I think") and is_right(long, "fenwick") and not is_right(long, "the fox")
    assert len(longbench.asked(path, tokenizer, 120, 1)) == 1
    assert long.depth == int(long.evidence.int().argmax()) / len(long.ids) and short.depth is None
    told = "It was nobody we know of. Is it old? He says no way."
    path.write_text(json.dumps({"context": told, "input": "Who is it?\n", "answers": ["no"]}))
    tokenizer.chat_template = "{% for m in messages %}<|{{ m.role }}|>{{ m.content | trim }}{% endfor %}"
    (asked,) = longbench.asked(path, tokenizer, 400, 1)  # a template may trim what is asked
    assert tokenizer.decode(asked.ids[: asked.evidence.nonzero()[-1, 0] + 1]).endswith("He says no")
    tokenizer.chat_template = "{{ messages[0].content | upper }}"
    with pytest.raises(ValueError, match=r"qa\.jsonl, sample 1: the tokenizer's chat template changes what is said"):
        longbench.asked(path, tokenizer, 400, 1)
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="sample 1: its question alone is longer than max_prompt"):
        longbench.asked(path, tokenizer, 4, 1)
    path.write_text(json.dumps({**sample, "input": ""}))
    with pytest.raises(ValueError, match="no sample has a question"):
        longbench.asked(path, tokenizer, 120, 9)


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
    bench = TokenQuality(str(tmp_path), scorers=[Random()], tasks=["response"], schedules=[Schedule([1], tokens=9)])
    (_, row) = bench.verify(data, torch.device("cpu"))["token_quality"]
    assert (row["keep"], row["tokens"]) == (None, 9)


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"windows": 0}, "windows"),
        ({"keep": [0.0]}, "keep"),
        ({"tasks": ["longbench"]}, "longbench"),
        ({"scorers": []}, "scorers"),
        ({"scorers": [Random(), Random(seed=1)]}, "one of each name"),
        ({"schedules": [Schedule(), Schedule()]}, "two are one"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"lengths": []}, "lengths"),
    ],
)
def test_what_is_wrong_is_named(options, names):
    with pytest.raises(ValueError, match=names):
        TokenQuality("b", SCHEDULE, **{"scorers": [Random()], **options})


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    build("llama", vocab_size=400, max_position_embeddings=1024).save_pretrained(tmp_path / "model")
    data = Texts(name="told", texts=TOLD, tokenizer=train_bpe(iter([TOLD]), 400))
    few = {"tasks": ["needles"], "windows": 1, "lengths": [500], "max_new_tokens": 2}
    TokenQuality(str(tmp_path / "model"), SCHEDULE, [Random()], [0.5], answers="~/a.jsonl", **few).verify(data, CPU)
    assert (tmp_path / "a.jsonl").is_file()


def test_an_empty_data_set_is_refused(tmp_path):
    build("llama").save_pretrained(tmp_path)
    nothing = SimpleNamespace(name="nothing", tokenizer=None, val_dataloader=lambda: [])
    with pytest.raises(ValueError, match="no sample in nothing"):
        TokenQuality(str(tmp_path), SCHEDULE, [Random()]).verify(nothing, torch.device("cpu"))


class Scripted:
    """Answers by rule in a model's place, and counts how often it was asked."""

    def __init__(self, right):
        self.right, self.asked = right, []

    def __call__(self, model, tokenizer, asked, pruner, max_new_tokens):
        self.asked.append(asked)
        name = "unpruned" if pruner is None else pruner.scorer.name
        return Answer(asked.answer if self.right(name, asked) else "no idea", 1.0 if pruner is None else 0.5)


def prompts(count=8):
    """Prompts of 40 and 60 tokens; answers by number, depths from 0 to 0.9."""
    made = []
    for n in range(count):
        ids = tokens(40 + 20 * (n % 2), seed=n)
        made.append(Asked(ids, torch.zeros(len(ids), dtype=torch.bool), f"w{n}", "code", 0.9 * n / (count - 1)))
    return made


def compared(monkeypatch, path, right, arms, asked=None, model=None, known_only=False):
    script = Scripted(right)
    monkeypatch.setattr(asking, "answer_in_full", script)
    model = model or shared("llama")
    answers = asking.Answers(path, model, 24)
    rows = asking.compare("needles", model, None, asked or prompts(), [40, 60], arms, answers, known_only)
    return rows, script


ARMS = [UNPRUNED, *of_schedules([SCHEDULE], [Random(), Recency()])]


def test_kept_answers_are_those_that_the_unpruned_model_had_right(monkeypatch, tmp_path):
    known = {"unpruned": range(6), "random": range(3, 8), "recency": ()}
    rows, _ = compared(monkeypatch, tmp_path / "a", lambda name, asked: int(asked.answer[1:]) in known[name], ARMS)
    whole, random, recency = rows
    assert [row["right"] for row in rows] == [6 / 8, 5 / 8, 0]
    assert [row["kept_right"] for row in rows] == [1.0, 3 / 6, 0] and {row["whole_right"] for row in rows} == {6}
    assert (random["right_low"], random["right_high"]) == proportion(5, 8)[1:] and random["right_low"] > 0
    assert random["kept_right_low"] < 0.5 < random["kept_right_high"] and whole["kept_right_low"] == proportion(6, 6)[1]
    assert whole["bound"] == 1 and whole["kv_share"] == 1 and random["kv_share"] == 0.5
    cost = Cost.of(shared("llama"))
    assert random["bound"] == pytest.approx((cost.bound(40, SCHEDULE) + cost.bound(60, SCHEDULE)) / 2)
    cells = {(cell["tokens"], cell["depth"]): cell for cell in random["map"]}
    assert sum(cell["samples"] for cell in cells.values()) == 8 and sum(c["kept_right"] for c in cells.values()) == 3
    assert {length for length, _ in cells} == {40, 60} and {depth for _, depth in cells} == {0.0, 0.25, 0.5, 0.75}
    assert cells[60, 0.75] == {
        "tokens": 60, "depth": 0.75, "samples": 1, "right": 1, "whole_right": 0, "kept_right": 0
    }  # fmt: skip
    shares, places, schedules = asking.tables(rows)
    assert shares.rows[1][-2:] == ["62 % [31, 86]", "50 % [19, 81]"] and "8 prompts, 6 answered" in shares.title
    assert places.headers[2:] == ["≤ 40", "≤ 60", "from 0%", "from 25%", "from 50%", "from 75%"]
    assert places.rows[1][2:] == ["2/4", "3/4", "0/2", "1/2", "2/2", "2/2"]
    assert schedules.rows == [[1, in_words(SCHEDULE)]] and [row[1] for row in shares.rows] == ["", 1, 1]
    assert recency["schedule"] == "layers=[1, 3], keep=0.6, sinks=2, tail=0.0, min_tail=3" and recency["keep"] == 0.6


def test_what_is_guessed_and_what_any_change_costs_stand_beside_what_is_kept(monkeypatch, tmp_path):
    asked = []
    for n, one in enumerate(prompts()):
        told, beside = (torch.zeros(len(one.ids), dtype=torch.bool) for _ in range(2))
        told[n : n + 5], beside[20 + n : 23 + n] = True, True
        asked.append(replace(one, told=told, beside=beside if n else None))

    def right(name, one):
        n, short = int(one.answer[1:]), 60 - 20 * (int(one.answer[1:]) % 2 == 0) - len(one.ids)
        known = {0: range(6), 5: range(2), 3: range(1, 6)}[short] if name == "unpruned" else range(1, 4)
        return n in known

    arms = [UNPRUNED, GUESSES, CHANGES, ARMS[1]]
    rows, _ = compared(monkeypatch, tmp_path / "a", right, arms, asked)
    assert [row["scorer"] for row in rows] == ["unpruned", "answer_left_out", "sentence_left_out", "random"]
    assert [row["left_out"] for row in rows] == [None, "told", "beside", None]
    whole, guesses, changes, random = rows
    assert guesses["kept_right"] == 2 / 6 and changes["kept_right"] == 5 / 5 and changes["samples"] == 7
    # those of w0 and w1 are guessed, and of the other four random keeps two
    assert random["kept_right"] == 3 / 6 and (random["read_right"], random["kept_read"]) == (4, 2 / 4)
    assert whole["kept_read"] is None and (random["kept_read_low"], random["kept_read_high"]) == proportion(2, 4)[1:]
    assert asking.tables(rows)[0].headers[-1] == "of those not guessed"
    assert asking.tables(rows)[0].rows[0][-1] == "" and asking.tables(rows)[0].rows[3][-1].startswith("50 %")
    without, _ = compared(monkeypatch, tmp_path / "b", right, ARMS[:2], asked)
    assert asking.tables(without)[0].headers[-1] == "of the unpruned's"


class Looking(Oracle):
    """Remembers what it is shown."""

    def __init__(self):
        self.shown = []

    def measure(self, model, samples, layers):
        self.shown.append(samples)
        return {layer: torch.zeros(samples.prompt.shape) for layer in layers}


def test_oracles_are_shown_what_the_unpruned_model_answers(tmp_path):
    tokenizer, model, oracle = train_bpe(iter([TOLD]), 400), shared("llama", vocab_size=400), Looking()
    answers = asking.Answers(tmp_path / "a", model, 4)
    arms = [UNPRUNED, *of_schedules([SCHEDULE], [oracle])]
    (asked,) = plant(TOLD, tokenizer, [500], 1)
    for _ in range(2):  # what is known needs no look
        asking.compare("needles", model, tokenizer, [asked], [500], arms, answers)
    whole = answers.of(model, tokenizer, asked, UNPRUNED).text
    (shown,) = oracle.shown
    assert shown.input_ids[0, : len(asked.ids)].equal(asked.ids) and shown.prompt.sum() == len(asked.ids)
    assert whole and tokenizer.decode(shown.labels[0, len(asked.ids) :]) == whole


def test_answers_that_stand_nowhere_count_by_length_and_at_no_depth(monkeypatch, tmp_path):
    asked = [replace(one, depth=None if n < 3 else one.depth) for n, one in enumerate(prompts())]
    rows, _ = compared(monkeypatch, tmp_path / "a", lambda *_: True, ARMS, asked)
    assert [(cell["tokens"], cell["depth"], cell["samples"]) for cell in rows[0]["map"]] == [
        (40, 0.5, 1), (40, 0.75, 1), (40, None, 2), (60, 0.25, 1), (60, 0.5, 1), (60, 0.75, 1), (60, None, 1)
    ]  # fmt: skip
    places = asking.tables(rows)[1]
    assert places.headers[2:] == ["≤ 40", "≤ 60", "from 25%", "from 50%", "from 75%"]
    assert places.rows[1][2:] == ["4/4", "4/4", "1/1", "2/2", "2/2"]


def test_a_model_that_knows_nothing_keeps_nothing(monkeypatch, tmp_path):
    rows, _ = compared(monkeypatch, tmp_path / "a", lambda name, asked: False, ARMS)
    assert all(row["kept_right"] is None and row["whole_right"] == 0 for row in rows)


def test_what_the_unpruned_model_does_not_know_may_be_asked_of_it_alone(monkeypatch, tmp_path):
    def right(name, asked):
        return int(asked.answer[1:]) in {"unpruned": range(6), "random": range(3, 8), "recency": ()}[name]

    rows, script = compared(monkeypatch, tmp_path / "a", right, ARMS, known_only=True)
    assert len(script.asked) == 8 + 2 * 6 and [row["samples"] for row in rows] == [8, 6, 6]
    assert [row["kept_right"] for row in rows] == [1.0, 3 / 6, 0]
    assert [row["right"] for row in rows] == [6 / 8, 3 / 6, 0]
    shares = asking.tables(rows)[0]
    assert shares.rows[0][-2].startswith("75 %") and shares.rows[1][-2:] == ["asked of these alone", "50 % [19, 81]"]
    rows, script = compared(monkeypatch, tmp_path / "b", lambda *_: False, ARMS, known_only=True)
    assert [row["scorer"] for row in rows] == ["unpruned"] and len(script.asked) == 8 and asking.tables(rows)


def test_a_run_that_was_killed_asks_only_what_is_not_answered(monkeypatch, tmp_path):
    def right(name, asked):
        return int(asked.answer[1:]) % 2 == 0

    path = tmp_path / "answers.jsonl"
    rows, script = compared(monkeypatch, path, right, ARMS)
    assert len(script.asked) == 24
    again, script = compared(monkeypatch, path, lambda name, asked: False, ARMS)
    assert again == rows and not script.asked
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:10]) + lines[10][:-20])  # killed while it wrote
    again, script = compared(monkeypatch, path, right, ARMS)
    assert again == rows and len(script.asked) == 14
    # what is new: a prompt, an arm, other arguments of a scorer, another schedule, another model
    assert len(compared(monkeypatch, path, right, ARMS, prompts() + prompts(9)[8:])[1].asked) == 3
    for arms in ([HiddenNorm()], [Random(seed=5)]):
        assert len(compared(monkeypatch, path, right, ARMS + of_schedules([SCHEDULE], arms))[1].asked) == 8
    assert len(compared(monkeypatch, path, right, of_schedules([SCHEDULE.keeping(0.5)], [Random()]))[1].asked) == 8
    other = build("llama", layers=5)
    assert len(compared(monkeypatch, path, right, ARMS, model=other)[1].asked) == 24


def test_a_scorer_that_was_trained_again_is_asked_again(monkeypatch, tmp_path):
    pruner = TokenPruner(64, [1, 3], MLP(8))
    arms = of_schedules([SCHEDULE], [Learned(pruner)])
    for asked in (8, 0):
        assert len(compared(monkeypatch, tmp_path / "a", lambda *_: True, arms)[1].asked) == asked
    with torch.no_grad():
        next(pruner.parameters()).add_(1.0)
    arms = of_schedules([SCHEDULE], [Learned(pruner)])
    assert len(compared(monkeypatch, tmp_path / "a", lambda *_: True, arms)[1].asked) == 8


def test_a_trained_scorer_s_weights_are_read_once_and_as_they_were_loaded(monkeypatch):
    model, read = shared("llama"), []
    pruner = TokenPruner.for_model(model, [1, 3], MLP(8))
    digest = Learned.digest
    monkeypatch.setattr(Learned, "digest", lambda self: read.append(self) or digest(self))
    for scorer in (Learned(pruner), Blocks(Blocks(Learned(pruner), 4), 2)):
        (before,) = of_schedules([SCHEDULE], [scorer])
        first = before.identity
        scorer.prepare(build("llama").bfloat16(), [1, 3])  # it has a rounded copy now
        assert before.identity == first == of_schedules([SCHEDULE], [scorer])[0].identity
    assert len(read) == 4  # once for each arm
    other = TokenPruner.for_model(model, [1, 3], MLP(8))
    assert of_schedules([SCHEDULE], [Blocks(Blocks(Learned(other), 4), 2)])[0].identity != first


def test_what_a_scorer_s_class_says_is_part_of_an_arm(monkeypatch):
    def ways(*schedules):
        return [json.dumps(arm.identity) for arm in of_schedules(schedules, [Recency()])]

    named = copy.copy(SCHEDULE)
    named.pool = 5
    own, given = ways(SCHEDULE, named)
    monkeypatch.setattr(Recency, "pool", 5)
    assert ways(SCHEDULE, named) == [given, given] != [own, given]  # the schedule's comes first
    monkeypatch.setattr(Recency, "asking", 3)
    assert given not in ways(SCHEDULE, named)
    before = ways(SCHEDULE)
    monkeypatch.setattr("lightning_modules.token_pruning.quality.arms.FORMAT", 0)
    assert ways(SCHEDULE) != before


class Texts(SimpleNamespace):
    """A DataModule's plain texts."""

    def documents(self):
        return iter([("train", "Nothing."), *(("val", text) for text in self.texts)])


NAMES = "Anna", "Berta", "Carla", "Dora"
TOLD = [" ".join(f"“It has rained for {n} long days,” said {NAMES[n % 4]}." for n in range(400))]


def test_peers_are_asked_beside_scorers_and_sit_out_what_reads_batches(tmp_path):
    build("llama", vocab_size=400, max_position_embeddings=1024).save_pretrained(tmp_path / "model")
    data = Texts(name="told", texts=TOLD, tokenizer=train_bpe(iter([TOLD]), 400))
    peers = [SnapKV(0.3), GemFilter(1, 0.3), FastKV(2, 0.5)]
    bench = TokenQuality(
        str(tmp_path / "model"), scorers=[Recency()], schedules=[SCHEDULE], windows=1, tasks=["needles", "suffix"],
        lengths=[500], max_new_tokens=2, answers=str(tmp_path / "answers.jsonl"), peers=peers,
    )  # fmt: skip
    data.val_dataloader, data.block_size = lambda: [{"input_ids": tokens(2, 200)}], 200
    bench.check_arguments("verify", data)
    rows = bench.verify(data, torch.device("cpu"))["token_quality"]
    names = ["unpruned", "recency", "snap_kv", "gem_filter(last_window)", "fast_kv(snap_kv, last_window)"]
    assert [(row["task"], row["scorer"]) for row in rows] == [
        *(("needles", name) for name in names), *(("suffix", name) for name in names[:2])
    ]  # fmt: skip
    lines = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    cost, (length,) = Cost.of(shared("llama", vocab_size=400)), {line["tokens"] for line in lines}
    for row, peer in zip(rows[2:5], peers, strict=True):
        assert row["keep"] == peer.keep and row["kv_share"] == pytest.approx(peer.kv_share(length, 6))
        assert row["bound"] == pytest.approx(peer.bound(cost, length))
    assert [row["schedule"] for row in rows[2:5]] == [in_words(peer) for peer in peers]
    assert rows[2]["schedule"] == "keep=0.3" and rows[3]["schedule"].startswith("layer=1, keep=0.3, scorer=Last")
    ways = [arm.identity for arm in of_peers([*peers, FastKV(2, 0.5, SnapKV(0.3)), SnapKV(0.3, window=8)])]
    assert len({json.dumps(way) for way in ways}) == 5
    with pytest.raises(ValueError, match="layers: \\[6\\] are not all within"):
        TokenQuality(str(tmp_path / "model"), tasks=["needles"], peers=[FastKV(6)]).check_arguments("verify", data)
    with pytest.raises(ValueError, match="peers read one prompt at a time: give tasks one of needles, questions"):
        TokenQuality("b", scorers=[Recency()], peers=peers)


def test_the_command_asks_needles_and_questions(tmp_path, capsys):
    build("llama", vocab_size=400, max_position_embeddings=1024).save_pretrained(tmp_path / "model")
    data = Texts(name="told", texts=TOLD, tokenizer=train_bpe(iter([TOLD]), 400))
    more = {"schedules": [SCHEDULE, Schedule(layers=[1], keep=0.2)], "lengths": [500], "max_new_tokens": 2}
    bench = TokenQuality(
        str(tmp_path / "model"), scorers=[Random(), SaliencyOracle(FutureAttention())], windows=2,
        tasks=["needles", "questions"], answers=str(tmp_path / "answers.jsonl"), **more,
    )  # fmt: skip
    bench.check_arguments("verify", data)
    rows = bench.verify(data, torch.device("cpu"))["token_quality"]
    json.dumps(rows)
    assert [(r["task"], r["scorer"]) for r in rows] == [
        (task, scorer)
        for task in ("needles", "questions")
        for scorer in ("unpruned", *("random", "oracle_future_attention") * 2)
    ]
    assert [row["oracle"] for row in rows] == [False, *(False, True) * 2] * 2
    for whole, gentle, _, hard, _ in (rows[:5], rows[5:]):
        assert whole["bound"] == whole["kv_share"] == 1.0 < gentle["bound"] < hard["bound"]
        assert hard["kv_share"] < gentle["kv_share"] < 0.9 and {row["samples"] for row in (whole, gentle, hard)} == {2}
    assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == 20
    shown = capsys.readouterr().out
    for task in ("needles", "questions"):
        assert f"{task}: 2 prompts" in shown and f"{task}: right answers by tokens" in shown
    assert "layers=[1], keep=0.2" in shown and "…" not in shown


def test_what_calibrate_wrote_is_compared_by_its_folder_s_name(tmp_path):
    model = shared("llama")
    (tmp_path / "found").mkdir()
    written = content(SCHEDULE.keeping([0.8, 0.3]), Recency(), identity_of(model), {})
    (tmp_path / "found/pruning.json").write_text(written)
    bench = TokenQuality("base", schedules=[SCHEDULE], scorers=[Random()], pruners=[str(tmp_path / "found")])
    assert [(arm.scorer, arm.keep) for arm in bench.arms] == [
        ("unpruned", None),
        ("random", 0.6),
        ("found", [0.8, 0.3]),
    ]
    assert bench.arms[2].pruner.scorer.name == "recency"
    bench.arms[2].pruner.check(model.config)
    (counted,) = of_schedules([Schedule(layers=[1], tokens=9)], [Random()])
    assert (counted.keep, counted.tokens, counted.schedule) == (None, 9, "layers=[1], tokens=9")
    with pytest.raises(ValueError, match="another model"):
        bench.arms[2].pruner.check(build("llama", layers=5).config)


@pytest.mark.parametrize(
    ("options", "names"),
    [({"lengths": [600, 1020]}, "lengths: 1020 tokens"), ({"data": SimpleNamespace()}, "no plain texts")],
)
def test_what_cannot_be_asked_is_refused_before_any_weight_is_read(tmp_path, options, names):
    build("llama", max_position_embeddings=1024).config.save_pretrained(tmp_path)
    data = options.pop("data", Texts(texts=[]))
    bench = TokenQuality(str(tmp_path), SCHEDULE, [Random()], tasks=["needles"], **{"lengths": [600], **options})
    with pytest.raises(ValueError, match=names):
        bench.check_arguments("verify", data)


@pytest.mark.parametrize("task", ["suffix", "repeated", "response", "longbench", "longbench_answers"])
def test_no_task_reads_more_than_the_model_has_positions_for(tmp_path, task):
    build("gpt2").config.save_pretrained(tmp_path)
    (tmp_path / "qa.jsonl").touch()
    field = "max_prompt" if "longbench" in task else "data.block_size"
    for most, fits in ((480, True), (513, False)):
        bench = TokenQuality(
            str(tmp_path), SCHEDULE, [Random()], tasks=[task], longbench=str(tmp_path / "qa.jsonl"), max_prompt=most
        )
        with nullcontext() if fits else pytest.raises(ValueError, match=rf"^{field}: 513 tokens .*than the 512 that"):
            bench.check_arguments("verify", SimpleNamespace(block_size=most))


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    # Newcombe (Statistics in Medicine 17, 1998), Table I, method 3
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (29, 29, 0.8830, 1.0),
    ],
)
def test_intervals_of_shares_are_those_published(successes, trials, low, high):
    assert proportion(successes, trials) == pytest.approx((successes / trials, low, high), abs=5e-5)


def test_rows_that_end_in_padding_have_no_end_to_read():
    ids, mask = torch.ones(2, 6, dtype=torch.long), torch.tensor([[1] * 6, [1] * 4 + [0] * 2])
    assert tasks.plain_ids({"input_ids": ids, "attention_mask": mask[:1]}, "x") is ids
    for batch in ({"attention_mask": mask}, {"position_ids": mask}):
        with pytest.raises(ValueError, match=r"data: the task suffix reads rows to their end, .* or the task response"):
            tasks.plain_ids({"input_ids": ids, **batch}, "the task suffix")
