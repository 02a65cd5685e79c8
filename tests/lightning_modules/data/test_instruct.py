"""Instruction data: what is read, what is learnt from it, and that no sample sees another."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from lightning_modules.data.instruct import InstructData
from lightning_modules.data.instructions import Instruction, write_prompt
from lightning_modules.data.tokenizer import train_bpe
from tests.lightning_modules.data.test_base import Watcher, trainer

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")  # Lightning 2.6 with torch 2.13

DOLLY = {"instruction": "Name the river.", "context": "The Rhine is long.", "response": "The Rhine", "category": "qa"}
ALPACA = {"instruction": "Say hello.", "input": "", "output": "Hello!"}
GSM8K = {"question": "What is 2 + 3?", "answer": "2 + 3 = <<2+3=5>>5\n#### 5"}


def question(i, words=8):
    return {"instruction": f"Repeat number {i}.", "input": "word " * (i % words), "output": f"It is {i} " * (1 + i % 5)}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    prompts = [write_prompt(Instruction(*question(i).values()), "alpaca", None).text for i in range(50)]
    trained = train_bpe(prompts, 400)
    trained.chat_template = (
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|endoftext|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
    )
    trained.save_pretrained(str(folder))
    return str(folder)


@pytest.fixture
def make(tmp_path, tokenizer):
    def make(records, **arguments):
        file = tmp_path / "data.jsonl"
        lines = "".join(json.dumps(record) + "\n" for record in records)
        if not file.exists() or file.read_text() != lines:
            file.write_text(lines)
        defaults = {"tokenizer": tokenizer, "cache_dir": str(tmp_path / "cache")}
        data = InstructData(str(file), **defaults | arguments)
        data.prepare_data()
        data.setup("fit")
        return data

    return make


def rows(data, split="train"):
    """Decoded (prompt, response) of every sample, in the file's order."""
    samples = data.train if split == "train" else data.val
    cut = [(row["input_ids"][: row["prompt"]], row["input_ids"][row["prompt"] :]) for row in samples]
    return [tuple(data.tokenizer.decode(part) for part in parts) for parts in cut]


def test_prompts_and_responses(make, tmp_path, tokenizer):
    val = tmp_path / "val.json"
    val.write_text(json.dumps([question(1)]))
    data = make([DOLLY, ALPACA, GSM8K, {"title": "Rivers", "text": "Long ago."}], val=str(val))
    dolly, alpaca, gsm8k, text = rows(data)
    assert dolly == (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request.\n\n### Instruction:\nName the river.\n\n"
        "### Input:\nThe Rhine is long.\n\n### Response:\n",
        "The Rhine<|endoftext|>",
    )
    assert alpaca == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nSay hello.\n\n### Response:\n",
        "Hello!<|endoftext|>",
    )
    assert gsm8k[1] == GSM8K["answer"] + "<|endoftext|>" and GSM8K["question"] in gsm8k[0]
    assert text == ("", "Rivers\nLong ago.<|endoftext|>")
    batch = data._dataset("train")[0]
    learnt = batch["labels"][batch["labels"] != -100]
    assert data.tokenizer.decode(learnt) == "The Rhine<|endoftext|>"
    assert torch.equal(learnt, batch["input_ids"][batch["labels"] != -100])


