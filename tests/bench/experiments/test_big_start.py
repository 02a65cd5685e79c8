"""Memory of a start: what could not be measured has no verdict, and a whole start may fail."""

from types import SimpleNamespace

import pytest

from bench.experiments import big_start
from common.records import record


@pytest.mark.parametrize(("peak", "reached"), [(None, None), (19e3, True), (21e3, False)])
def test_memory_is_judged_where_it_was_measured(peak, reached, tmp_path, monkeypatch):
    def run(command, *given, **named):
        failed = command[-1] == "whole"
        return SimpleNamespace(returncode=failed, peak_memory_mb=peak, wall_s=1.0, memory_kind="PSS", output="")

    monkeypatch.setattr(big_start, "run_measured", run)
    big_start.run(tmp_path / "records.jsonl", tmp_path)
    sharded, whole = record.read(tmp_path / "records.jsonl")[0]
    assert (sharded["reached"], whole["reached"]) == (reached, None) and "(failed)" in whole["what"]
