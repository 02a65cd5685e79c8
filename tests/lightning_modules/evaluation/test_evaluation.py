"""Tasks asked of models: right answers, what was answered before, and what is refused before any weight is read."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from common.records import record
from lightning_modules.data.tokenizer import train_bpe
from lightning_modules.evaluation import TaskEvaluation
from lightning_modules.evaluation.local.cloze import Cloze
from lightning_modules.evaluation.local.gsm8k_answer import Gsm8kAnswer
from lightning_modules.evaluation.local.next_sentence import NextSentence
from lightning_modules.evaluation.module import table
from lightning_modules.structured_pruning.saving import save
from lightning_modules.structured_pruning.slicing import slice_model
from tests.lightning_modules.evaluation.prose import gsm8k, prose
from tests.lightning_modules.structured_pruning.toy import plan_for, tiny

needs_harness = pytest.mark.skipif(
    __import__("importlib.util").util.find_spec("lm_eval") is None, reason="needs lm-eval: pip install -e '.[eval]'"
)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A dense model, it pruned (layers of several widths), and files to make tasks of."""
    root = tmp_path_factory.mktemp("tasks")
    (root / "text.txt").write_text(prose(300))
    (root / "problems.jsonl").write_text(gsm8k(30))
    tokenizer = train_bpe([prose(300)], 400)
    dense = tiny(vocab_size=400, max_position_embeddings=512, eos_token_id=0)
    plan = plan_for(dense)
    save(root / "dense", dense, tokenizer, "# dense")
    save(root / "pruned", slice_model(dense, plan), tokenizer, "# pruned", plan)
    return root


def evaluation(place, folder, models=("dense", "pruned"), **arguments):
    defaults = {"local": [Cloze(str(place / "text.txt"), 6)], "folder": str(folder), "batch_size": 4}
    return TaskEvaluation({name: str(place / name) for name in models}, **{**defaults, **arguments})


def likelihoods(model, tokenizer, context, continuation):
    """Of a continuation after a context, one pair at a time."""
    whole = tokenizer(f"{context} {continuation}").input_ids
    start = len(tokenizer(context).input_ids)
    with torch.no_grad():
        scores = F.log_softmax(model(torch.tensor([whole])).logits[0].float(), -1)
    told = [scores[i - 1, whole[i]].item() for i in range(start, len(whole))]
    greedy = all(scores[i - 1].argmax() == whole[i] for i in range(start, len(whole)))
    return sum(told), greedy


@needs_harness
def test_answers_are_those_that_each_model_finds_likeliest(place, tmp_path):
    from lightning_modules.loading import load, load_tokenizer

    local = [NextSentence(str(place / "text.txt"), 8), Gsm8kAnswer(str(place / "problems.jsonl"), 8)]
    words = Cloze(str(place / "text.txt"), 8)
    rows = evaluation(place, tmp_path / "out", local=[*local, words]).evaluate(CPU)["evaluation"]
    for name in ("dense", "pruned"):
        model, tokenizer = load(place / name), load_tokenizer(place / name)
        for task in local:
            items = task.drawn()
            found = [
                max(range(4), key=lambda i, it=it: likelihoods(model, tokenizer, it["context"], it["choices"][i])[0])
                for it in items
            ]
            right = sum(choice == item["label"] for choice, item in zip(found, items, strict=True)) / len(items)
            row = next(r for r in rows if (r["model"], r["task"], r["metric"]) == (name, task.task, "acc"))
            assert row["value"] == pytest.approx(right) and row["items"] == 8 and row["chance"] == 0.25
        told = [likelihoods(model, tokenizer, item["context"], item["word"]) for item in words.drawn()]
        ppl, acc = (
            next(r["value"] for r in rows if (r["model"], r["task"], r["metric"]) == (name, words.task, metric))
            for metric in ("perplexity", "acc")
        )
        assert ppl == pytest.approx(math.exp(-sum(one for one, _ in told) / 8), rel=1e-4)
        assert acc == sum(greedy for _, greedy in told) / 8


@needs_harness
def test_what_was_answered_is_not_asked_again_and_another_model_is(place, tmp_path, monkeypatch):
    from lightning_modules.evaluation import harness

    asked = []
    real = harness.ask
    monkeypatch.setattr(harness, "ask", lambda *a, **k: asked.append(a[3]) or real(*a, **k))
    first = evaluation(place, tmp_path, models=["dense"]).evaluate(CPU)["evaluation"]
    both = evaluation(place, tmp_path).evaluate(CPU)["evaluation"]
    assert asked == ["dense: cloze_text", "pruned: cloze_text"]
    assert [row for row in both if row["model"] == "dense"] == first
    evaluation(place, tmp_path, models=["dense"], limit=3).evaluate(CPU)
    evaluation(place, tmp_path, models=["dense"], local=[Cloze(str(place / "text.txt"), 5)]).evaluate(CPU)
    assert len(asked) == 4, "other settings, and other items, are another question"
    (tmp_path / "results.json").write_text("{")
    evaluation(place, tmp_path, models=["dense"]).evaluate(CPU)
    assert len(asked) == 5, "a damaged file counts as none"
    kept = tmp_path / "results.json"

    def meanwhile(*a, **k):
        kept.write_text(json.dumps(json.loads(kept.read_text()) | {"of another run": []}))
        return real(*a, **k)

    monkeypatch.setattr(harness, "ask", meanwhile)
    evaluation(place, tmp_path, models=["dense"], limit=2).evaluate(CPU)
    assert len(json.loads(kept.read_text())) == 3, "what another run answers meanwhile stays"