def test_inputs_are_the_files_and_folders_that_are_read(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_text(json.dumps({"question": "q", "answer": "a"}))
    data = InstructData(str(tmp_path / "a.jsonl"), str(tokenizer), val=str(tmp_path))
    assert set(data.inputs()) == {tmp_path / "a.jsonl", tmp_path, Path(tokenizer)}


def test_chat_template_of_the_tokenizer(make):
    data = make([question(i) for i in range(40)] + [DOLLY], template="chat", val_percent=20)
    found = dict(rows(data) + rows(data, "val"))
    assert data.perplexity_on == "responses in samples of at most 512 tokens, chat, no BOS"
    prompt = "<|user|>\nName the river.\n\nThe Rhine is long.<|endoftext|>\n<|assistant|>\n"
    assert found[prompt] == "The Rhine<|endoftext|>\n"
    ids = next(
        row["input_ids"]
        for row in [*data.train, *data.val]
        if data.tokenizer.decode(row["input_ids"]).startswith(prompt)
    )
    assert (ids == data.tokenizer.eos_token_id).sum() == 2, "the template's special tokens are tokens"


def test_chat_template_that_cannot_be_masked_is_refused(make, tokenizer, tmp_path):
    broken = train_bpe(["text"], 300)
    broken.save_pretrained(str(tmp_path / "plain"))
    with pytest.raises(ValueError, match="no chat template; use template: alpaca"):
        make([ALPACA], template="chat", tokenizer=str(tmp_path / "plain"))
    broken.chat_template = "{{ messages | length }}{{ messages[0].content }}"
    broken.save_pretrained(str(tmp_path / "rewrites"))
    with pytest.raises(ValueError, match=r"data.jsonl: record \d+ .*changes the response; .*use template: alpaca"):
        make([question(i) for i in range(20)], template="chat", tokenizer=str(tmp_path / "rewrites"), val_percent=50)


def test_begin_token_comes_where_the_tokenizer_puts_it(make, tmp_path):
    from tokenizers import processors

    trained = train_bpe(["text"], 300)
    trained.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    trained.save_pretrained(str(tmp_path / "begins"))
    data = make(
        [ALPACA, {"text": "a" * 90}] + [question(i) for i in range(30)],
        tokenizer=str(tmp_path / "begins"),
        max_length=40,
    )
    assert data.perplexity_on == data.describe()["perplexity_on"]
    assert data.perplexity_on == "responses in samples of at most 40 tokens, alpaca, BOS"
    samples = [*data.train, *data.val]
    assert all(row["input_ids"][0] == 0 and row["prompt"] >= 1 and row["length"] <= 40 for row in samples)


def test_samples_without_a_response_or_repeated_are_left_out_and_counted(make):
    empty = [{**ALPACA, "output": value} for value in ("", " \n", None)] + [{**ALPACA, "instruction": " "}]
    data = make([question(i) for i in range(60)] + empty + [question(3)] * 2, val_percent=30)
    counts = data.describe()["prepared"]
    assert sum(split.get("without_response", 0) for split in counts.values()) == 4
    assert sum(split.get("repeated", 0) for split in counts.values()) == 2
    assert sum(split["samples"] for split in counts.values()) == 60
    for split in ("train", "val"):
        samples = data.train if split == "train" else data.val
        assert counts[split]["tokens"] == sum(row["length"] for row in samples)
        assert counts[split]["response_tokens"] == sum(row["length"] - row["prompt"] for row in samples)


@pytest.mark.parametrize("record, message", [
    ({"prompt": "x", "completion": "y"}, r"data.jsonl: record 2 \(line 2\) has the fields of no known format .*prompt"),
    ({"instruction": "x"}, r"record 2 .* \(its fields: instruction; known are Dolly: instruction, context, response"),
    ({"instruction": "x", "output": ["y"]}, "record 2 .*'output' is list, not a string"),
    (["x", "y"], "record 2 .* is a list"),
    ({"question": "x", "answer": "half \ud83d"}, "'answer' has half a surrogate pair"),
])  # fmt: skip
def test_bad_records_are_named(make, tmp_path, record, message):
    with pytest.raises(ValueError, match=message):
        make([ALPACA, record])
    assert not list((tmp_path / "cache/data").glob("*/")), "nothing half-written"


def test_arguments_are_checked(tokenizer, tmp_path):
    with pytest.raises(FileNotFoundError, match="train: no such file or folder"):
        InstructData("./nowhere.json", tokenizer)
    (tmp_path / "a.txt").write_text("x")
    for arguments, message in (
        ({"max_length": 0}, "max_length must be at least 1"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"max_val_samples": 0}, "max_val_samples must be at least 1"),
        ({"val_percent": 0}, "val_percent must be between"),
        ({"num_workers": -1}, "num_workers must not be negative"),
    ):
        with pytest.raises(ValueError, match=message):
            InstructData(str(tmp_path / "a.txt"), tokenizer, **arguments)
    with pytest.raises(ValueError, match="max_length must be at least 2, got 1"):
        InstructData(str(tmp_path / "a.txt"), tokenizer, max_length=1, cache_dir=str(tmp_path)).prepare_data()
    with pytest.raises(ValueError, match="val: no usable sample"):
        InstructData(str(tmp_path / "a.txt"), tokenizer, cache_dir=str(tmp_path), val_percent=1e-9).prepare_data()


