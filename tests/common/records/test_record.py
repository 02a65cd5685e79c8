import json
import math
import platform
import resource
import subprocess
import sys

import numpy as np
import pytest
import torch

from common.records import machine, record, schema
from tests.ranks import FORKED

RUN = {
    "run_name": "a",
    "world_size": 2,
    "model": "gpt2",
    "dataset": "wiki.json",
    "max_length": 128,
    "batch_size": 4,
    "compress_method": "none",
    "compress_config": {},
    "seed": 1,
    "step_time_ms_mean": 10.5,
    "step_time_ms_p50": 10,
    "step_time_ms_p90": 12.0,
    "tokens_per_s": 1e4,
    "comm_time_ms_total": None,
    "comm_ratio": None,
    "comm_time_ms_by_op": None,
    "bytes_raw_total": 1000,
    "bytes_compressed_total": 1000,
    "compression_ratio": 1.0,
    "train_loss": 3.0,
    "val_loss": None,
    "val_ppl": None,
}


def test_validate_accepts_a_complete_record_with_nulls():
    record.validate(RUN)
    assert set(schema.REQUIRED) == set(RUN)


def test_validate_names_everything_that_is_wrong():
    broken = {**RUN, "world_size": True, "tokens_per_s": "fast", "model": None, "residual_norm": [1]}
    del broken["val_ppl"], broken["seed"]
    with pytest.raises(ValueError) as error:
        record.validate(broken)
    for name in ("val_ppl", "seed", "world_size", "tokens_per_s", "model", "residual_norm"):
        assert name in str(error.value)
    assert "train_loss" not in str(error.value)


def test_every_field_explains_itself():
    for name, field in {**schema.REQUIRED, **schema.OPTIONAL}.items():
        assert field.meaning, name
        assert field.type in ("str", "int", "number", "bool", "list", "object", "any"), name
    assert not set(schema.REQUIRED) & set(schema.OPTIONAL)


def test_round_trip_keeps_values_and_writes_strict_json(tmp_path):
    path = tmp_path / "new" / "results.jsonl"
    stored = {**RUN, "run_name": "NaN", "train_loss": math.nan, "val_ppl": math.inf, "x": [-math.inf, np.float32(0.5)]}
    record.validate(stored)
    record.append(path, stored)
    record.append(path, RUN)

    def refuse(constant):
        raise AssertionError(constant)

    for line in path.read_text().splitlines():
        json.loads(line, parse_constant=refuse)
    (first, second), skipped = record.read(path)
    assert skipped == []
    assert second == RUN
    assert math.isnan(first["train_loss"]) and first["val_ppl"] == math.inf and first["x"] == [-math.inf, 0.5]
    assert first["run_name"] == "NaN"


def test_values_json_cannot_hold_are_refused_before_anything_is_written(tmp_path):
    path = tmp_path / "results.jsonl"
    with pytest.raises(TypeError, match="Tensor"):
        record.append(path, {"x": torch.ones(2)})
    assert not path.exists()


def test_torn_last_line_does_not_swallow_the_next_record(tmp_path):
    path = tmp_path / "results.jsonl"
    record.append(path, {"n": 1})
    whole = path.read_bytes()
    torn = whole + b'{"n": 2, "text": "\xc3'
    path.write_bytes(torn)
    record.append(path, {"n": 3})
    assert path.read_bytes().startswith(torn)
    assert record.read(path) == ([{"n": 1}, {"n": 3}], [2])


def test_reader_skips_and_counts_lines_that_are_not_records(tmp_path):
    path = tmp_path / "results.jsonl"
    path.write_text('{"n": NaN}\n\n[1]\n{"n": 1}\n{"n": 2}')
    assert record.read(path) == ([{"n": 1}, {"n": 2}], [1, 3])
    with pytest.raises(FileNotFoundError):
        record.read(tmp_path / "absent.jsonl")


def test_a_flipped_bit_anywhere_in_a_line_is_noticed(tmp_path):
    path = tmp_path / "results.jsonl"
    path.write_text('{"n": 0, "from": "before lines had digests"}\n')
    record.append(path, {"n": 1, "ppl": 23.5, "text": "größer"})
    record.append(path, {"n": 2, "digest": "of its own"})
    whole = path.read_bytes()
    first = whole.index(b"\n") + 1
    second = whole.index(b"\n", first) + 1
    for place in range(second, len(whole) - 1):
        for bit in range(8):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1 :])
            records, broken = record.read(path)
            assert [one["n"] for one in records] == [0, 1] and broken[0] == 3
    path.write_bytes(whole.replace(b"23.5", b"22.5"))
    records, broken = record.read(path)
    assert [one["n"] for one in records] == [0, 2] and broken == [2]
    assert record.passed_over(path, broken) == "results.jsonl: 1 broken line(s) skipped (torn, damaged or edited): 2"


