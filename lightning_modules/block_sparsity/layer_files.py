"""Layers that an interrupted pruning has finished, so that the next run goes on after them."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_only
from torch import Tensor

from common.files import replacing_file
from lightning_modules.block_sparsity import tensor_file

_KIND, _KEY, _CONTENT = "pruned layer", "key", "content"


class LayerFiles:
    """One file a layer, taken again only where everything that led to it is the same.

    Args:
        folder: Where they lie; None keeps none.
        about: What the result depends on besides the weights: JSON-able.
        given: Tensors that it depends on: calibration text, and what is not pruned.
    """

    def __init__(self, folder: Path | None, about: Any = None, given: Iterable[Tensor] = ()) -> None:
        self.folder = folder
        self._digest = hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode())
        if folder is not None:
            _count(self._digest, given)
        self._number = 0

    def next(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
        """The next layer's result, if an earlier run has got that far with the same.

        Args:
            tensors: The layer's weights and masks as they are before.
        """
        self._number += 1
        if self.folder is None:
            return None
        _count(self._digest, (tensor for _, tensor in sorted(tensors.items())))
        with suppress(OSError, ValueError):  # none, or one that is damaged: made again
            found, about = tensor_file.read(self._path(), _KIND, (_KEY, _CONTENT))
            if about[_KEY] == self._digest.hexdigest() and about[_CONTENT] == _content(found):
                return found
        return None

    def write(self, tensors: Mapping[str, Tensor]) -> None:
        """Keep the result of the layer that was asked for last; one of several ranks writes."""
        if self.folder is None or getattr(rank_zero_only, "rank", None):
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        with replacing_file(self._path()) as path:
            tensor_file.write(path, _KIND, tensors, {_KEY: self._digest.hexdigest(), _CONTENT: _content(tensors)})

    def _path(self) -> Path:
        assert self.folder is not None
        return self.folder / f"{self._number}.layer"


def _count(digest: Any, tensors: Iterable[Tensor]) -> None:
    for tensor in tensors:
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)


def _content(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256("\n".join(sorted(tensors)).encode())
    _count(digest, (tensor for _, tensor in sorted(tensors.items())))
    return digest.hexdigest()


def layer_folder(output: Path) -> Path:
    """Where the finished layers of a result lie until it is written."""
    return output.with_name(f".{output.name}.layers")


def remove_layers(folder: Path) -> None:
    """Remove what ``LayerFiles`` wrote into a folder, and the folder with it where nothing else is in it."""
    for path in folder.glob("*.layer"):
        path.unlink(missing_ok=True)
    with suppress(OSError):
        folder.rmdir()
