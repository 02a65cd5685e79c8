"""The kernel for weights in bands without a GPU: in the interpreter, and compiled for A100, H100 and B200."""

import pytest
import torch

from lightning_modules.block_sparsity.bands import band_product, to_bands
from lightning_modules.block_sparsity.demotion import Ratios, demote
from lightning_modules.block_sparsity.packing import Layout, pack
from lightning_modules.block_sparsity.tiers import TierMap
from tests.lightning_modules.block_sparsity.toy import scored
from tests.triton_tools import ARCHITECTURES, Launches, compiled, interpreting

pytest.importorskip("triton", reason="needs the extra triton: pip install -e '.[triton]'")


@pytest.fixture(scope="module")
def interpreter():
    with interpreting() as call:
        yield call


def _bands(shape, ratios, dtype, draw):
    weight, tiers = torch.randn(shape, generator=draw), TierMap("m", shape, 16, 10, torch.device("cpu"))
    demote({"m": scored(weight.abs())}, {"m": tiers}, Ratios(*ratios), "band")
    layout = Layout(*shape, 16, 10)
    return to_bands(pack(weight.masked_fill_(~tiers.keep_RC, 0.0), tiers, dtype), layout, "m"), layout


def _apart(shape, ratios, dtype, rows):
    """Largest difference of kernel and reference, over the largest output; and whether anything else was written."""
    from lightning_modules.block_sparsity.triton_bands import kernel_product

    draw = torch.Generator().manual_seed(1)
    parts, layout = _bands(shape, ratios, dtype, draw)
    x, bias = torch.randn(*rows, shape[1], generator=draw), torch.randn(shape[0], generator=draw)
    wanted, found = band_product(x, parts, layout, bias), kernel_product(x, parts, layout, bias)
    assert found.shape == wanted.shape
    return float((found - wanted).abs().max() / wanted.abs().max())


@pytest.mark.parametrize(
    ("shape", "ratios", "dtype", "rows"),
    [
        ((32, 320), (0.3, 0.4, 0.3), torch.float16, (1,)),
        ((24, 160), (0.2, 0.5, 0.3), torch.int8, (1, 2)),  # the last band is half there
        ((16, 160), (0.0, 1.0, 0.0), torch.int8, (1,)),
        ((16, 160), (0.5, 0.0, 0.5), torch.float32, (1,)),
    ],
)
def test_the_kernel_gives_the_references_products(shape, ratios, dtype, rows, interpreter):
    assert interpreter(_apart, shape, ratios, dtype, rows) < 1e-6


def test_the_kernel_is_launched_on_the_device_of_the_tensors(monkeypatch):
    from lightning_modules.block_sparsity import triton_bands

    kernel = Launches()
    monkeypatch.setattr(torch.cuda, "device_of", kernel.device_of)
    monkeypatch.setattr(triton_bands, "multiply", kernel)
    parts, layout = _bands((16, 160), (0.3, 0.4, 0.3), torch.float32, torch.Generator().manual_seed(1))
    triton_bands.kernel_product(torch.ones(1, 160), parts, layout)
    assert kernel.launched_on == [torch.device("cpu")]


def _refused():
    from lightning_modules.block_sparsity.triton_bands import kernel_product

    try:
        kernel_product(torch.ones(1, 37), {}, Layout(44, 37, 8, 6))
    except ValueError as error:
        return str(error)


def test_other_blocks_are_refused(interpreter):
    assert "blocks of 8" in interpreter(_refused)


_TYPES = {"out": "*fp16", "x": "*fp16", "columns": "*i16", "mid_index": "*u8", "topk_index": "*u8"}
_TYPES |= dict.fromkeys(("dense_scale", "mid_scale", "topk_scale"), "*fp16")
_TYPES |= dict.fromkeys(("inputs", "outputs", "d", "m", "t"), "i32")
# measured for sm_90 with triton 3.7.1 and its ptxas: instructions, registers of a thread
_MEASURED = {"*fp16": (850, 48), "*i8": (964, 56)}
_ROOM = 1.15


@pytest.mark.parametrize("sm", ARCHITECTURES)
@pytest.mark.parametrize("values", list(_MEASURED))
def test_the_kernel_compiles_without_spilling_and_reads_dense_blocks_16_bytes_at_a_time(values, sm):
    from lightning_modules.block_sparsity import triton_bands

    types = _TYPES | dict.fromkeys(("dense", "mid", "topk"), values)
    constants = {"K": 10, "N": triton_bands.STEP, "SCALED": values == "*i8"}
    useful, registers = compiled(triton_bands.multiply, types, constants, triton_bands.OPTIONS, sm)
    found = (len(useful), registers)
    print(values, sm, found)
    assert [operation for operation in useful if operation.startswith("LDG.E.128")]
    assert all(now <= _ROOM * then for now, then in zip(found, _MEASURED[values], strict=True))
