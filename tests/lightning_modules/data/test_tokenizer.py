import shutil
from pathlib import Path

import numpy as np
import pytest

from lightning_modules.data.tokenizer import END_OF_TEXT, Encoder, fingerprint, load_tokenizer, train_bpe
from tests.lightning_modules.data.toy import sentences

GPT2 = Path(__file__).parents[3] / "../shared/tokenizers/gpt2"


@pytest.fixture(scope="module")
def trained():
    return train_bpe(sentences(0, 100), 400)


def test_training_is_deterministic(trained):
    assert fingerprint(train_bpe(sentences(0, 100), 400)) == fingerprint(trained)
    assert fingerprint(train_bpe(sentences(1, 100, 80), 400)) != fingerprint(trained)


def test_trained_tokenizer_can_say_anything(trained):
    text = "the red house\n\t\u00fcber \U0001f600 \x00"
    assert trained.decode(trained(text)["input_ids"]) == text
    assert trained.eos_token == trained.pad_token == trained.bos_token == END_OF_TEXT
    assert trained.eos_token_id == 0
    assert 257 < len(trained) <= 400


def test_vocabulary_must_hold_all_bytes():
    with pytest.raises(ValueError, match="vocab_size must be at least 257"):
        train_bpe(["text"], 256)


def test_fingerprint_survives_use_saving_and_loading(trained, tmp_path):
    before = fingerprint(trained)
    trained(["a", "b c"], padding=True, truncation=True, max_length=3)
    assert fingerprint(trained) == before
    trained.save_pretrained(str(tmp_path))
    loaded = load_tokenizer(str(tmp_path))
    assert fingerprint(loaded) == before
    assert loaded.eos_token_id == 0


def test_encoder_ends_every_document_and_takes_no_special_tokens_from_the_text(trained):
    encode = Encoder(trained)
    ids = encode(["the house", f"say {END_OF_TEXT}"])
    assert ids.dtype == np.int32
    assert (ids == 0).sum() == 2
    assert trained.decode(ids) == f"the house{END_OF_TEXT}say {END_OF_TEXT}{END_OF_TEXT}"
    assert encode([]).shape == (0,)


def test_encoder_ignores_padding_and_truncation_left_from_earlier_use(trained):
    identity, long = Encoder(trained).identity(), "house " * 50
    trained([long, "a"], padding=True, truncation=True, max_length=4)
    assert Encoder(trained).identity() == identity
    assert len(Encoder(trained)([long])) > 20


@pytest.mark.skipif(not GPT2.is_dir(), reason="the published GPT-2 vocabulary is not there (../shared)")
def test_gpt2_from_its_two_published_files():
    tokenizer = load_tokenizer(str(GPT2))
    assert tokenizer("Hello world")["input_ids"] == [15496, 995]
    assert (len(tokenizer), tokenizer.eos_token_id) == (50257, 50256)


def test_folders_that_hold_no_tokenizer(tmp_path):
    with pytest.raises(ValueError, match=r"not a tokenizer folder; it needs tokenizer\.json"):
        load_tokenizer(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{broken")
    with pytest.raises(ValueError, match="cannot be read"):
        load_tokenizer(str(tmp_path))


def test_folder_that_does_not_exist():
    with pytest.raises(FileNotFoundError, match=r"no such folder: \./nowhere"):
        load_tokenizer("./nowhere")


def test_hub_name_without_a_network():
    with pytest.raises(FileNotFoundError, match="leave the tokenizer out to train one"):
        load_tokenizer("nobody/nothing-of-this-name")


def test_tokenizer_without_end_of_text(trained, tmp_path):
    trained.save_pretrained(str(tmp_path / "whole"))
    (tmp_path / "bare").mkdir()
    shutil.copy(tmp_path / "whole" / "tokenizer.json", tmp_path / "bare")
    with pytest.raises(ValueError, match=r'add "eos_token" to its tokenizer_config\.json'):
        load_tokenizer(str(tmp_path / "bare"))
