"""The codec bench in a process of its own, as the experiment starts it."""

import pytest

from bench.experiments.runs import json_lines


def test_one_line_an_arm_with_what_it_sends(tmp_path):
    arguments = [
        "--elements",
        "4096",
        "--repeats",
        "2",
        "--methods",
        "[Int8, FP16]",
        "--backends",
        "[slabs, reference]",
    ]
    lines = list(json_lines("bench.experiments.codec_speed", *arguments, log=tmp_path / "log"))
    arms = {(line["method"], line["backend"], line["phase"]): line for line in lines}
    blocks = {("Int8", backend, phase) for backend in ("slabs", "reference") for phase in ("encode", "decode", "owing")}
    assert set(arms) == blocks | {("FP16", "reference", phase) for phase in ("encode", "decode")} | {
        ("copy", "", "copy")
    }
    assert all(len(line["ns"]) == 2 and line["ran_as"] == line["backend"] for line in lines if line["method"] == "Int8")
    assert arms["Int8", "slabs", "encode"]["bits"] == pytest.approx(8 + 32 / 256)