def test_a_flipped_bit_in_the_only_record_is_noticed_even_in_its_digests_name(tmp_path):
    path = tmp_path / "results.jsonl"
    record.append(path, {"n": 1, "text": "größer"})
    whole = path.read_bytes()
    for place in range(len(whole) - 1):
        for bit in range(8):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1 :])
            assert record.read(path) == ([], [1])


def test_a_line_without_a_digest_after_one_with_is_not_believed(tmp_path):
    path = tmp_path / "results.jsonl"
    record.append(path, {"n": 1})
    with open(path, "a") as file:
        file.write('{"n": 2}\n')
    assert record.read(path) == ([{"n": 1}], [2])


def _append_many(path, writer):
    for n in range(25):
        record.append(path, {"writer": writer, "n": n, "padding": "x" * 5000})


def test_concurrent_writers_lose_and_mix_nothing(tmp_path):
    path = tmp_path / "results.jsonl"
    writers = [FORKED.Process(target=_append_many, args=(path, w)) for w in range(2)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    records, skipped = record.read(path)
    assert skipped == []
    assert sorted((r["writer"], r["n"]) for r in records) == [(w, n) for w in range(2) for n in range(25)]


def _append_beyond_limit(path):
    limit = path.stat().st_size + 10
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        record.append(path, {"n": 2, "padding": "x" * 100})
    except OSError:
        sys.exit(7)


def test_a_failed_write_leaves_the_file_as_it_was(tmp_path):
    path = tmp_path / "results.jsonl"
    record.append(path, {"n": 1})
    before = path.read_bytes()
    writer = FORKED.Process(target=_append_beyond_limit, args=(path,))
    writer.start()
    writer.join()
    assert writer.exitcode == 7
    assert path.read_bytes() == before


def _git(folder, *args):
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]
    done = subprocess.run(["git", "-C", str(folder), *identity, *args], check=True, capture_output=True, text=True)
    return done.stdout.strip()


def test_git_state_tells_commit_dirt_and_absence(tmp_path):
    code = tmp_path / "code.py"
    code.write_text("a = 1\n")
    records = tmp_path / "docs/results/records/r.jsonl"
    records.parent.mkdir(parents=True)
    records.write_text("")
    nothing = {"git_commit": None, "git_dirty": None}
    assert machine.git_state(code) == nothing
    _git(tmp_path, "init", "-q")
    assert machine.git_state(code) == nothing, "a file that the checkout does not track is not that commit's code"
    _git(tmp_path, "add", "code.py", "docs")
    _git(tmp_path, "commit", "-q", "-m", "one")
    clean = {"git_commit": _git(tmp_path, "rev-parse", "HEAD"), "git_dirty": False}
    assert machine.git_state(code) == clean
    (tmp_path / "results.jsonl").write_text("{}\n")
    assert machine.git_state(code) == clean
    records.write_text("{}\n")  # an experiment appends here between two of its stamps
    assert machine.git_state(code) == clean
    (tmp_path / "new_method.py").write_text("b = 2\n")
    assert machine.git_state(code) == {**clean, "git_dirty": True}
    (tmp_path / "new_method.py").unlink()
    code.write_text("a = 2\n")
    assert machine.git_state(code) == {**clean, "git_dirty": True}


def test_a_run_between_emulated_hosts_says_so(monkeypatch):
    for name in (record.LINK_RATE, record.LINK_DELAY, "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert record.link() == {}
    monkeypatch.setenv(record.LINK_RATE, "1gbit")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    told = {"link_rate": "1gbit", "link_delay": None, "link_emulated": True, "ranks_per_host": 2}
    assert record.link() == told and not record.check_types(told, schema.OPTIONAL)
    monkeypatch.setenv(record.LINK_DELAY, "1ms")
    assert record.link()["link_delay"] == "1ms"


def test_stamp_is_storable_and_names_no_host(tmp_path):
    stamp = record.stamp()
    record.validate({**RUN, **stamp, "config": {"a": 1}})
    record.append(tmp_path / "r.jsonl", stamp)
    assert record.read(tmp_path / "r.jsonl") == ([stamp], [])
    assert stamp["versions"]["torch"] == torch.__version__
    assert stamp["versions"]["python"] and stamp["machine"]["cores_logical"] >= 1
    assert stamp["date"].endswith("+00:00")
    assert platform.node() not in json.dumps(stamp).split('"')
