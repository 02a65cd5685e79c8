import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from lightning_modules.perplexity import IGNORED, mean_nll, next_token_nll, perplexity, validation_perplexity
from tests.lightning_modules.structured_pruning.toy import batches, tiny


def test_agrees_with_cross_entropy_of_shifted_logits():
    torch.manual_seed(0)
    logits, labels = torch.randn(3, 7, 11), torch.randint(0, 11, (3, 7))
    nll, tokens = next_token_nll(logits, labels)
    expected = F.cross_entropy(logits[:, :-1].reshape(-1, 11), labels[:, 1:].reshape(-1), reduction="sum")
    assert tokens == 3 * 6
    torch.testing.assert_close(nll, expected)


def test_ignored_labels_do_not_count():
    logits, labels = torch.randn(2, 5, 4), torch.randint(0, 4, (2, 5))
    labels[1] = IGNORED
    nll, tokens = next_token_nll(logits, labels)
    alone, _ = next_token_nll(logits[:1], labels[:1])
    assert tokens == 4
    torch.testing.assert_close(nll, alone)


def test_nothing_to_predict_is_zero_not_nan():
    nll, tokens = next_token_nll(torch.randn(1, 4, 3), torch.full((1, 4), IGNORED))
    assert nll == 0 and tokens == 0


def test_a_confidently_wrong_token_is_finite():
    logits = torch.tensor([[[200.0, -200.0], [0.0, 0.0]]], dtype=torch.bfloat16)
    nll, _ = next_token_nll(logits, torch.tensor([[0, 1]]))
    assert nll == pytest.approx(400)


def test_perplexity_is_exp_and_never_overflows():
    assert perplexity(math.log(50)) == pytest.approx(50)
    assert perplexity(1e6) == math.inf


def test_validation_perplexity_is_without_dropout_and_leaves_the_model_as_it_was():
    model, text = tiny(attention_dropout=0.5), batches(3)
    wanted = perplexity(mean_nll(model, text))
    assert validation_perplexity(model.train(), SimpleNamespace(val_dataloader=lambda: text)) == pytest.approx(wanted)
    assert model.training
    with pytest.raises(ValueError, match="no token to predict"):
        validation_perplexity(model, SimpleNamespace(val_dataloader=list))
    assert model.training
