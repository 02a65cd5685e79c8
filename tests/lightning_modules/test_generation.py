"""Options that the command names decide what is generated; what a model's own configuration says does not."""

from types import SimpleNamespace

import pytest
import torch
from transformers import GenerationConfig

from callbacks.commands import PareTrainer
from lightning_modules import generation
from lightning_modules.data.tokenizer import train_bpe
from tests.lightning_modules.structured_pruning.toy import tiny

SAVED = {
    "do_sample": True,
    "temperature": 1.7,
    "top_k": 3,
    "top_p": 0.3,
    "repetition_penalty": 9.0,
    "no_repeat_ngram_size": 2,
    "max_length": 7,
    "min_new_tokens": 3,
    "num_beams": 2,
    "suppress_tokens": [4, 5, 6],
}
GREEDY = {"temperature": 0, "top_p": 1.0}
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe(["the quick brown fox jumps over the lazy dog. "] * 50, 300)


@pytest.fixture
def model():
    found = tiny(vocab_size=300)
    found.generation_config = GenerationConfig(bos_token_id=0, eos_token_id=299, **SAVED)
    return found


def argmax_loop(model, ids, steps, end=299):
    with torch.no_grad():
        for _ in range(steps):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
            if ids[0, -1] == end:
                break
    return ids


def test_temperature_0_is_an_argmax_loop(model, tokenizer):
    ids = tokenizer("the quick", return_tensors="pt").input_ids
    wanted = argmax_loop(model, ids, 20)[0, ids.shape[1] :]
    text = generation.stream(model, tokenizer, "the quick", max_new_tokens=20, **GREEDY)
    assert text == tokenizer.decode(wanted, skip_special_tokens=True) and len(wanted) > 7
    assert model.generation_config.top_k == 3  # what is saved with the model is as before


def test_drawing_follows_the_options_named(model, tokenizer):
    """Drawn as the options say, from the model's own probabilities."""
    ids = tokenizer("the", return_tensors="pt").input_ids
    scores = model(ids).logits[0, -1].detach()
    torch.manual_seed(0)

    def drawn(**options):
        options = {"temperature": 1.0, "top_p": 1.0} | options
        return {generation.stream(model, tokenizer, "the", max_new_tokens=1, **options) for _ in range(60)}

    assert len(drawn()) > 5  # not the 3 likeliest
    likeliest = {tokenizer.decode(token, skip_special_tokens=True) for token in scores.topk(2).indices}
    assert drawn(top_k=2, temperature=3.0) == likeliest
    assert len(drawn(top_p=1e-6)) == 1
    assert len(drawn(temperature=0.01)) == 1


def test_repetition_is_penalised_only_where_that_is_asked_for(model, tokenizer):
    ids = torch.tensor([[3]])
    plain = argmax_loop(model, ids, 12)[0, 1:].tolist()
    text = generation.stream(
        model, tokenizer, tokenizer.decode(3), max_new_tokens=12, repetition_penalty=50.0, **GREEDY
    )
    assert text != tokenizer.decode(plain, skip_special_tokens=True)


def test_the_model_ends_where_its_own_end_token_comes(model, tokenizer):
    ids = tokenizer("the quick", return_tensors="pt").input_ids
    fourth = argmax_loop(model, ids, 4)[0, -1].item()
    model.generation_config.eos_token_id = [298, fourth]
    text = generation.stream(model, tokenizer, "the quick", max_new_tokens=20, **GREEDY)
    assert text == tokenizer.decode(
        argmax_loop(model, ids, 20, end=fourth)[0, ids.shape[1] :], skip_special_tokens=True
    )


def test_an_empty_prompt_begins_a_text_or_is_refused(model, tokenizer):
    wanted = argmax_loop(model, torch.tensor([[tokenizer.bos_token_id]]), 5)[0, 1:]
    text = generation.stream(model, tokenizer, "", max_new_tokens=5, **GREEDY)
    assert text == tokenizer.decode(wanted, skip_special_tokens=True)
    without = train_bpe(["the quick brown fox"] * 20, 300)
    without.bos_token = None
    with pytest.raises(ValueError, match="prompt: it is empty, and the tokenizer has no token that begins a text"):
        generation.stream(model, without, "", max_new_tokens=5, **GREEDY)


def test_a_chat_is_rendered_by_the_tokenizers_template(model, tokenizer, capsys, monkeypatch):
    with pytest.raises(ValueError, match="chat: the tokenizer has no chat template"):
        generation.prompt_ids(tokenizer, [{"role": "user", "content": "hi"}], 100)
    monkeypatch.setattr(tokenizer, "chat_template", TEMPLATE)
    ids = generation.prompt_ids(tokenizer, [{"role": "user", "content": "the fox"}], 100)
    assert tokenizer.decode(ids[0]) == "<user>the fox\n<assistant>"
    with pytest.raises(ValueError, match=r"the conversation has .* tokens, and only 3 leave room"):
        generation.prompt_ids(tokenizer, [{"role": "user", "content": "the fox"}], 3)

    lines, asked = iter(["the fox", "the dog", ""]), []
    monkeypatch.setattr("builtins.input", lambda mark: next(lines))
    monkeypatch.setattr(generation, "stream", lambda m, t, prompt, **o: asked.append(list(prompt)) or "yes")
    generation.repl(model, tokenizer, chat=True, max_new_tokens=2)
    assert [[message["content"] for message in said] for said in asked] == [
        ["the fox"], ["the fox", "yes", "the dog"],
    ]  # fmt: skip

    def full(m, t, prompt, **options):
        raise ValueError("prompt: the conversation has 9 tokens, and only 3 leave room for max_new_tokens")

    lines = iter(["the fox", ""])
    monkeypatch.setattr(generation, "stream", full)
    generation.repl(model, tokenizer, chat=True, max_new_tokens=2)  # says so, and goes on
    assert "the conversation has 9 tokens" in capsys.readouterr().err


@pytest.mark.parametrize("options", [{"temperature": -1.0}, {"top_p": 0.0}, {"top_k": -1}])
def test_options_out_of_range_are_refused_before_anything_is_loaded(options):
    run = SimpleNamespace(callbacks=[])
    with pytest.raises(ValueError, match=next(iter(options))):
        PareTrainer.generate(run, None, model_dir="/nothing/there", prompt="a", **options)


def test_the_command_takes_the_datas_tokenizer_where_the_folder_has_none(tmp_path, model, tokenizer, capsys):
    model.save_pretrained(tmp_path / "model")
    run, data = SimpleNamespace(callbacks=[]), SimpleNamespace(named_tokenizer=tokenizer)
    arguments = {"model_dir": str(tmp_path / "model"), "prompt": "the", "temperature": 0, "max_new_tokens": 6}
    with pytest.raises(ValueError, match=r"has no tokenizer.*data\.tokenizer"):
        PareTrainer.generate(run, None, **arguments)
    PareTrainer.generate(run, None, data, **arguments)
    ids = tokenizer("the", return_tensors="pt").input_ids
    wanted = tokenizer.decode(argmax_loop(model, ids, 6)[0, ids.shape[1] :], skip_special_tokens=True)
    assert capsys.readouterr().out.strip() == wanted.strip()
