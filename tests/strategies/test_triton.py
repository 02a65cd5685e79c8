"""Triton kernels without a GPU: bit by bit in the interpreter, and what they compile to for A100, H100 and B200."""

import re
from contextlib import suppress
from types import SimpleNamespace

import pytest
import torch

from strategies.compressors.int4 import Int4
from strategies.compressors.int8 import Int8
from strategies.compressors.natural import NaturalCompression
from strategies.compressors.onebit import OneBit
from strategies.kernels import Job
from strategies.kernels.step import agree, place_of
from tests.triton_tools import ARCHITECTURES, Launches, compiled, interpreting

pytest.importorskip("triton", reason="needs the extra triton: pip install -e '.[triton]'")
CODECS = {"int8": Int8(), "int4": Int4(), "onebit": OneBit(), "natural": NaturalCompression()}
_CANARY = 2048  # elements: what a whole program could write
ORIGIN = ((1 << 31) - 3000, 12345, -987654321)  # positions that wrap


@pytest.fixture(scope="module")
def interpreter():
    with interpreting() as call:
        yield call


def _examples(codec, step, blocks, dtype=torch.float32):
    """Arguments that a warm-up tries a step on: gradients of very different sizes, a block of zeros."""
    use = "owing" if step == "owing" else "reduce"
    arguments = codec.steps.examples(Job("slabs", torch.device("cpu"), 3, dtype), use)[step]
    return [tensor[:blocks].clone() for tensor in arguments]


def _with_canaries(tensors):
    """Copies that lie between elements which nobody may write."""
    whole = [torch.full((tensor.numel() + 2 * _CANARY,), 77).to(tensor.dtype) for tensor in tensors]
    inside = [big[_CANARY:-_CANARY].view(tensor.shape) for big, tensor in zip(whole, tensors, strict=True)]
    for view, tensor in zip(inside, tensors, strict=True):
        view.copy_(tensor)
    return whole, inside


def _differing(wanted, got, sums=False):
    return [number for number, (a, b) in enumerate(zip(wanted, got, strict=True)) if not agree(a, b, sums)]


def _overwritten(whole):
    outside = [torch.cat([big[:_CANARY], big[-_CANARY:]]) for big in whole]
    return [number for number, canary in enumerate(outside) if (canary != 77).any()]


def _encode(name, step, blocks, dtype, whole_numbers=False):
    """Kernel and reference on the same gradients: which arguments differ, around which was written."""
    codec = CODECS[name]
    wanted = _examples(codec, step, blocks, dtype)
    if whole_numbers:
        draw = torch.Generator().manual_seed(0)
        for gradient in wanted[: 2 if step == "owing" else 1]:
            gradient.copy_(torch.randint(-8000, 8001, gradient.shape, generator=draw))
    place = place_of(ORIGIN, torch.device("cpu")) if codec.draws else None
    whole, got = _with_canaries(wanted)
    codec.steps.references[step](place, *wanted)
    codec.kernel(step)(place, *got)
    return _differing(wanted, got, codec.sums and not whole_numbers), _overwritten(whole)


@pytest.mark.parametrize(("blocks", "dtype"), [(1, torch.float32), (19, torch.float32), (19, torch.bfloat16)])
@pytest.mark.parametrize("step", ["encode", "owing"])
@pytest.mark.parametrize("name", list(CODECS))
def test_codes_and_what_is_owed_are_the_references_and_nothing_else_is_written(name, step, blocks, dtype, interpreter):
    assert interpreter(_encode, name, step, blocks, dtype) == ([], [])


@pytest.mark.parametrize("step", ["encode", "owing"])
def test_sums_that_no_order_can_change_are_the_references_bit_by_bit(step, interpreter):
    assert interpreter(_encode, "onebit", step, 19, torch.float32, True) == ([], [])


