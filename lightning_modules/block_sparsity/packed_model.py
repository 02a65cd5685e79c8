"""Folders with a packed model: written, read back as a plain model, or run from its packed bytes."""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from lightning_modules.block_sparsity import sealed
from lightning_modules.block_sparsity.bands import band_product, from_bands, to_bands
from lightning_modules.block_sparsity.packing import PARTS, Layout, block_product, pack, unpack, unpack_keep
from lightning_modules.block_sparsity.tiers import TierMap
from lightning_modules.loading import FORMATS

PACKED_FILE = "packed.safetensors"
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32, "int8": torch.int8}
_KIND = "packed tiers"
_BANDS = "columns"  # the part that only the band form has

Product = Callable[[Tensor, dict[str, Tensor], Layout, Tensor | None], Tensor]
"""x·Wᵀ + bias from packed tensors."""


class PackedLinear(nn.Module):
    """A linear layer that keeps only packed weights and expands them for each product.

    It saves memory, not arithmetic: every call writes the dense matrix once and forgets it; in the band form, some
    bands at a time.

    Args:
        parts: See ``packing.pack`` and ``bands.to_bands``.
        layout: The matrix's sizes.
        bias: ``[R]`` or None.
        product: Another way to multiply.
    """

    def __init__(
        self, parts: Mapping[str, Tensor], layout: Layout, bias: Tensor | None, product: Product | None = None
    ) -> None:
        super().__init__()
        self.layout = layout
        self.product = product or (band_product if _BANDS in parts else block_product)
        self.bias: Tensor | None
        self._names = list(parts)
        for name, tensor in parts.items():
            self.register_buffer(f"packed_{name.replace('.', '_')}", tensor)
        self.register_buffer("bias", bias)

    @property
    def parts(self) -> dict[str, Tensor]:
        """The packed tensors by name."""
        return {name: getattr(self, f"packed_{name.replace('.', '_')}") for name in self._names}

    def forward(self, x: Tensor) -> Tensor:
        """x·Wᵀ + bias, ``[…, C]`` to ``[…, R]``, in the type of ``x``."""
        return self.product(x, self.parts, self.layout, self.bias)

    def _apply(self, fn: Any, recurse: bool = True) -> "PackedLinear":
        """Move, but never change types: a cast of int8 codes or of indices to floats would be wrong or larger."""
        for name, tensor in self.parts.items():
            moved = fn(tensor)
            setattr(self, f"packed_{name.replace('.', '_')}", moved if moved.dtype == tensor.dtype else tensor)
        if self.bias is not None:
            self.bias = fn(self.bias)
        return self


def write_packed(
    folder: Path,
    model: PreTrainedModel,
    state: Mapping[str, Tensor],
    tiers: Mapping[str, TierMap],
    dtype: str,
    bands: bool = False,
) -> dict[str, float]:
    """Write configuration and one packed file.

    Args:
        folder: An existing folder.
        model: The architecture.
        state: Its weights, pruned ones zero.
        tiers: Tier maps of the pruned matrices.
        dtype: Type of all stored values: "float16", "bfloat16", "float32", or "int8" for the tiers' values (what is
            not pruned then stays float16).
        bands: Write the band form.

    Returns:
        ``packed_bytes`` of the file, ``packed_bits_per_weight`` of the pruned matrices, and ``packed_ratio``: the file
        with all weights dense in 16 bits, over this one.

    Raises:
        ValueError: See ``packing.pack`` and ``bands.to_bands``.
    """
    tensors: dict[str, Tensor] = {}
    layouts = {}
    for name, matrix in tiers.items():
        layout = Layout(*matrix.shape, matrix.block, matrix.k)
        parts = pack(state[f"{name}.weight"], matrix, DTYPES[dtype])
        parts = to_bands(parts, layout, name) if bands else parts
        layouts[name], tensors = vars(layout), tensors | {f"{name}.{part}": t for part, t in parts.items()}
    bits = 8 * sum(t.nbytes for t in tensors.values()) / sum(matrix.keep_RC.numel() for matrix in tiers.values())
    other = DTYPES["float16" if dtype == "int8" else dtype]
    rest = {name: w for name, w in state.items() if name.removesuffix(".weight") not in tiers}
    if model.config.tie_word_embeddings:
        rest = {name: w for name, w in rest.items() if name not in (model._tied_weights_keys or ())}
    tensors |= {name: w.to(other) if w.is_floating_point() else w for name, w in rest.items()}
    sealed.write(folder / PACKED_FILE, _KIND, tensors, {"dtype": dtype, "matrices": json.dumps(layouts)})
    model.config.save_pretrained(folder)
    size = (folder / PACKED_FILE).stat().st_size
    whole = sum(p.numel() for p in model.parameters()) * 2
    return {"packed_bytes": size, "packed_bits_per_weight": bits, "packed_ratio": whole / size}