def _judge():
    def right(doc):
        return doc["a"] == 1

    return right


@needs_harness
def test_a_task_with_functions_is_the_same_in_every_process():
    from lightning_modules.evaluation import harness

    def loaded(judge):
        config = {"task": "t", "fewshot": {"doc_to_text": judge}}
        return {"tasks": {"t": SimpleNamespace(dump_config=lambda: config, eval_docs=[{"a": 1}])}}

    assert harness.digest(loaded(_judge())) == harness.digest(loaded(_judge()))
    assert harness.digest(loaded(_judge())) != harness.digest(loaded(loaded))


@needs_harness
def test_a_task_file_whose_items_or_settings_changed_is_asked_again(place, tmp_path, monkeypatch):
    from lightning_modules.evaluation import harness

    asked = []
    monkeypatch.setattr(harness, "ask", lambda *a, **k: asked.append(a[3]) or [])
    mine = tmp_path / "mine"
    file, _ = Cloze(str(place / "text.txt"), 6, label="mine").write(mine)

    def evaluate():
        evaluation(place, tmp_path / "out", ["dense"], local=[], tasks=["mine"], include=[str(mine)]).evaluate(CPU)

    evaluate()
    evaluate()
    assert len(asked) == 1
    items = file.with_name("items.jsonl")
    items.write_text("".join(items.read_text().splitlines(keepends=True)[1:]))
    evaluate()
    assert len(asked) == 2
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "target_delimiter": ""}))
    evaluate()
    assert len(asked) == 3


@needs_harness
def test_what_cannot_be_asked_is_refused_before_any_model_is_loaded(place, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("lightning_modules.evaluation.module.load", lambda *a, **k: pytest.fail("a model was loaded"))
    with pytest.raises(ValueError, match=r"no task or group 'lambada_opena'; like it: .*lambada_openai"):
        evaluation(place, tmp_path, tasks=["lambada_opena"]).check_arguments("evaluate", None)
    with pytest.raises(FileNotFoundError, match=r"tasks: no such task file: .*mine\.yaml"):
        evaluation(place, tmp_path, tasks=[str(tmp_path / "mine.yaml")]).check_arguments("evaluate", None)
    with pytest.raises(FileNotFoundError, match=r"include: no such folder"):
        evaluation(place, tmp_path, include=[str(tmp_path / "none")]).check_arguments("evaluate", None)
    with pytest.raises(FileNotFoundError, match=r"no model 'gone'"):
        TaskEvaluation({"a": "gone"}, ["lambada_openai"]).check_arguments("evaluate", None)
    with pytest.raises(FileNotFoundError, match=r"tasks: lambada_openai: its items are on the Hub, HF_HUB_OFFLINE is"):
        evaluation(place, tmp_path, tasks=["lambada_openai"]).evaluate(CPU)
    empty = tmp_path / "own"
    file, _ = Cloze(str(place / "text.txt"), 4).write(empty)
    (file.parent / "items.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"tasks: .*cloze_text\.yaml has no items to ask"):
        evaluation(place, tmp_path, tasks=[str(file)], local=[]).evaluate(CPU)


@needs_harness
def test_code_that_a_model_writes_is_run_only_when_that_is_allowed(place, tmp_path):
    file, _ = Cloze(str(place / "text.txt"), 4).write(tmp_path / "own")
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"unsafe_code": True}))
    with pytest.raises(ValueError, match="executes what the model writes: set run_code"):
        evaluation(place, tmp_path, tasks=[str(file)], local=[]).evaluate(CPU)
    assert evaluation(place, tmp_path, tasks=[str(file)], local=[], run_code=True).evaluate(CPU)["evaluation"]


def test_arguments_are_checked(place, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="models: give at least one"):
        TaskEvaluation({}, ["x"])
    with pytest.raises(ValueError, match="nothing to ask"):
        TaskEvaluation({"a": "b"})
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        TaskEvaluation({"a": "b"}, ["x"], batch_size=0)
    with pytest.raises(ValueError, match="cloze_t is there twice"):
        TaskEvaluation({"a": "b"}, local=[Cloze("t.txt"), Cloze("t.json")])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"evaluate needs the package lm-eval: pip install -e '\.\[eval\]'"):
        evaluation(place, tmp_path).check_arguments("evaluate", None)


def test_the_table_has_a_column_for_every_model():
    row = {"task": "t", "metric": "acc", "value": 0.5, "stderr": 0.05, "items": 100, "chance": 0.25}
    rows = [{**row, "model": "dense"}, {**row, "model": "pruned", "value": 0.4, "stderr": None}]
    shown = table(rows)
    assert list(shown.headers) == ["task", "metric", "items", "dense", "pruned", "chance"]
    assert shown.rows == [["t", "acc", 100, "0.500 ± 0.050", "0.400", 0.25]]


def test_results_are_a_record():
    fields = {"kind": "run", "run_name": "r", "world_size": 1, "model": "m", "evaluation": [{"task": "t"}]}
    record.validate(fields, training=False)
    with pytest.raises(ValueError, match="evaluation is dict"):
        record.validate(fields | {"evaluation": {}}, training=False)
