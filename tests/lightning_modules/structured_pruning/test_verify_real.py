"""Deep models in half precision: a correct slice is proven, and one that is slightly wrong is refused."""

import copy
import os
from pathlib import Path

import pytest
import torch

from lightning_modules.structured_pruning.layers import decoder_layers, shape_of
from lightning_modules.structured_pruning.plan import LayerPlan, PruningPlan
from lightning_modules.structured_pruning.slicing import slice_model
from lightning_modules.structured_pruning.verify import compare, reference_logits, removed_parts_zeroed
from tests.lightning_modules.structured_pruning.toy import ids, tiny

REAL = Path(os.environ.get("PARE_REAL_MODEL") or Path(__file__).parents[4] / "real/smollm2")
TOLERANCE = 1e-6


def _qwen2():
    """Deep, with biases, and with logits as large as a trained model's."""
    return tiny("qwen2", torch.bfloat16, num_hidden_layers=16, hidden_size=192, intermediate_size=768)


def _smollm2():
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(REAL, dtype=torch.bfloat16).eval()


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(_qwen2, id="qwen2"),
        pytest.param(
            _smollm2,
            id="smollm2",
            marks=pytest.mark.skipif(not REAL.is_dir(), reason="no SmolLM2-135M folder: PARE_REAL_MODEL names one"),
        ),
    ],
)
def pruned(request):
    """A bfloat16 model without its first group and every third channel of each layer, and the reference logits."""
    dense = request.param()
    shapes = [shape_of(layer) for layer in decoder_layers(dense)]
    layers = [LayerPlan(list(range(1, s.groups)), [c for c in range(s.channels) if c % 3]) for s in shapes]
    plan = PruningPlan(layers, [[s.groups, s.channels] for s in shapes], "dense", "")
    text = ids(1, 24)
    return dense, plan, slice_model(dense, plan), reference_logits(dense, plan, text), text


def test_a_correct_slice_is_proven_where_float32_is_in_doubt(pruned):
    dense, plan, sliced, reference, text = pruned
    result = compare(*reference, sliced, text, TOLERANCE)
    result.raise_if_failed()
    assert result.zeroed_and_sliced <= 1e-9 * result.largest_logit
    wide, narrow = copy.deepcopy(dense).float(), copy.deepcopy(sliced).float()
    with torch.no_grad(), removed_parts_zeroed(wide, plan):
        in_float32 = (wide(text).logits - narrow(text).logits).abs().max()
    assert in_float32 > 1e-6, "what rounding alone does in float32"


def _swap(projection: str, axis: int, first: int, second: int):
    """Two rows or columns of a projection in each other's place."""

    def change(layer) -> None:
        weight = _projection(layer, projection).weight.data
        pair = weight.index_select(axis, torch.tensor([second, first]))
        weight.index_copy_(axis, torch.tensor([first, second]), pair)

    return change


def _swap_heads(layer) -> None:
    """Rows of the first and the last key head in each other's place."""
    dim = layer.self_attn.head_dim
    weight = layer.self_attn.k_proj.weight.data
    weight.copy_(torch.cat([weight[-dim:], weight[dim:-dim], weight[:dim]]))


def _forget_bias(projection: str):
    def change(layer) -> None:
        linear = _projection(layer, projection)
        if linear.bias is None:
            pytest.skip("this model has no biases")
        linear.bias.data.zero_()

    return change


def _projection(layer, name: str):
    return getattr(layer.self_attn if hasattr(layer.self_attn, name) else layer.mlp, name)


@pytest.mark.parametrize("where", [0, -1], ids=["first layer", "last layer"])
@pytest.mark.parametrize(
    "mistake",
    [
        pytest.param(_swap("down_proj", 1, 3, 4), id="two columns of down_proj"),
        pytest.param(_swap("o_proj", 1, 0, 1), id="two columns of o_proj"),
        pytest.param(_swap("gate_proj", 0, 3, 4), id="two rows of gate_proj"),
        pytest.param(_swap("v_proj", 0, 0, 1), id="two rows of v_proj"),
        pytest.param(_swap_heads, id="a head's rows of k_proj"),
        pytest.param(_forget_bias("q_proj"), id="no bias of q_proj"),
        pytest.param(_forget_bias("v_proj"), id="no bias of v_proj"),
    ],
)
def test_one_small_mistake_in_one_layer_is_refused(pruned, mistake, where):
    _, _, sliced, reference, text = pruned
    wrong = copy.deepcopy(sliced)
    mistake(decoder_layers(wrong)[where])
    with pytest.raises(ValueError, match="verify: logits of the sliced model differ"):
        compare(*reference, wrong, text, TOLERANCE).raise_if_failed()
