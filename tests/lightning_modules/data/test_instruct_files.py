"""Instruction data on published files."""

import json

import pytest

from lightning_modules.data.instruct import InstructData
from tests.conftest import ROOT

SHARED = ROOT.parent / "shared"


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the shared instruction data")
@pytest.mark.parametrize("name", ["gsm8k_train.jsonl", "alpaca_style_roleplay.json"])
def test_every_record_becomes_a_sample_with_a_prompt_and_a_response(tmp_path, name):
    source, file = SHARED / "data/instruct" / name, tmp_path / name
    if name.endswith(".jsonl"):
        file.write_text("".join(source.read_text().splitlines(keepends=True)[:300]))
    else:
        file.write_text(json.dumps(json.loads(source.read_text())[:300]))
    data = InstructData(str(file), str(SHARED / "models/llama-gqa-8m"), cache_dir=str(tmp_path), max_val_samples=5)
    data.prepare_data()
    data.setup("fit")
    assert data.name == name and len(data.val) == 5
    counts = data.describe()["prepared"].values()
    assert sum(n.get(k, 0) for n in counts for k in ("samples", "repeated", "without_response")) == 300
    for row in data.train:
        assert "### Response:" in data.tokenizer.decode(row["input_ids"][: row["prompt"]])
        assert row["length"] > row["prompt"]