def test_a_question_is_never_in_both_splits(make, tmp_path):
    answers = [{**question(i), "output": f"answer {n}"} for i in range(60) for n in range(3)]
    data = make(answers, val_percent=30)
    train, val = ({prompt for prompt, _ in rows(data, split)} for split in ("train", "val"))
    assert train and val and not train & val
    other = tmp_path / "val.jsonl"
    other.write_text("".join(json.dumps({**question(i), "output": "another"}) + "\n" for i in range(20)))
    data = make(answers, val=str(other))
    assert (len(data.val), len(data.train)) == (20, 120)
    assert data.describe()["prepared"]["train"]["also_in_validation"] == 60


def test_what_is_too_long_loses_context_first_and_never_its_response(make, tokenizer):
    long = {"instruction": "Find it.", "input": "a b c d e f g h " * 30, "output": "here"}
    endless = {"instruction": "Go on.", "input": "", "output": "on and on " * 200}
    huge = {"instruction": "Read " * 300, "input": "x", "output": "done"}
    data = make([long, endless, huge] + [question(i) for i in range(40)], max_length=128, val_percent=20)
    found = rows(data) + rows(data, "val")
    assert all(row["length"] <= 128 and row["length"] > row["prompt"] for row in [*data.train, *data.val])
    context = next(p for p, r in found if "Find it." in p)
    assert context.startswith("Below is") and context.endswith("g h \n\n### Response:\n")
    assert (context.split("### Input:\n")[1].removesuffix("\n\n### Response:\n")) in long["input"]
    response = next(r for p, r in found if "Go on." in p)
    assert endless["output"].startswith(response), "cut, so no end-of-text"
    prompt, response = next((p, r) for p, r in found if r.startswith("done"))
    assert response == "done<|endoftext|>" and prompt.endswith("### Response:\n") and "Below" not in prompt
    counts = data.describe()["prepared"]
    assert sum(c.get("shortened_prompts", 0) for c in counts.values()) == 2
    assert sum(c.get("shortened_responses", 0) for c in counts.values()) == 1


def test_long_text_becomes_consecutive_samples_and_loses_nothing(make):
    text = " ".join(f"word{i}" for i in range(400))
    data = make([{"text": text}] + [question(i) for i in range(40)], max_length=50, val_percent=20)
    pieces = [r for p, r in rows(data) + rows(data, "val") if not p]
    assert "".join(pieces) == text + "<|endoftext|>"


def test_ids_are_stable_and_distinct(make):
    records = [question(i) for i in range(40)] + [{"text": "word " * 300}]
    one, two = make(records, max_length=60), make(list(reversed(records)), max_length=60)
    ids = [[row["sample_id"] for row in [*data.train, *data.val]] for data in (one, two)]
    assert sorted(ids[0]) == sorted(ids[1]) and len(set(ids[0])) == len(ids[0])
    assert min(ids[0]) >= 0


def model(kind, attention):
    torch.manual_seed(0)
    sizes = {"gpt2": {"n_layer": 2, "n_embd": 32, "n_head": 2}, "llama": {
        "num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2,
        "intermediate_size": 48,
    }}  # fmt: skip
    config = AutoConfig.for_model(kind, vocab_size=400, max_position_embeddings=512, **sizes[kind])
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()


