"""Folders with a packed model: written, read back as a plain model, or run from its packed bytes."""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.utils import GENERATION_CONFIG_NAME
from transformers.utils import logging as transformers_logging

from common.manifest import check_manifest
from lightning_modules.block_sparsity import tensor_file
from lightning_modules.block_sparsity.bands import band_product, check_bands, from_bands, to_bands
from lightning_modules.block_sparsity.lora import plain_state
from lightning_modules.block_sparsity.packing import (
    DTYPES,
    PARTS,
    Layout,
    block_product,
    check_parts,
    fitting,
    pack,
    unpack,
    unpack_keep,
)
from lightning_modules.block_sparsity.tiers import TierMap
from lightning_modules.loading import FORMATS

PACKED_FILE = "packed.safetensors"
_KIND = "packed tiers"
_BANDS = "columns"  # the part that only the band form has

Product = Callable[[Tensor, dict[str, Tensor], Layout, Tensor | None], Tensor]
"""x·Wᵀ + bias from packed tensors."""


class PackedLinear(nn.Module):
    """A linear layer that keeps only packed weights and expands them for each product.

    It saves memory, not arithmetic: every call writes the dense matrix once and forgets it; in the band form, some
    bands at a time. Its state is that of the ``nn.Linear`` that it stands for, so a model that is saved with packed
    layers is a plain, dense folder.

    Args:
        parts: See ``packing.pack`` and ``bands.to_bands``.
        layout: The matrix's sizes.
        bias: ``[R]`` or None.
        product: Another way to multiply.
        dtype: Type of the weight in the state.
    """

    def __init__(
        self,
        parts: Mapping[str, Tensor],
        layout: Layout,
        bias: Tensor | None,
        product: Product | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.layout = layout
        self.product = product or (band_product if _BANDS in parts else block_product)
        self.bias: Tensor | None
        self._names = list(parts)
        for name, tensor in parts.items():
            self.register_buffer(f"packed_{name.replace('.', '_')}", tensor, persistent=False)
        self.register_buffer("bias", bias)
        self._like: Tensor
        self.register_buffer("_like", torch.empty(0, dtype=dtype), persistent=False)  # follows what _apply does

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
            kept = moved if moved.dtype == tensor.dtype else tensor.to(moved.device)
            setattr(self, f"packed_{name.replace('.', '_')}", kept)
        self._like = fn(self._like)
        if self.bias is not None:
            self.bias = fn(self.bias)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        blocks = _in_blocks(self.parts, self.layout)
        destination[f"{prefix}weight"] = unpack(blocks, self.layout, self._like.dtype).contiguous()


def write_model(folder: Path, model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Write a plain Hugging Face folder, without adapters, with weights and configuration of a type.

    Raises:
        ValueError: A weight does not fit the type.
    """
    transformers_logging.disable_progress_bar()  # a bar for one file says nothing
    weights = plain_state(model)
    state = {name: fitting(name, w, dtype) if w.is_floating_point() else w for name, w in weights.items()}
    shell = from_state(model.config, state)
    shell.generation_config = model.generation_config
    shell.save_pretrained(folder)


def from_state(config: Any, state: Mapping[str, Tensor]) -> PreTrainedModel:
    """A plain model that has these very tensors for weights."""
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    _fill_buffers(model)
    return model


def write_packed(
    folder: Path,
    model: PreTrainedModel,
    state: Mapping[str, Tensor],
    tiers: Mapping[str, TierMap],
    dtype: str,
    bands: bool = False,
    iteration: int = 0,
) -> dict[str, float]:
    """Write configuration, generation settings and one packed file.

    Args:
        folder: A folder that is being written.
        model: The architecture; its configuration's dtype is what ``load_packed`` makes of it.
        state: Its weights, pruned ones zero.
        tiers: Tier maps of the pruned matrices.
        dtype: Type of all stored values: "float16", "bfloat16", "float32", or "int8" for the tiers' values (what is
            not pruned is then stored in the configuration's type where that has 16 bits, else in float16).
        bands: Write the band form.
        iteration: Of the schedule, the last that was made.

    Returns:
        ``packed_bytes``, ``packed_bits_per_weight`` and ``packed_ratio``, see ``common/records/schema.py``.

    Raises:
        ValueError: See ``packing.pack`` and ``bands.to_bands``.
    """
    tensors: dict[str, Tensor] = {}
    layouts = {}
    for name, matrix in tiers.items():
        layout = Layout(*matrix.shape, matrix.block, matrix.k)
        parts = pack(state[f"{name}.weight"], matrix, DTYPES[dtype])
        parts = to_bands(parts, layout, name) if bands else parts
        layouts[name] = vars(layout)
        tensors |= {f"{name}.{part}": t for part, t in parts.items()}
    bits = 8 * sum(t.nbytes for t in tensors.values()) / sum(matrix.keep_RC.numel() for matrix in tiers.values())
    other = DTYPES[dtype]
    if dtype == "int8":
        other = model.config.dtype if model.config.dtype in (torch.float16, torch.bfloat16) else torch.float16
    rest = {name: w for name, w in state.items() if name.removesuffix(".weight") not in tiers}
    if model.config.tie_word_embeddings:
        rest = {name: w for name, w in rest.items() if name not in (model._tied_weights_keys or ())}
    tensors |= {name: fitting(name, w, other) if w.is_floating_point() else w for name, w in rest.items()}
    about = {"dtype": dtype, "matrices": json.dumps(layouts), "iteration": str(iteration)}
    tensor_file.write(folder / PACKED_FILE, _KIND, tensors, about)
    model.config.save_pretrained(folder)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)
    size = (folder / PACKED_FILE).stat().st_size
    whole = 2 * sum(part.numel() for part in (*rest.values(), *(matrix.keep_RC for matrix in tiers.values())))
    return {"packed_bytes": size, "packed_bits_per_weight": bits, "packed_ratio": whole / size}


class Packed(NamedTuple):
    """What a packed folder holds, each part checked against the others.

    Attributes:
        folder: Where it was read.
        tensors: By name.
        layouts: By packed matrix.
        packed_as: Type of the tiers' values.
        iteration: Of the schedule, the last that was made; 0 where the file does not say.
    """

    folder: Path
    tensors: dict[str, Tensor]
    layouts: dict[str, Layout]
    packed_as: str
    iteration: int = 0

    def tiers(self) -> Iterator[tuple[str, Tensor, Tensor, Layout]]:
        """Name, tier map, mask and layout of every matrix."""
        for name, layout in self.layouts.items():
            yield name, *unpack_keep(_in_blocks(_parts(self.tensors, name), layout), layout), layout

    def types(self) -> tuple[torch.dtype, torch.dtype]:
        """Type of the tiers' values, and of what is not pruned."""
        others = [t.dtype for t in _rest(self.tensors, self.layouts).values() if t.is_floating_point()]
        return DTYPES[self.packed_as], others[0] if others else DTYPES[self.packed_as]

    def in_bands(self) -> bool:
        """Whether all matrices are in the band form."""
        return _has_bands(self.tensors, self.layouts)


def load_packed(
    folder: str | Path,
    dtype: torch.dtype | str = "auto",
    attention: str | None = None,
    expand: bool = True,
    kernel: bool = False,
) -> PreTrainedModel:
    """Load a packed model with one call.

    Args:
        folder: What ``export`` wrote.
        dtype: Type to compute in; "auto" is that of the model which was packed.
        attention: Attention kernel, as transformers names it; None takes transformers' choice.
        expand: Make plain dense layers; otherwise the weights stay packed in memory and are expanded layer by layer.
        kernel: Multiply layers that stay packed by a Triton kernel: for decoding on a CUDA device, in the band form.

    Raises:
        FileNotFoundError: There is no packed model.
        ValueError: A file is missing, cut short or altered, or does not fit the configuration beside it; or the kernel
            is asked for and the file is not in bands.
        ModuleNotFoundError: The kernel is asked for and triton is not installed.
    """
    check_manifest(folder)
    return build(read_packed(Path(folder)), dtype, attention, expand, kernel)


def build(
    packed: Packed, dtype: torch.dtype | str, attention: str | None = None, expand: bool = True, kernel: bool = False
) -> PreTrainedModel:
    """A model of what has been read. Arguments as for ``load_packed``."""
    folder, tensors, layouts, packed_as, _ = packed
    product = _kernel(folder, tensors, layouts) if kernel else None
    config = AutoConfig.from_pretrained(folder)
    dtype = _dtype(dtype, config, packed_as)
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    _check_fit(folder, model, tensors, layouts)
    state = {n: t.to(dtype) if t.is_floating_point() else t for n, t in _rest(tensors, layouts).items()}
    for name, layout in layouts.items():
        parts = _parts(tensors, name)
        if expand:
            state[f"{name}.weight"] = unpack(_in_blocks(parts, layout), layout, dtype).contiguous()
        else:
            parent, _, attribute = name.rpartition(".")
            bias = state.pop(f"{name}.bias", None)
            setattr(model.get_submodule(parent), attribute, PackedLinear(parts, layout, bias, product, dtype))
    model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    _fill_buffers(model)
    if (folder / GENERATION_CONFIG_NAME).is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model.eval()


def _load(folder: Path, dtype: torch.dtype | str, attention: str | None) -> PreTrainedModel:
    """``load_packed`` of a folder whose manifest has been checked."""
    return build(read_packed(folder), dtype, attention)


FORMATS[PACKED_FILE] = _load


def _dtype(asked: torch.dtype | str, config: Any, packed_as: str) -> torch.dtype:
    """The type to compute in; a configuration without one leaves it to the file."""
    if isinstance(asked, torch.dtype):
        return asked
    if asked != "auto":
        return DTYPES[asked]
    return config.dtype or (torch.float16 if packed_as == "int8" else DTYPES[packed_as])


def _check_fit(
    folder: Path, model: PreTrainedModel, tensors: Mapping[str, Tensor], layouts: Mapping[str, Layout]
) -> None:
    """Refuse weights that are not those of the model that config.json describes.

    Args:
        folder: For the message.
        model: On the meta device.
        tensors: All that the file holds.
        layouts: The packed matrices.

    Raises:
        ValueError: Naming what is missing, too much or of another shape.
    """
    rest = _rest(tensors, layouts)
    found = {name: tuple(tensor.shape) for name, tensor in rest.items()}
    found |= {f"{name}.weight": (layout.rows, layout.columns) for name, layout in layouts.items()}
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    tied = set(model.all_tied_weights_keys or ()) if model.config.tie_word_embeddings else set()
    for name in sorted(set(wanted) - tied | set(found)):
        if wanted.get(name) != found.get(name):
            raise ValueError(
                f"{folder}: {PACKED_FILE} does not fit config.json: {name} is {_shape(found.get(name))} in the file, "
                f"{_shape(wanted.get(name))} by the configuration; one of the two is another model's"
            )


def _shape(shape: tuple[int, ...] | None) -> str:
    return "missing" if shape is None else "×".join(map(str, shape))


def read_packed(folder: Path) -> Packed:
    """Read a packed model's file, once for all that is made of it.

    Raises:
        ValueError: It is damaged; the message names the matrix.
    """
    path = folder / PACKED_FILE
    tensors, about = tensor_file.read(path, _KIND, ("matrices", "dtype"))
    dtype, matrix = about["dtype"], "the list of matrices"
    layouts = {}
    try:
        for matrix, sizes in json.loads(about["matrices"]).items():
            layouts[matrix] = layout = Layout(**sizes)
            parts = _parts(tensors, matrix)
            check = check_bands if _BANDS in parts else check_parts
            check(parts, layout, DTYPES[dtype])
        iteration = int(about.get("iteration", "0"))
    except (ValueError, TypeError, AttributeError, KeyError) as error:  # a wrong list of sizes raises any of these
        raise ValueError(f"{path}: damaged, {matrix}: {error}; write or fetch it again") from error
    return Packed(folder, tensors, layouts, dtype, iteration)


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
