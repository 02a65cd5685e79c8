"""Every way to run a codec's arithmetic gives what its reference gives; what cannot run falls back and says so."""

import logging

import pytest
import torch
import torch.distributed as dist

from strategies import residuals
from strategies.compressors import known_compressors
from strategies.compressors.blocks import BlockCodec
from strategies.compressors.error_feedback import ErrorFeedback
from strategies.compressors.int8 import Int8
from strategies.compressors.natural import NaturalCompression
from strategies.compressors.onebit import OneBit
from strategies.compressors.packing import pack, unpack
from strategies.compressors.topk import TopK, largest
from strategies.kernels import Job, choose
from strategies.kernels.step import VARIABLE, agree, place_of
from tests.strategies.engines import fit
from tests.strategies.reductions import gradient, make_unit

CODECS = [c for cls in known_compressors() for c in cls.examples() if isinstance(c, BlockCodec)]
by_name = pytest.mark.parametrize("codec", CODECS, ids=repr)
CPU, KEY = torch.device("cpu"), (12345, -987654321)


def _arguments(codec, name, blocks):
    """Arguments of a step for any number of blocks: those of a warm-up, repeated in another order."""
    steps = {**codec._examples(Job("slabs", CPU, 3), "owing"), **codec._examples(Job("slabs", CPU, 3), "apart")}
    steps |= codec._examples(Job("slabs", CPU, 3), "reduce")
    order = torch.randint(64, (blocks,), generator=torch.Generator().manual_seed(blocks))
    return [tensor[order].clone() for tensor in steps[name]]


def _runs_alike(codec, name, blocks, first=7):
    origin = (first, *KEY) if codec.draws else None
    wanted, got = _arguments(codec, name, blocks), _arguments(codec, name, blocks)
    with torch.no_grad():
        getattr(codec, name).reference(place_of(origin, CPU), *wanted)
        getattr(codec, name)(origin, *got)
    return all(agree(a, b, codec.sums) for a, b in zip(wanted, got, strict=True))


@by_name
@pytest.mark.parametrize("name", ["encode_step", "owing_step", "decode_step", "mean_step"])
def test_slabs_give_what_the_whole_gives(codec, name):
    assert _runs_alike(codec, name, 2000 if codec.block_size else 3)


@by_name
def test_what_is_packed_is_unpacked_exactly(codec):
    block = codec.block_size or 64 * codec.planes
    codes = dict(zip(codec._roles(), _arguments(codec, "encode_step", 9)[1:], strict=False))
    if not codec.block_size:
        pytest.skip("one block of any size: covered by sizes of other examples")
    decoded = codec.reconstruct(codec.unpack(codes, block), block)
    out = torch.empty(9, block)
    codec.decode_step(None, out, *codes.values())
    assert torch.equal(decoded, out)


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
    for name in ("owing_step", "mean_step"):
        for blocks in (1, 2, 3, 63, 64, 300):
            assert _runs_alike(codec, name, blocks)
        assert getattr(codec, name).backend == "compiled"  # no other number of blocks needed another graph


def test_other_settings_than_when_compiled_do_not_compile_again(compiler, caplog):
    codec = Int8()
    codec.warm_up(Job("compiled", CPU, 2), "reduce")
    threads = torch.get_num_threads()
    with torch.autocast("cpu"), torch.inference_mode():
        assert _runs_alike(codec, "encode_step", 5)
    assert codec.encode_step.backend == "compiled"
    torch.set_num_threads(threads + 1)
    try:
        with caplog.at_level(logging.WARNING):
            assert _runs_alike(codec, "encode_step", 5)
    finally:
        torch.set_num_threads(threads)
    assert codec.encode_step.backend == "slabs" and "compiled for other settings" in caplog.text


def _nothing(place, *tensors):
    pass


def _no_compiler():
    raise RuntimeError("no compiler here")


def test_a_step_that_cannot_be_compiled_or_is_wrong_stays_in_slabs_and_says_why(monkeypatch, caplog):
    monkeypatch.setattr("torch._inductor.cpp_builder.get_cpp_compiler", _no_compiler)
    codec = Int8()
    with caplog.at_level(logging.WARNING):
        assert codec.warm_up(Job("compiled", CPU, 2)) == {"slabs"}
    assert "no compiler here" in caplog.text and _runs_alike(codec, "encode_step", 5)
    monkeypatch.setattr(Int8, "kernel", lambda self, name: _nothing)
    with caplog.at_level(logging.WARNING):
        assert codec.warm_up(Job("triton", CPU, 2)) == {"slabs"}
    assert "differ from the reference" in caplog.text and _runs_alike(codec, "encode_step", 5)


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
    assert known_compressors() and TopK(0.1, values=Int8()).warm_up(job) == {"reference"}
    assert Int8(block_size=0).warm_up(Job("compiled", CPU, 2)) == {"slabs"}  # a block of every size: nothing to compile


@pytest.mark.parametrize("engine", ["fsdp1", "fsdp2", "ddp"])
def test_engines_warm_up_and_say_how_codecs_compute(engine, two_ranks):
    results = two_ranks.run(fit, ErrorFeedback(Int8()), engine=engine, kernels="reference")
    assert [result["codec_backend"] for result in results] == ["reference"] * 2