def _average(name, blocks, together):
    """Mean of three ranks' codes, in a received buffer or apart: what differs, what was overwritten."""
    codec = CODECS[name]
    out, *codes = _examples(codec, "mean", blocks)
    wanted = out.clone()
    codec.steps.references["mean"](None, wanted, *codes)
    whole, (out, *apart) = _with_canaries([out, *codes])
    roles = len(codec.steps.roles)
    buffers = [torch.stack(apart[role::roles]) for role in range(roles)]
    received = [buffer[rank] for rank in range(3) for buffer in buffers]
    codec.kernel("mean")(None, out, *(received if together else apart))
    return _differing([wanted, *codes], [out, *(received if together else apart)]), _overwritten(whole)


# to float32 only: the interpreter of triton 3.7.1 truncates float32 to bfloat16 instead of rounding it
@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("blocks", [1, 19])
@pytest.mark.parametrize("name", ["int8", "onebit"])
def test_the_mean_is_the_references_and_nothing_else_is_written(name, blocks, together, interpreter):
    assert interpreter(_average, name, blocks, together) == ([], [])


def _encode_bad(name, bad):
    """What differs in ``owed``, what of it changed at the bad element, which blocks decode to something non-finite."""
    codec = CODECS[name]
    grad, owed, *codes = _examples(codec, "owing", 4)
    grad[2, 5] = bad
    before, wanted, place = owed[2, 5].item(), owed.clone(), place_of(ORIGIN, grad.device) if codec.draws else None
    codec.steps.references["owing"](place, grad, wanted, *(code.clone() for code in codes))
    codec.kernel("owing")(place, grad, owed, *codes)
    out = torch.empty_like(owed)
    codec.steps.references["decode"](None, out, *codes[: len(codec.steps.roles)])
    broken = (~out.isfinite()).any(1).nonzero().flatten().tolist()
    return _differing([wanted], [owed], codec.sums), owed[2, 5].item() - before, broken


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", list(CODECS))
def test_a_bad_element_is_seen_and_leaves_what_was_owed(name, bad, interpreter):
    assert interpreter(_encode_bad, name, bad) == ([], 0, [2])


class _Written(Exception):
    """Code is generated, and cannot be run without a GPU."""


def _inductor_writes(step):
    """What ``torch.compile`` makes of a step on a GPU: whether it may fuse, and its lines that divide."""
    from torch._inductor import config
    from torch._inductor.graph import GraphLowering
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    from strategies.kernels import step as kernels

    found = []

    def write(graph):
        found.append(graph.codegen()[0].value)
        raise _Written

    GraphLowering._compile_to_module = write
    target, device = GPUTarget("cuda", 90, 32), torch.device("cpu")
    driver.set_active(SimpleNamespace(get_current_target=lambda: target, get_active_torch_device=lambda: device))
    codec = Int8()
    arguments = codec.steps.examples(Job("slabs", device, 3), "owing")[step]
    run = kernels._compiled(codec.steps.references[step], torch.device("cuda"))
    with config.patch(cpu_backend="triton", fx_graph_cache=False, compile_threads=1), suppress(Exception):
        run(None, *arguments)
    (code,) = found
    divisions = [line.strip() for line in code.splitlines() if re.search(r"tmp\d+ / |div_rn", line)]
    return "'enable_fp_fusion': False" in code, divisions


def test_compiled_code_for_a_gpu_divides_exactly_and_fuses_no_multiplication_with_an_addition(interpreter):
    apart, divisions = interpreter(_inductor_writes, "owing")
    assert apart and len(divisions) == 1 and "div_rn" in divisions[0]


def test_there_are_no_kernels_for_other_blocks_or_steps():
    from strategies.kernels.triton_codecs import find

    assert find("int8", "encode", 256) is not None
    assert find("int8", "encode", 96) is None
    assert find("int8", "encode", 4096) is not None and find("int8", "encode", 8192) is None
    assert find("int8", "decode", 256) is None
    assert find("qsgd", "encode", 256) is None
    assert Int8(stochastic=True).kernel("encode") is None


