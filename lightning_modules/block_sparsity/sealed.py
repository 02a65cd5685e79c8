"""safetensors files that say what they are and notice any change, by a hash over all tensors and metadata."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from common.files import replacing_file

_KIND, _HASH = "pare", "sha256"


def write(path: Path, kind: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors to a file that is there completely or not at all.

    Args:
        path: Destination.
        kind: What the file is; ``read`` asks for the same.
        tensors: On the CPU or not; stored contiguous.
        metadata: Anything else.
    """
    stored = {name: tensor.detach().cpu().contiguous() for name, tensor in sorted(tensors.items())}
    described = {**metadata, _KIND: kind}
    with replacing_file(path) as beside:
        save_file(stored, beside, {**described, _HASH: _digest(stored, described)})


def read(path: Path, kind: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a file that ``write`` wrote.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is cut short, of another kind, or not what was written.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    try:
        with safe_open(path, "pt") as file:
            metadata = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dictionary
    except SafetensorError as error:
        raise ValueError(f"{path}: cut short or no safetensors file ({error}); write or fetch it again") from error
    expected = metadata.pop(_HASH, "")
    if metadata.get(_KIND) != kind:
        raise ValueError(f"{path}: expected a file of kind {kind!r}, this is {metadata.get(_KIND) or 'another file'!r}")
    if _digest(tensors, metadata) != expected:
        raise ValueError(f"{path}: the contents do not match their hash: altered or damaged; write or fetch it again")
    return tensors, metadata


def _digest(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    found = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        found.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        found.update(tensor.flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()
