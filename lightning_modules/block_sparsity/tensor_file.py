"""safetensors files that say what they are.

Damage is noticed by the manifest of the folder that they lie in (``common.manifest.check_manifest``).
"""

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

_KIND = "pare"


def write(path: Path, kind: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a file into a folder that is being written (``common.files.replacing``).

    Args:
        path: Destination.
        kind: What the file is; ``read`` asks for the same.
        tensors: On the CPU or not; stored contiguous.
        metadata: Anything else.
    """
    stored = {name: tensor.detach().cpu().contiguous() for name, tensor in sorted(tensors.items())}
    save_file(stored, path, {**metadata, _KIND: kind})


def read(path: Path, kind: str, wanted: tuple[str, ...]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a file that ``write`` wrote.

    Args:
        path: The file.
        kind: What it must be.
        wanted: Metadata that it must have.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is cut short, of another kind, or lacks metadata.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    try:
        with safe_open(path, "pt") as file:
            metadata = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dictionary
    except SafetensorError as error:
        raise ValueError(f"{path}: cut short or no safetensors file ({error}); write or fetch it again") from error
    if metadata.get(_KIND) != kind:
        raise ValueError(f"{path}: expected a file of kind {kind!r}, this is {metadata.get(_KIND) or 'another file'!r}")
    missing = [name for name in wanted if name not in metadata]
    if missing:
        raise ValueError(f"{path}: damaged, {missing[0]} is missing; write or fetch it again")
    return tensors, metadata
