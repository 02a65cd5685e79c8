"""Every way to run a codec's arithmetic gives what its reference gives; what cannot run falls back and says so."""

import copy
import logging
import sys
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from common.variants import variants
from strategies import residuals
from strategies.compressors import Compressor
from strategies.compressors.blocks import BlockCodec
from strategies.compressors.error_feedback import ErrorFeedback
from strategies.compressors.int8 import Int8
from strategies.compressors.natural import NaturalCompression
from strategies.compressors.onebit import OneBit
from strategies.compressors.packing import pack, unpack
from strategies.compressors.steps import Slab
from strategies.compressors.topk import TopK, largest
from strategies.kernels import Job, choose
from strategies.kernels.step import SLAB, VARIABLE, Fast, agree, place_of
from tests.strategies.engines import fit
from tests.strategies.reductions import gradient, make_unit

CODECS = [c for cls in variants(Compressor) for c in cls.examples() if isinstance(c, BlockCodec)]
by_name = pytest.mark.parametrize("codec", CODECS, ids=repr)
CPU, KEY = torch.device("cpu"), (12345, -987654321)


def _arguments(codec, name, blocks):
    """Arguments of a step for any number of blocks: those of a warm-up, repeated in another order."""
    examples = [codec.steps.examples(Job("slabs", CPU, 3), use) for use in ("owing", "apart", "reduce")]
    order = torch.randint(64, (blocks,), generator=torch.Generator().manual_seed(blocks))
    return [tensor[order].clone() for tensor in (examples[0] | examples[1] | examples[2])[name]]


def _runs_alike(codec, name, blocks, first=7):
    place = place_of((first, *KEY), CPU) if codec.draws else None
    wanted, got = _arguments(codec, name, blocks), _arguments(codec, name, blocks)
    with torch.no_grad():
        codec.steps.references[name](place, *wanted)
        getattr(codec.steps, name)(place, *got)
    return all(agree(a, b, codec.sums) for a, b in zip(wanted, got, strict=True))


def _passes(codec, size):
    """Everything a codec computes of one gradient, in rows of ``size``."""
    unit = make_unit(2 * size, seed=5)
    unit.world_size = 2
    chunks, owed, mean = gradient(0, 2 * size).view(2, -1), gradient(1, 2 * size).view(2, -1).clone(), torch.empty(size)
    payload = codec.encode(chunks, unit)
    results = [*payload.values(), codec.decode(payload, size, unit)]
    codec.average(payload, mean, unit)
    if codec.fuses:
        results += codec.encode(chunks, unit, owed).values()
    return [*results, mean, owed]


def _slabs_and_whole(codec):
    job, size = Job("reference", CPU, 2), 3 * SLAB + 1000  # several slabs, the last one shorter, and a shorter block
    for one, blocks in ((codec, 32), (copy.deepcopy(codec), None)):
        for use in ("reduce", "owing", "apart"):
            one.warm_up(job if blocks is None else replace(job, backend="slabs"), use)
        limits = {one.steps.limit(name, CPU) for name in one.steps.backends}
        assert limits == {SLAB if blocks else None}
        yield _passes(one, size)


def _same(codec):
    return all(torch.equal(a, b) for a, b in zip(*_slabs_and_whole(codec), strict=True))


@by_name
def test_slabs_give_what_the_whole_gives(codec, two_ranks):
    assert two_ranks.run(_same, codec) == [True, True]


def test_two_calls_lead_from_encoding_to_the_arithmetic(two_ranks):
    assert two_ranks.run(_callers) == [["_encode", "encode"]] * 2


def _callers():
    codec, callers = Int8(), []
    quantise = codec.quantise

    def watched(blocks, slab):
        frame = sys._getframe(1)
        while frame.f_code.co_name != "_callers":
            callers.append(frame.f_code.co_name)
            frame = frame.f_back
        return quantise(blocks, slab)

    codec.quantise = watched
    codec.encode(torch.zeros(2, 100), make_unit(200))
    return callers[:2] if len(callers) == 4 else callers  # two rows


