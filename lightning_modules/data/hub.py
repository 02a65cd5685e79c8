"""Stream datasets of the Hugging Face Hub. Contacted only for a dataset that the user names."""

from collections.abc import Generator
from typing import Any

from datasets import disable_progress_bars, load_dataset
from datasets.exceptions import DatasetNotFoundError


def hub_rows(name: str, config: str | None, split: str) -> Generator[dict[str, Any]]:
    """Rows of a Hub dataset as they arrive, without a copy of the dataset on this machine.

    Args:
        name: Dataset, e.g. ``wikimedia/wikipedia``.
        config: Its configuration, e.g. ``20231101.en``, or None where it has only one.
        split: Its split, e.g. ``train``.

    Raises:
        FileNotFoundError: no such dataset, or the Hub cannot be reached.
        ValueError: no such configuration or split.
    """
    what = f"Hub dataset '{name}' (config {config}, split {split})"
    disable_progress_bars()  # ours are shown instead
    try:
        yield from load_dataset(name, config, split=split, streaming=True)
    except DatasetNotFoundError as error:
        raise FileNotFoundError(f"{what}: no such file or folder here, and no such dataset on the Hub") from error
    except ConnectionError as error:
        raise FileNotFoundError(
            f"{what}: the Hub cannot be reached ({error}). Offline, give a file or folder instead; on a machine with a "
            "connection, python -m lightning_modules.data.export_hub makes a file of a Hub dataset"
        ) from error
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from error
