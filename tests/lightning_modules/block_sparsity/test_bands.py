"""The band form: the same weights, byte for byte, in the order that products read."""

import pytest
import torch
import torch.nn.functional as F

from lightning_modules.block_sparsity import load_packed
from lightning_modules.block_sparsity.bands import band_product, from_bands, to_bands
from lightning_modules.block_sparsity.demotion import Ratios, demote
from lightning_modules.block_sparsity.masks import mask_weights
from lightning_modules.block_sparsity.packed_model import PackedLinear, read_packed, write_packed
from lightning_modules.block_sparsity.packing import Layout, pack, unpack
from lightning_modules.block_sparsity.pruner import Pruner, packed_bits
from lightning_modules.block_sparsity.scores.magnitude import Magnitude
from lightning_modules.block_sparsity.tiers import TierMap
from tests.lightning_modules.block_sparsity.toy import batches, prune, scored, tiny_llama

CPU = torch.device("cpu")


def _pruned(shape, ratios, block=16, k=10, scope="band"):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    tiers = TierMap("layer7", shape, block, k, CPU)
    demote({"layer7": scored(weight.abs())}, {"layer7": tiers}, Ratios(*ratios), scope)
    return weight.masked_fill_(~tiers.keep_RC, 0.0), tiers, Layout(*shape, block, k)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.int8])
@pytest.mark.parametrize(
    ("shape", "block", "k", "ratios"),
    [
        ((64, 160), 16, 10, (0.3, 0.4, 0.3)),
        ((44, 37), 8, 6, (0.4, 0.3, 0.3)),
        ((70, 66), 32, 20, (0.4, 0.3, 0.3)),
        ((32, 64), 16, 10, (0.0, 1.0, 0.0)),
        ((32, 64), 16, 10, (0.5, 0.0, 0.5)),
    ],
)
def test_the_band_form_is_the_plain_one_in_another_order(shape, block, k, ratios, dtype):
    weight, tiers, layout = _pruned(shape, ratios, block, k)
    plain = pack(weight, tiers, dtype)
    bands = to_bands(plain, layout, "layer7")
    again = from_bands(bands, layout)
    assert set(again) == set(plain)
    assert all(torch.equal(again[part], plain[part]) and again[part].dtype == plain[part].dtype for part in plain)
    x = torch.randn(2, 3, shape[1])
    wanted = F.linear(x, unpack(plain, layout, torch.float32), torch.arange(float(shape[0])))
    torch.testing.assert_close(band_product(x, bands, layout, torch.arange(float(shape[0]))), wanted)


def test_the_order_is_the_documented_one():
    """Every kept weight is found where the module says, by a loop over the lists."""
    weight, tiers, layout = _pruned((48, 160), (0.3, 0.4, 0.3))
    parts = to_bands(pack(weight, tiers, torch.float32), layout, "layer7")
    found = torch.zeros_like(weight)
    d, m = parts["dense"].shape[1], parts["mid_index"].shape[1]
    for band, columns in enumerate(parts["columns"].tolist()):
        assert columns[:d] == sorted(columns[:d]) and columns[d : d + m] == sorted(columns[d : d + m])
        for n, column in enumerate(columns):
            block = found[16 * band : 16 * band + 16, 16 * column : 16 * column + 16]
            if n < d:
                block[:] = parts["dense"][band, n]
            elif n < d + m:
                for group in range(64):
                    half, byte = divmod(group, 32)
                    code = parts["mid_index"][band, n - d, byte].item() >> 4 * half
                    for plane, place in enumerate((code & 3, code >> 2 & 3)):
                        block[group // 4, 4 * (group % 4) + place] = parts["mid"][band, plane, n - d, group]
            else:
                places, values = (parts[part][band, n - d - m] for part in ("topk_index", "topk"))
                for place, value in zip(places.tolist(), values, strict=True):
                    block[place // 16, place % 16] = value
    assert torch.equal(found, weight)


def test_bytes_are_the_formula():
    weight, tiers, layout = _pruned((512, 512), (0.375, 0.4375, 0.1875))
    bits = {
        dtype: 8 * sum(t.nbytes for t in to_bands(pack(weight, tiers, dtype), layout, "m").values()) / weight.numel()
        for dtype in (torch.float16, torch.int8)
    }
    dense, mid, topk = (count / 1024 for count in tiers.counts())
    assert bits[torch.float16] == pytest.approx(16 * dense + 9 * mid + 0.9375 * topk + 16 / 256)
    scales = 16 * (16 * (dense + mid) + topk) / 256
    assert bits[torch.int8] == pytest.approx(8 * dense + 5 * mid + 0.625 * topk + scales + 16 / 256)
    for dtype, name in ((torch.float16, "float16"), (torch.int8, "int8")):
        assert bits[dtype] == pytest.approx(packed_bits(Ratios(dense, mid, topk), 16, 10, name, bands=True))


def test_bands_that_differ_are_refused_with_the_way_out():
    weight, tiers, layout = _pruned((64, 160), (0.3, 0.4, 0.3), scope="matrix")
    with pytest.raises(ValueError, match=r"layer7.*scope band"):
        to_bands(pack(weight, tiers, torch.float16), layout, "layer7")


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_a_model_in_bands_is_the_plain_packed_one_and_multiplies_band_by_band(dtype, tmp_path):
    model = tiny_llama()
    pruner = Pruner(model, block=8, k=6, scope="band")
    prune(model, pruner, Ratios(0.25, 0.5, 0.25), Magnitude())
    mask_weights(pruner.matrices, pruner.keep)
    for name, bands in (("plain", False), ("bands", True)):
        (tmp_path / name).mkdir()
        write_packed(tmp_path / name, model, model.state_dict(), pruner.tiers, dtype, bands)
    wanted, found = (load_packed(tmp_path / name) for name in ("plain", "bands"))
    assert all(torch.equal(a, b) for a, b in zip(wanted.parameters(), found.parameters(), strict=True))
    for name, tier_map, keep, _ in read_packed(tmp_path / "bands").tiers():
        assert torch.equal(tier_map, pruner.tiers[name].map_rc) and torch.equal(keep, pruner.tiers[name].keep_RC)
    packed = load_packed(tmp_path / "bands", expand=False)
    assert {m.product for m in packed.modules() if isinstance(m, PackedLinear)} == {band_product}
    with pytest.raises(ValueError, match="export_bands"):
        load_packed(tmp_path / "plain", expand=False, kernel=True)
    ids = batches(1)[0]["input_ids"]
    torch.testing.assert_close(packed(input_ids=ids).logits, wanted(input_ids=ids).logits)