@by_name
def test_what_is_packed_is_unpacked_exactly(codec):
    block = codec.block_size or 64 * codec.planes
    blocks = gradient(0, 9 * block).view(9, -1)
    real = torch.full((9, 1), float(block)) if codec.masked else None
    symbols = codec.quantise(blocks, Slab(place_of((7, *KEY), CPU) if codec.draws else None, real))
    packed = codec.pack(symbols, block)
    codes = {role: packed[role].to(dtype) for role, (_, dtype) in codec.layout(block).items()}
    assert [codes[role].shape for role in codes] == [(9, entries) for entries, _ in codec.layout(block).values()]
    wanted = codec.reconstruct(symbols, block)  # before they were packed
    assert torch.equal(codec.reconstruct(codec.unpack(codes, block), block), wanted) and wanted.any()


def _examples(codec, default):
    torch.set_default_dtype(default)  # as Lightning does under "bf16-true"
    try:
        return {use: codec.steps.examples(Job("slabs", CPU, 2), use) for use in ("reduce", "owing", "apart")}
    finally:
        torch.set_default_dtype(torch.float32)


@by_name
def test_a_warm_up_tries_the_same_whatever_the_precision_of_the_run(codec):
    wanted, found = (_examples(codec, dtype) for dtype in (torch.float32, torch.bfloat16))
    for use, steps in wanted.items():
        for name, tensors in steps.items():
            for one, other in zip(tensors, found[use][name], strict=True):
                assert one.dtype == other.dtype and torch.equal(one, other)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_packing_is_planar_and_exact(bits):
    codes = torch.randint(1 << bits, (5, 48), generator=torch.Generator().manual_seed(0))
    packed = pack(codes.float(), bits)
    assert torch.equal(unpack(packed.to(torch.uint8), bits), codes.int())
    planes = codes.view(5, 8 // bits, -1)
    assert torch.equal(packed.long(), sum(planes[:, j] << (j * bits) for j in range(8 // bits)))


def _owing(compressor, size, bad):
    """Three steps in one pass, and three in two (``sent`` asked for): outputs and residuals."""
    n, results = dist.get_world_size(), []
    for apart in (False, True):
        unit, outputs = make_unit(n * size), []
        for step in range(3):
            unit.step, grad, output = step, gradient(dist.get_rank(), n * size, step), torch.empty(size)
            if bad and step == 1:
                grad[size // 2], grad[0] = torch.nan, torch.inf
            sent = torch.empty(n * size) if apart else None
            compressor.reduce_scatter(grad, output, unit, sent)
            outputs.append(output)
        results.append((outputs, residuals.load(unit, "residual", 0, CPU).clone()))
    return results


FUSED = [codec for codec in CODECS if codec.fuses and (codec.contractive or codec.unbiased)]


@pytest.mark.parametrize("codec", FUSED, ids=repr)
@pytest.mark.parametrize("bad", [False, True])
def test_error_feedback_in_one_pass_is_that_in_two(codec, bad, two_ranks):
    results = two_ranks.run(_owing, ErrorFeedback(codec), 2 * 1024 + 77, bad)
    assert not bad or not results[0][0][0][1].isfinite().all()  # the owner of the bad elements sees them
    for (outputs, residual), (wanted, owed) in results:
        assert torch.equal(residual, owed) and residual.isfinite().all() and residual.any()
        for output, other in zip(outputs, wanted, strict=True):
            assert torch.equal(output.nan_to_num(7, 8, 9), other.nan_to_num(7, 8, 9))


def test_settling_keeps_what_was_owed_where_nothing_finite_is_left():
    left = torch.tensor([1.0, torch.nan, torch.inf, -torch.inf, -0.0, 3e38, 2.0])
    owed = torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0, -3e38, 3e38])
    residuals.settle(left, owed)
    assert torch.equal(owed, torch.tensor([1.0, 1.0, 2.0, 3.0, 0.0, 3e38, 2.0]))


@pytest.mark.parametrize(("block", "k"), [(1024, 10), (1024, 102), (256, 1), (48, 3), (40, 40), (7, 2)])
def test_the_largest_are_those_of_a_full_search(block, k):
    magnitudes = torch.rand(50, block, generator=torch.Generator().manual_seed(k))
    magnitudes[3, :5], magnitudes[4] = torch.nan, 0.0
    found, wanted = largest(magnitudes, k), magnitudes.topk(k, 1)
    assert all(len(set(row)) == k for row in found.tolist())
    values = magnitudes.gather(1, found).nan_to_num(9).sort(1).values
    assert torch.equal(values, wanted.values.nan_to_num(9).sort(1).values)


@pytest.fixture
def compiler():
    cpp = pytest.importorskip("torch._inductor.cpp_builder")
    try:
        cpp.get_cpp_compiler()
    except Exception as error:
        pytest.skip(f"torch.compile finds no C++ compiler: {type(error).__name__}")


@pytest.mark.parametrize("make", [Int8, OneBit, NaturalCompression])
def test_compiled_code_gives_what_the_reference_gives_for_any_number_of_blocks(make, compiler):
    codec = make()
    assert codec.warm_up(Job("compiled", CPU, 3), "owing") == {"compiled"}
    for name in ("owing", "mean"):
        for blocks in (1, 2, 3, 63, 64, 300):
            assert _runs_alike(codec, name, blocks)
        assert getattr(codec.steps, name).in_use  # no other number of blocks needed another graph


def test_other_settings_than_when_compiled_do_not_compile_again(compiler, caplog):
    codec = Int8()
    codec.warm_up(Job("compiled", CPU, 2), "reduce")
    threads = torch.get_num_threads()
    with torch.autocast("cpu"), torch.inference_mode():
        assert _runs_alike(codec, "encode", 5)
    assert codec.steps.encode.in_use
    torch.set_num_threads(threads + 1)
    try:
        with caplog.at_level(logging.WARNING):
            assert _runs_alike(codec, "encode", 5)
    finally:
        torch.set_num_threads(threads)
    assert not codec.steps.encode.in_use and "compiled for other settings" in caplog.text


def _fails(place, *tensors):
    raise AssertionError("not made for these tensors")


def test_tensors_that_a_fast_step_was_not_made_for_are_drawn_the_same_numbers():
    codec, blocks = NaturalCompression(), 3 * SLAB // 1024 + 5
    example = _arguments(codec, "encode", 2)
    fast = Fast(_fails, codec.steps.references["encode"], (example[0].double(), *example[1:]), "encode")
    wanted, got = _arguments(codec, "encode", blocks), _arguments(codec, "encode", blocks)
    place = place_of(((1 << 31) - SLAB, *KEY), CPU)  # positions that wrap
    codec.steps.references["encode"](place, *wanted)
    fast(place, *got)
    assert torch.equal(wanted[1], got[1])


def _nothing(place, *tensors):
    pass


def _no_compiler():
    raise RuntimeError("no compiler here")


def test_a_step_that_cannot_be_compiled_or_is_wrong_stays_in_slabs_and_says_why(monkeypatch, caplog):
    monkeypatch.setattr("torch._inductor.cpp_builder.get_cpp_compiler", _no_compiler)
    codec = Int8()
    with caplog.at_level(logging.WARNING):
        assert codec.warm_up(Job("compiled", CPU, 2)) == {"slabs"}
    assert "no compiler here" in caplog.text and _runs_alike(codec, "encode", 5)
    monkeypatch.setattr(Int8, "kernel", lambda self, name: _nothing)
    with caplog.at_level(logging.WARNING):
        assert codec.warm_up(Job("triton", CPU, 2)) == {"slabs"}
    assert "differ from the reference" in caplog.text and _runs_alike(codec, "encode", 5)


def test_the_backend_is_the_arguments_then_the_variables_then_the_devices(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    assert choose("auto", CPU) == "slabs" and choose("auto", torch.device("cuda")) == "compiled"
    monkeypatch.setenv(VARIABLE, "reference")
    assert choose("auto", CPU) == "reference" and choose("triton", CPU) == "triton"
    monkeypatch.setenv(VARIABLE, "fast")
    with pytest.raises(ValueError, match="PARE_KERNELS=fast: must be one of reference"):
        choose("auto", CPU)


def test_methods_without_a_choice_have_no_backend_and_hybrids_warm_their_parts():
    job = Job("reference", CPU, 2)
    assert variants(Compressor) and TopK(0.1, values=Int8()).warm_up(job) == {"reference"}
    assert Int8(block_size=0).warm_up(Job("compiled", CPU, 2)) == {"slabs"}  # a block of every size: nothing to compile


@pytest.mark.parametrize("engine", ["fsdp1", "fsdp2", "ddp"])
def test_engines_warm_up_and_say_how_codecs_compute(engine, two_ranks):
    results = two_ranks.run(fit, ErrorFeedback(Int8()), engine=engine, kernels="reference")
    assert [result["codec_backend"] for result in results] == ["reference"] * 2
