"""Save a Hub dataset as one JSON array of ``{"id", "title", "text"}`` records, to train on without a network.

    python -m lightning_modules.data.export_hub --dataset wikimedia/wikipedia --config 20231101.en \
        --output wikipedia_en.json --max_mb 500
"""

import json
import sys
from contextlib import closing
from pathlib import Path

from jsonargparse import auto_cli

from common.files import check_output, replacing_file
from common.progress import stage
from lightning_modules.data.hub import hub_rows
from lightning_modules.data.readers import document_text

_FIELDS = ("id", "title", "text")


def export(
    dataset: str,
    output: Path,
    config: str | None = None,
    split: str = "train",
    max_mb: float = 500.0,
    overwrite: bool = False,
) -> int:
    """Save a Hub dataset as one JSON array, to train on it where there is no network.

    The file appears only when it is complete.

    Args:
        dataset: Name of the dataset, e.g. wikimedia/wikipedia.
        output: File to write.
        config: Configuration of the dataset, e.g. 20231101.en.
        split: Split of the dataset.
        max_mb: Stop after this many megabytes (1,000,000 bytes).
        overwrite: Replace a file that is there.

    Returns:
        Number of records written.

    Raises:
        FileNotFoundError: the dataset, or the folder to write to, is not there, or the Hub cannot be reached.
        ValueError: ``max_mb`` is not positive, the file exists, or the dataset has no text.
    """
    if max_mb <= 0:
        raise ValueError(f"max_mb must be positive, got {max_mb}")
    if not output.parent.is_dir():
        raise FileNotFoundError(f"output: no such folder: {output.parent}")
    check_output(output, "output", overwrite=overwrite)
    limit, size, records = int(max_mb * 1e6), 0, 0
    with replacing_file(output) as partial:
        with (
            partial.open("w", encoding="utf-8") as file,
            stage(f"Exporting {dataset}", limit, "bytes") as done,
            closing(hub_rows(dataset, config, split)) as rows,
        ):
            for row in rows:
                document_text(row, f"{dataset}, row {records + 1}")
                line = json.dumps({field: row[field] for field in _FIELDS if field in row}, ensure_ascii=False)
                size += len(line.encode("utf-8")) + 2
                if size > limit and records:
                    break
                file.write(("[\n" if records == 0 else ",\n") + line)
                records += 1
                done(size)
            file.write("\n]\n")
        if records == 0:
            raise ValueError(f"{dataset}: the split '{split}' has no rows")
    return records


def main() -> None:
    """Run ``export`` from the command line; what goes wrong is one line and a non-zero exit status."""
    try:
        records = auto_cli(export, as_positional=False)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    print(f"{records:,} records")


if __name__ == "__main__":
    main()
