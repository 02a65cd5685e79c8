"""Saliency on disk: a folder of safetensors parts and one JSON file that says what they are.

Every part appears whole (written beside, then renamed), so a killed collection goes on with the samples that no part
holds. ``saliency.json`` is written first, with what the values depend on, and completed last, with the counts; then
the folder gets its manifest, which reading it checks. The manifest names the index and the parts alone: what else lies
in the folder is not Pare's.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from common.files import replacing_file
from common.manifest import MARKER, check_manifest, hashes, write_manifest
from lightning_modules.token_pruning.identity import identity_differences

INDEX = "saliency.json"
_FORMAT = "pare-saliency"


class SaliencyStore:
    """Writes the values of one rank, a part at a time.

    Args:
        folder: Shared by all ranks.
        depends: What the values depend on (target, layers, tokenizer, base model), JSON-able.
        rank: This rank; part of its files' names.

    Raises:
        ValueError: the folder holds saliency that depends on something else, or no saliency, naming it.
    """

    samples_per_part = 64
    """A killed run loses fewer samples than this per rank."""

    def __init__(self, folder: Path, depends: dict[str, Any], rank: int) -> None:
        self.folder, self.rank = folder, rank
        self._pending: list[tuple[str, dict[int, Tensor]]] = []
        check_folder(folder, depends)
        self.done = {key for part in _parts(folder) for key in _keys(part)}
        self._depends = depends

    def begin(self) -> None:
        """Write the index, on the first rank, before any part."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_manifest(self.folder, "saliency", None)
        _write(self.folder / INDEX, _json({"format": _FORMAT, **self._depends, "samples": None}))

    def add(self, key: str, values: dict[int, Tensor]) -> None:
        """Keep the values of one sample (float32 [its prompt's tokens] by layer); writes when a part is full."""
        self.done.add(key)
        self._pending.append((key, {layer: value.cpu() for layer, value in values.items()}))
        if len(self._pending) >= self.samples_per_part:
            self.flush()

    def flush(self) -> None:
        """Write what is pending."""
        if not self._pending:
            return
        keys, rows = zip(*self._pending, strict=True)
        tensors = {str(layer): torch.cat([row[layer] for row in rows]) for layer in rows[0]}
        tensors["lengths"] = torch.tensor([len(next(iter(row.values()))) for row in rows])
        # named by content: no rank of this or an earlier run can have a part of the same name with other samples
        _write(self.folder / f"rank{self.rank}-{keys[0]}.safetensors", save(tensors, {"keys": json.dumps(keys)}))
        self._pending.clear()

    def finish(self, skipped: dict[str, int]) -> int:
        """Complete the index once all ranks have flushed, on the first rank.

        Returns:
            Samples stored, by all ranks and runs together.
        """
        samples = len({key for part in _parts(self.folder) for key in _keys(part)})
        index = {"format": _FORMAT, **self._depends, "samples": samples, "skipped": skipped}
        _write(self.folder / INDEX, _json(index))
        mine = [INDEX, *(part.name for part in _parts(self.folder))]
        write_manifest(self.folder, "saliency", hashes(self.folder, mine))
        return samples


class Saliency:
    """Collected saliency, read back.

    Args:
        folder: What ``predict`` wrote.
        expect: Values that must be equal to those it depends on (``tokenizer``, ``layers``, …).

    Raises:
        FileNotFoundError: no such folder.
        ValueError: an unfinished collection, a part that is cut short or missing, or other values than ``expect``.
    """

    def __init__(self, folder: str | Path, expect: dict[str, Any]) -> None:
        folder = Path(folder).expanduser()
        check_saliency(folder, expect)
        self.index = _index(folder)
        if self.index["samples"] is not None:
            check_manifest(folder)
        self._values: dict[str, dict[int, Tensor]] = {}
        for part in _parts(folder):
            self._values |= dict(_read(part))
        if self.index["samples"] is None:
            raise ValueError(f"{folder}: collecting was interrupted after {len(self)} samples; run predict again")
        if self.index["samples"] != len(self):
            raise ValueError(f"{folder} holds {len(self)} samples of {self.index['samples']}: files are missing")
        if not self._values:
            raise ValueError(f"{folder} holds no samples; its index says why: {self.index['skipped']}")

    def __len__(self) -> int:
        return len(self._values)

    def get(self, key: str) -> dict[int, Tensor] | None:
        """Values of a sample, float32 [its prompt's tokens] by layer; None where it was not collected."""
        return self._values.get(key)


def check_folder(folder: Path, depends: dict[str, Any]) -> None:
    """Refuse a folder to collect in that holds anything but saliency, or saliency that depends on other values.

    A run that was killed before it wrote the index leaves at most the marker and files whose names begin with a dot.
    """
    if (folder / INDEX).is_file():
        refuse_differences(folder, depends, "set another folder, or delete this one")
    elif folder.is_dir():
        found = min(
            (path.name for path in folder.iterdir() if path.name != MARKER and path.name[0] != "."), default=None
        )
        if found is not None:
            raise ValueError(f"{folder} holds {found} but no {INDEX}: give another folder for the saliency")
    elif os.path.lexists(folder):
        raise ValueError(f"{folder} is no folder: give another place for the saliency")


def check_saliency(folder: Path, expect: dict[str, Any]) -> None:
    """Refuse saliency that is not there or depends on other values; what was collected is not read."""
    if not (folder / INDEX).is_file():
        raise FileNotFoundError(f"no {INDEX} in {folder}: collect saliency first (configs/token_pruning/saliency.yaml)")
    refuse_differences(folder, expect, "collect it again for these (configs/token_pruning/saliency.yaml)")


def _parts(folder: Path) -> list[Path]:
    return sorted(folder.glob("rank*.safetensors"))


def _keys(part: Path) -> list[str]:
    try:
        with safe_open(part, "pt") as file:
            return json.loads(file.metadata()["keys"])
    except (OSError, SafetensorError, KeyError, TypeError) as error:
        raise ValueError(f"{part} is cut short or is no saliency ({error}): delete it and run predict again") from error


def _read(part: Path) -> Iterator[tuple[str, dict[int, Tensor]]]:
    keys = _keys(part)
    with safe_open(part, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    lengths = tensors.pop("lengths").tolist()
    rows = {int(layer): values.split(lengths) for layer, values in tensors.items()}
    for i, key in enumerate(keys):
        yield key, {layer: values[i] for layer, values in rows.items()}


def _index(folder: Path) -> dict[str, Any]:
    try:
        index = json.loads((folder / INDEX).read_text())
    except ValueError as error:
        raise ValueError(f"{folder / INDEX} is no JSON ({error}): delete the folder and run predict again") from error
    if index.get("format") != _FORMAT:
        raise ValueError(f"{folder / INDEX} is not the index of saliency: give the folder that predict wrote")
    return index


def refuse_differences(folder: Path, expected: dict[str, Any], remedy: str) -> None:
    """Refuse collected saliency that depends on other values than these.

    Raises:
        ValueError: naming the first difference and the remedy.
    """
    index = _index(folder)
    for name, value in expected.items():
        if name == "base" and name in index:  # up to rounding: to collect in another precision is no other model
            others = identity_differences(index[name], value)
            if others:
                raise ValueError(f"{folder} was collected with another base than this run's ({others[0]}); {remedy}")
        elif index.get(name) != value:
            then, now = (_short(v) for v in (index.get(name), value))
            raise ValueError(f"{folder} was collected with another {name} ({then}) than this run's ({now}); {remedy}")


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "…"


def _json(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


def _write(path: Path, content: bytes) -> None:
    with replacing_file(path) as beside:
        beside.write_bytes(content)
