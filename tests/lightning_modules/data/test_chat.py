"""Chat samples: the tokens of the whole rendered conversation, of which exactly the answer is learnt."""

from collections import Counter

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from tokenizers import AddedToken

from lightning_modules.data.instructions import Instruction, write_prompt
from lightning_modules.data.samples import SampleEncoder, SampleRecipe
from lightning_modules.data.tokenizer import load_tokenizer, train_bpe
from tests.conftest import ROOT

SMOLLM2 = ROOT.parent / "real" / "smollm2"

_TURN = "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
TEMPLATES = {
    "chatml": "{% for m in messages %}" + _TURN + "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    # as Qwen3: an empty block of thoughts before the last answer, which the generation prompt does not hold
    "think": "{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>assistant\n<think>\n\n</think>\n\n"
    "{{ m.content.lstrip('\n') }}<|im_end|>\n{% else %}" + _TURN + "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    # as Llama 3: a beginning, trimmed messages, no line break after a turn
    "llama3": "{{ '<|endoftext|>' }}{% for m in messages %}<|im_start|>{{ m.role }}\n\n{{ m.content | trim }}<|im_end|>"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n\n{% endif %}",
    # as Mistral: the generation prompt is empty, and a blank stands before the answer
    "blank": "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %}"
    " {{ m.content }}<|endoftext|>{% endif %}{% endfor %}",
}
SPECIAL = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")


def _tokenizers():
    trained = train_bpe(["The answer is a word: the Rhine. user assistant think INST"] * 20, 400)
    trained.add_special_tokens({"additional_special_tokens": [AddedToken(name, special=True) for name in SPECIAL[:2]]})
    found = {}
    for name, template in TEMPLATES.items():
        copy = type(trained)(tokenizer_object=trained.backend_tokenizer, eos_token="<|endoftext|>")
        copy.chat_template = template
        found[name] = copy
    if SMOLLM2.is_dir():
        found["smollm2"] = load_tokenizer(str(SMOLLM2))
    return found


TOKENIZERS = _tokenizers()
ENCODERS = {name: SampleEncoder(tokenizer, "chat", 4096) for name, tokenizer in TOKENIZERS.items()}
WORDS = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]) | st.sampled_from(" \n.é€"), max_size=30)


def encode(name, sample):
    (found,) = ENCODERS[name](sample, Counter())
    return found


@pytest.mark.parametrize("name", TOKENIZERS)
@given(question=WORDS, context=WORDS, answer=WORDS)
def test_tokens_are_those_of_the_whole_conversation_and_the_mask_covers_the_answer(name, question, context, answer):
    assume(question.strip() and answer.strip())
    tokenizer = TOKENIZERS[name]
    alone = tokenizer(answer, add_special_tokens=False).input_ids
    assume(tokenizer.decode(alone, clean_up_tokenization_spaces=False) == answer)  # SmolLM2 has no token for some bytes
    message = f"{question}\n\n{context}" if context else question
    turns = [{"role": "user", "content": message}, {"role": "assistant", "content": answer}]
    ids, prompt = encode(name, Instruction(question, context, answer))
    assert ids == tokenizer.apply_chat_template(turns, tokenize=True, return_dict=False)
    learnt, first = (
        tokenizer.decode(ids[prompt:stop], clean_up_tokenization_spaces=False) for stop in (None, prompt + 1)
    )
    end = {"llama3": "<|im_end|>", "blank": "<|endoftext|>"}.get(name, "<|im_end|>\n")
    # a character, or a blank before the answer, may lie in one token with what is learnt
    assert learnt.endswith(end) and learnt.removesuffix(end).strip().endswith(answer.strip()[-5:])
    assert len(learnt) < len(answer) + len(end) + len(first)
    assert answer.strip() in learnt
    assert not {"<think>", "assistant", "INST"} & set(learnt.removesuffix(end).replace(answer.strip(), "").split())


@pytest.mark.skipif("smollm2" not in TOKENIZERS, reason="needs the real model's folder beside the repository")
def test_a_real_template():
    tokenizer = TOKENIZERS["smollm2"]
    ids, prompt = encode("smollm2", Instruction("Which river?", "", "The Rhine."))
    assert tokenizer.decode(ids[prompt:]) == "The Rhine.<|im_end|>\n"
    assert tokenizer.decode(ids[:prompt]).endswith("Which river?<|im_end|>\n<|im_start|>assistant\n")


def test_what_stands_before_the_answer_is_kept_and_not_learnt():
    ids, prompt = encode("think", Instruction("Which river?", "", "The Rhine."))
    decode = TOKENIZERS["think"].decode
    assert decode(ids[:prompt]).endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert decode(ids[prompt:]) == "The Rhine.<|im_end|>\n"


@pytest.mark.parametrize("template, reason", [
    ("{{ raise_exception('roles must alternate') }}", r"cannot write it \(roles must alternate\)"),
    ("{{ messages[0].content + 1 }}", "cannot write it"),
    ("{% for m in messages %}{{ m.content | upper }}{% endfor %}", "changes the response"),
    ("{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}", "changes the response"),
    ("{{ 'Q' if add_generation_prompt }}{% for m in messages %}{{ m.content }}{% endfor %}", "not how it begins"),
])  # fmt: skip
def test_a_record_that_cannot_be_rendered_is_named(template, reason):
    tokenizer = train_bpe(["text"], 300)
    tokenizer.chat_template = template
    recipe = SampleRecipe(SampleEncoder(tokenizer, "chat", 100))
    with pytest.raises(ValueError, match=rf"a.jsonl: record 7: .*{reason}.*use template: alpaca"):
        recipe.encode([("a.jsonl: record 7", "Which river?", "", "The Rhine.")])


def test_words_of_the_template_in_a_question_do_not_mislead():
    sample = Instruction("Say RESPONSE, RESPONSEE and <think>.", "", "RESPONSE")
    prompt = write_prompt(sample, "chat", TOKENIZERS["think"])
    assert prompt.text[prompt.response :] == "RESPONSE<|im_end|>\n"