def test_kernels_are_launched_on_the_device_of_the_tensors(monkeypatch):
    from strategies.kernels import triton_codecs

    kernel = Launches()
    monkeypatch.setattr(torch.cuda, "device_of", kernel.device_of)
    for name in ("int8_encode", "int8_mean"):
        monkeypatch.setattr(triton_codecs, name, kernel)
    for step in ("encode", "owing", "mean"):
        Int8().kernel(step)(None, *_examples(Int8(), step, 4))
    assert kernel.launched_on == [torch.device("cpu")] * 3


def test_other_numbers_of_blocks_and_places_of_scales_compile_no_kernel_again():
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    from strategies.kernels import triton_codecs

    backend = make_backend(GPUTarget("cuda", 90, 32))
    for name in _MEASURED:
        kernel = getattr(triton_codecs, name)
        bind = create_function_from_signature(kernel.signature, kernel.params, backend)
        seen = []
        for number in (64, 63, 1):
            free = {"b": number, "n": number, "scale_stride": number, "mean_stride": number, "share": 1 / number}
            fixed = {"B": 256, "NB": 8, "OWING": True, "value_stride": 256}
            given = {arg: (free | fixed).get(arg, torch.zeros(8)) for arg in kernel.arg_names}
            seen.append(bind(**given)[1])
        assert seen[0] == seen[1] == seen[2], name


_TYPES = {"grad": "*fp32", "owed": "*fp32", "out": "*fp32", "values": "*u8", "scales": "*fp32", "means": "*fp32"}
_TYPES |= {"real": "*fp32", "first": "*i32", "one": "*i32", "two": "*i32", "b": "i32", "n": "i32", "share": "fp32"}
_TYPES |= {"value_stride": "i32", "scale_stride": "i32", "mean_stride": "i32"}
# measured for sm_90 with triton 3.7.1 and its ptxas, of 2048 elements by 64 threads: instructions, registers of a
# thread, and accesses to global memory of less than 16 bytes (scales, means, keys; bytes of 8 signs, whose rows are 32
# bytes)
_MEASURED = {
    "int8_encode": (901, 111, 1),
    "int8_mean": (361, 56, 2),
    "int4_encode": (841, 127, 1),
    "onebit_encode": (964, 128, 4),
    "onebit_mean": (710, 96, 17),
    "natural_encode": (1306, 152, 3),
}
_ROOM = 1.15


def _compiled(name, block, sm):
    from strategies.kernels import triton_codecs

    kernel = getattr(triton_codecs, name)
    constants = {"B": block, "NB": triton_codecs.blocks_of_program(block), "OWING": True}
    constants = {key: value for key, value in constants.items() if key in kernel.arg_names}
    types = _TYPES | ({"values": "*i8"} if name.startswith("int8") else {})
    return compiled(kernel, types, constants, triton_codecs._OPTIONS, sm)


@pytest.mark.parametrize("sm", ARCHITECTURES)
@pytest.mark.parametrize("name", list(_MEASURED))
def test_kernels_compile_ahead_of_time_without_spilling_and_with_wide_accesses(name, sm):
    useful, registers = _compiled(name, CODECS[name.split("_")[0]].block_size, sm)
    narrow = [operation for operation in useful if re.match(r"(LDG|STG)\.E(?!.*\.128)", operation)]
    found = (len(useful), registers, len(narrow))
    print(name, sm, found)
    assert all(now <= _ROOM * then for now, then in zip(found, _MEASURED[name], strict=True))


def test_the_largest_blocks_do_not_spill_and_larger_ones_do():
    from strategies.kernels.triton_codecs import _LARGEST

    _compiled("natural_encode", _LARGEST, 90)
    with pytest.raises(AssertionError):
        _compiled("natural_encode", 2 * _LARGEST, 90)


def test_no_kernel_is_left_out():
    import triton

    from strategies.kernels import triton_codecs

    launched = {name for name, one in vars(triton_codecs).items() if isinstance(one, triton.JITFunction)}
    assert {name for name in launched if not name.startswith("_")} == _MEASURED.keys()