@pytest.mark.parametrize("kind, attention", [("llama", "sdpa"), ("llama", "eager"), ("gpt2", "sdpa")])
@pytest.mark.parametrize(
    "arguments", [{"packing": True}, {"packing": True, "padding_side": "left"}, {"padding_side": "left"}, {}]
)
def test_no_sample_sees_another(make, kind, attention, arguments):
    """Oracle: every sample alone."""
    data = make([question(i, words=20) for i in range(30)], max_length=200, val_percent=20, **arguments)
    network, compared = model(kind, attention), 0
    batch = data._dataset("train").__getitems__([0, 1, 2, 3])
    positions = {"position_ids": batch["position_ids"]} if "position_ids" in batch else {}
    with torch.no_grad():
        logits = network(input_ids=batch["input_ids"], use_cache=False, **positions).logits
        alone = {
            tuple(row["input_ids"]): network(input_ids=torch.tensor(row["input_ids"])[None]).logits[0]
            for row in data.train
        }
    for i in range(4):
        used = batch["attention_mask"][i].nonzero().flatten()
        place, end = int(used[0]), int(used[-1]) + 1
        while place < end:
            ids = next(ids for ids in alone if tuple(batch["input_ids"][i, place : place + len(ids)].tolist()) == ids)
            torch.testing.assert_close(logits[i, place : place + len(ids)], alone[ids], atol=1e-5, rtol=1e-4)
            place, compared = place + len(ids), compared + 1
    assert compared >= (6 if data.packing else 4)


@pytest.mark.parametrize("side", ["left", "right"])
def test_packed_labels_are_those_of_the_samples_alone(make, side):
    records = [question(i) for i in range(30)] + [{"text": "a plain text"}]
    data = make(records, max_length=200, val_percent=20, packing=True, padding_side=side)
    rows = data._dataset("train")
    assert len(rows) < len(data.train)
    learnt = torch.cat([row["labels"][row["labels"] != -100] for row in (rows[i] for i in range(len(rows)))])
    expected = [token for row in data.train for token in row["input_ids"][max(row["prompt"], 1) :]]
    assert sorted(learnt.tolist()) == sorted(expected)
    assert sum(int(rows[i]["attention_mask"].sum()) for i in range(len(rows))) == sum(data.train["length"][:])


def test_validation_padding_rows_do_not_count(make):
    data = make([question(i) for i in range(30)], val_percent=20)
    batch = data._dataset("val").__getitems__([0, -1])
    assert (batch["labels"][0] != -100).any() and (batch["labels"][1] == -100).all()
    assert batch["sample_id"][1] == -1


class Ids(Watcher):
    def training_step(self, batch, batch_idx):
        self.seen += batch["sample_id"].tolist()
        return self.weight * 1.0

    def validation_step(self, batch, batch_idx):
        pass


def test_an_interrupted_run_continues_with_the_samples_it_had_not_seen(make, tmp_path):
    def run(steps, checkpoint=None, **sizes):
        module, data = Ids(), make([question(i) for i in range(60)], val_percent=20, **sizes)
        fitting = trainer(max_steps=steps, limit_val_batches=1)
        fitting.fit(module, data, ckpt_path=checkpoint, weights_only=True)
        return fitting, module.seen

    _, straight = run(12, batch_size=4)
    assert len(set(straight[:40])) == 40
    first, seen = run(5, batch_size=4)
    first.save_checkpoint(tmp_path / "c.ckpt")
    _, rest = run(7, tmp_path / "c.ckpt", batch_size=2)
    assert seen + rest == straight[: len(seen + rest)] and len(rest) == 4
    with pytest.raises(ValueError, match="max_length: the checkpoint was trained on samples of 512 tokens"):
        run(7, tmp_path / "c.ckpt", max_length=256)
