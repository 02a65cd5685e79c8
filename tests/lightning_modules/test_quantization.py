"""Weights in fewer bits: which ones, how many bytes, and how near."""

import copy
import importlib.util

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from lightning_modules import quantization
from lightning_modules.quantization import quantize, weight_bytes
from tests.lightning_modules.structured_pruning.toy import ids, tiny

needs_torchao = pytest.mark.skipif(
    importlib.util.find_spec("torchao") is None, reason="needs torchao: pip install -e '.[quant]'"
)
MOE = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
WIDE = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 8}


def widths(model):
    return [m.weight.shape for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "layers." in n]


@needs_torchao
@pytest.mark.parametrize(("form", "bits", "near"), [("int8", 8, 0.1), ("int4", 4, 0.7)])
def test_the_decoders_matrices_take_so_many_bits_and_compute_nearly_the_same(form, bits, near):
    model = tiny(dtype=torch.bfloat16, **WIDE)
    dense = copy.deepcopy(model)
    quantize(model, form)
    with torch.no_grad():
        exact, found = (m(ids()).logits.float() for m in (dense, model))
    assert 0 < (found - exact).norm() < near * exact.norm()
    kept = sum(p.nbytes for n, p in dense.named_parameters() if not (n.endswith("proj.weight")))
    expected = kept
    for rows, columns in widths(dense):
        # of a row: a scale in float32 and a zero in int8; of every 32 weights: scale and zero in bfloat16
        scales = rows * (4 + 1) if bits == 8 else rows * columns // 32 * (2 + 2)
        expected += rows * columns * bits // 8 + scales
    assert weight_bytes(model) == expected
    assert type(model.lm_head.weight) is torch.nn.Parameter and model.lm_head.weight.dtype == torch.bfloat16


def test_bytes_count_tied_weights_once():
    model = tiny(tie_word_embeddings=True)
    assert weight_bytes(model) == sum(p.nbytes for p in model.parameters())
    assert weight_bytes(tiny()) == weight_bytes(model) + model.lm_head.weight.nbytes


@needs_torchao
def test_widths_that_no_group_divides_are_refused():
    with pytest.raises(ValueError, match=r"int4: model\.layers\.0\.\w+\.\w+ is 48 wide, no multiple of the 32 weights"):
        quantize(tiny(), "int4")


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(quantization.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs the package torchao: pip install -e '\.\[quant\]'"):
        quantize(tiny(), "int8")


@needs_torchao
@pytest.mark.parametrize(
    ("name", "sizes", "told"),
    [
        ("gpt2", {"n_layer": 1, "n_embd": 32, "n_head": 2}, r"transformer\.h\.0\.mlp\.c_\w+\.weight"),
        ("mixtral", {"num_local_experts": 2, "num_hidden_layers": 1, **MOE}, r"model\.layers\.0\.mlp\.experts\.\w+"),
    ],
)
def test_models_of_which_most_would_stay_are_refused(name, sizes, told):
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, vocab_size=97, **sizes))
    with pytest.raises(ValueError, match=rf"int8: \w+ has most of its weights outside .* \({told}\)"):
        quantize(model, "int8")
