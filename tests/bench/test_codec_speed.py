"""The codec bench in a process of its own, as the experiment starts it."""

import json

import pytest
import torch
import torch.distributed as dist

from bench.experiments.codec_speed import chosen, measure
from bench.experiments.runs import json_lines
from strategies.compressors.int8 import Int8
from strategies.compressors.randomk import RandomK

INT8 = repr(Int8())


def test_one_line_an_arm_with_what_it_sends(tmp_path):
    arguments = [
        "--elements",
        "4096",
        "--repeats",
        "2",
        "--methods",
        json.dumps([INT8, "FP16"]),
        "--backends",
        "[slabs, reference]",
    ]
    lines = list(json_lines("bench.experiments.codec_speed", *arguments, log=tmp_path / "log"))
    arms = {(line["method"], line["backend"], line["phase"]): line for line in lines}
    blocks = {(INT8, backend, phase) for backend in ("slabs", "reference") for phase in ("encode", "decode", "owing")}
    assert set(arms) == blocks | {("FP16()", "reference", phase) for phase in ("encode", "decode")} | {
        ("copy", "", "copy")
    }
    assert all(len(line["ns"]) == 2 and line["ran_as"] == line["backend"] for line in lines if line["method"] == INT8)
    assert arms[INT8, "slabs", "encode"]["bits"] == pytest.approx(8 + 32 / 256)


def test_every_phase_says_how_its_own_step_ran(monkeypatch, capsys):
    monkeypatch.setattr(Int8, "kernel", lambda self, step: None if step == "mean" else self.steps.references[step])
    monkeypatch.setattr(torch, "compile", _no_compiler)
    monkeypatch.setattr("torch._inductor.cpp_builder.get_cpp_compiler", str)
    try:
        measure(4096, 1, [INT8], ["triton"])
    finally:
        dist.destroy_process_group()
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    ran_as = {line["phase"]: line["ran_as"] for line in lines}
    assert ran_as == {"encode": "triton", "owing": "triton", "decode": "slabs", "copy": ""}


def _no_compiler(*args, **options):
    raise RuntimeError("no compiler here")


def test_codecs_are_named_by_their_form_and_chosen_by_class_or_form():
    assert list(chosen(["RandomK", INT8])) == [INT8, *map(repr, RandomK.examples())]
    assert len(chosen(None)) > len(chosen(["RandomK"]))
    with pytest.raises(ValueError, match=r"methods: there is no codec Int9; there are .*Int8"):
        chosen(["Int9"])