def load_packed(
    folder: str | Path,
    dtype: torch.dtype | str = torch.float32,
    attention: str | None = None,
    expand: bool = True,
    kernel: bool = False,
) -> PreTrainedModel:
    """Load a packed model with one call.

    Args:
        folder: What ``export`` wrote.
        dtype: Type to compute in; "auto" is that of the weights which are not packed.
        attention: Attention kernel, as transformers names it; None takes transformers' choice.
        expand: Make plain dense layers; otherwise the weights stay packed in memory and are expanded layer by layer.
        kernel: Multiply layers that stay packed by a Triton kernel: for decoding on a CUDA device, in the band form.

    Raises:
        FileNotFoundError: There is no packed model.
        ValueError: The file is cut short, altered, or does not fit the configuration beside it; or the kernel is asked
            for and the file is not in bands.
        ModuleNotFoundError: The kernel is asked for and triton is not installed.
    """
    folder = Path(folder)
    tensors, layouts, packed_as = _read(folder)
    dtype = _computing_dtype(dtype, packed_as)
    product = _kernel(folder, tensors, layouts) if kernel else None
    with torch.device("meta"):
        config = AutoConfig.from_pretrained(folder)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    state = {n: t.to(dtype) if t.is_floating_point() else t for n, t in _rest(tensors, layouts).items()}
    for name, layout in layouts.items():
        parts = _parts(tensors, name)
        if expand:
            state[f"{name}.weight"] = unpack(_in_blocks(parts, layout), layout, dtype).contiguous()
        else:
            parent, _, attribute = name.rpartition(".")
            bias = state.pop(f"{name}.bias", None)
            setattr(model.get_submodule(parent), attribute, PackedLinear(parts, layout, bias, product))
    _, unexpected = model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    missing = [name for name, p in model.named_parameters() if p.is_meta]
    if missing or unexpected:
        raise ValueError(f"{folder}: weights do not fit config.json: missing {missing}, unexpected {unexpected}")
    _fill_buffers(model)
    return model.eval()


FORMATS[PACKED_FILE] = load_packed


def _computing_dtype(asked: torch.dtype | str, packed_as: str) -> torch.dtype:
    """The type to compute in; int8 values come with float16 weights around them."""
    if isinstance(asked, torch.dtype):
        return asked
    name = packed_as if asked == "auto" else asked
    return torch.float16 if name == "int8" else DTYPES[name]


def read_tiers(folder: Path) -> Iterator[tuple[str, Tensor, Tensor, Layout]]:
    """Name, tier map, mask and layout of every matrix of a packed model."""
    tensors, layouts, _ = _read(folder)
    for name, layout in layouts.items():
        yield name, *unpack_keep(_in_blocks(_parts(tensors, name), layout), layout), layout


def packed_dtype(folder: Path) -> torch.dtype:
    """Type of the tiers' values in a packed model."""
    return DTYPES[_read(folder)[2]]


def is_banded(folder: Path) -> bool:
    """Whether a packed model is in the band form."""
    tensors, layouts, _ = _read(folder)
    return _has_bands(tensors, layouts)


def _read(folder: Path) -> tuple[dict[str, Tensor], dict[str, Layout], str]:
    tensors, about = sealed.read(folder / PACKED_FILE, _KIND)
    layouts = {name: Layout(**sizes) for name, sizes in json.loads(about["matrices"]).items()}
    return tensors, layouts, about["dtype"]


def _parts(tensors: Mapping[str, Tensor], matrix: str) -> dict[str, Tensor]:
    known = {*PARTS, _BANDS, *(f"{part}.scale" for part in PARTS)}
    return {part: tensors[f"{matrix}.{part}"] for part in known if f"{matrix}.{part}" in tensors}


def _has_bands(tensors: Mapping[str, Tensor], layouts: Mapping[str, Layout]) -> bool:
    return all(f"{name}.{_BANDS}" in tensors for name in layouts)


def _kernel(folder: Path, tensors: Mapping[str, Tensor], layouts: Mapping[str, Layout]) -> Product:
    if not _has_bands(tensors, layouts):
        raise ValueError(f"{folder} is not in bands, which the kernel reads: export it with model.export_bands true")
    from lightning_modules.block_sparsity.triton_bands import kernel_product

    return kernel_product


def _in_blocks(parts: dict[str, Tensor], layout: Layout) -> dict[str, Tensor]:
    return from_bands(parts, layout) if _BANDS in parts else parts


def _rest(tensors: Mapping[str, Tensor], layouts: Mapping[str, Layout]) -> dict[str, Tensor]:
    packed = {f"{matrix}.{part}" for matrix in layouts for part in _parts(tensors, matrix)}
    return {name: tensor for name, tensor in tensors.items() if name not in packed}


def _fill_buffers(model: PreTrainedModel) -> None:
    """Buffers that no file holds, such as rotary frequencies, were made on the meta device: compute them again."""
    for module in model.modules():
        if any(buffer.is_meta for buffer in module.buffers(recurse=False)):
            fresh = type(module)(model.config)
            for name, buffer in fresh.named_buffers(recurse=False):
                setattr(module, name, buffer)
