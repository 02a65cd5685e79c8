"""What compressors claim of themselves: unbiased, linear, contractive, reproducible, never waiting for the device."""

import json

import pytest
import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from bench.side_by_side.oracles import published_error
from common.variants import variants
from strategies.compressors import Codec, Compressor
from strategies.compressors.none import NoCompression
from tests.strategies.reductions import gradient, make_unit, reduce

COMPRESSORS = [example for cls in variants(Compressor) for example in cls.examples()]


def _those(attribute):
    chosen = [compressor for compressor in COMPRESSORS if getattr(compressor, attribute)]
    assert chosen
    return pytest.mark.parametrize("compressor", chosen, ids=repr)


by_name = pytest.mark.parametrize("compressor", COMPRESSORS, ids=repr)
_SIZE = 4096
_ODD = 4099  # no number of bfloat16


def _sent(compressor, grad, step=0):
    """What the owners understand of this rank's gradient."""
    unit = make_unit(grad.numel(), step)
    sent = torch.empty(grad.numel())
    compressor.reduce_scatter(grad.clone(), torch.empty(grad.numel() // unit.world_size), unit, sent)
    return sent


def _many_draws(compressor, draws):
    grad = gradient(dist.get_rank(), 2 * _SIZE)
    mean = torch.zeros_like(grad)
    for step in range(draws):
        mean += _sent(compressor, grad, step)
    error = mean / draws - grad
    return (error.square().sum() / grad.square().sum()).item()


@_those("unbiased")
def test_the_mean_of_many_draws_is_the_gradient(compressor, two_ranks):
    draws = 200
    for nmse in two_ranks.run(_many_draws, compressor, draws):
        # independent draws: the variance falls as 1/draws, and a bias would stay
        assert nmse <= 1.3 * published_error(compressor) / draws + 1e-11


def _added(compressor):
    n = dist.get_world_size()
    one, two = (gradient(dist.get_rank(), n * _SIZE, step) for step in (0, 1))
    outputs = []
    for grad in (one, two, one + two):
        output = torch.empty(_SIZE)
        compressor.reduce_scatter(grad.clone(), output, make_unit(n * _SIZE))
        outputs.append(output)
    return outputs


@_those("linear")
def test_linear_methods_are_linear(compressor, two_ranks):
    for one, two, both in two_ranks.run(_added, compressor):
        assert both.norm() > 0
        torch.testing.assert_close(one + two, both, rtol=1e-4, atol=1e-8)


def _spike(x):
    x.zero_()[5] = 1.0


def _heavy(x):
    x.pow_(3)


def _level(x):
    x.fill_(1.0)


def _error(compressor, grad, step):
    return (_sent(compressor, grad, step) - grad).square().sum().item()


def _ratios(compressor):
    """E‖x − C(x)‖² / ‖x‖² over draws, of a gradient as it is and edited."""
    ratios = []
    for edit in (None, _spike, _heavy, _level):
        grad = gradient(dist.get_rank(), 2 * _SIZE) * 1e3
        if edit:
            edit(grad)
        errors = [_error(compressor, grad, step) for step in range(2)]
        if errors[0] != errors[1]:  # something is drawn
            errors += [_error(compressor, grad, step) for step in range(2, 50)]
        ratios.append(sum(errors) / len(errors) / grad.square().sum().item())
    return ratios


@_those("contractive")
def test_contractive_methods_contract(compressor, two_ranks):
    for usual, *edited in two_ranks.run(_ratios, compressor):
        assert usual < 0.999 and max(edited) <= 1 + 1e-6


@by_name
def test_same_seed_same_result(compressor, two_ranks):
    first, second = (two_ranks.run(reduce, compressor, 5000, step=3, seed=1) for _ in range(2))
    assert all(torch.equal(a[0], b[0]) for a, b in zip(first, second, strict=True))


@_those("unbiased")
def test_random_methods_draw_anew_each_step_and_by_seed(compressor, two_ranks):
    if published_error(compressor) == 0:
        pytest.skip("exact: nothing is drawn")
    base, later, other = (two_ranks.run(reduce, compressor, 5000, step=s, seed=k) for s, k in ((0, 0), (1, 0), (0, 1)))
    assert not torch.equal(base[0][0], later[0][0]) and not torch.equal(base[0][0], other[0][0])


def _in_bfloat16(compressor):
    """The same gradient (exact in bfloat16) given as float32 and as bfloat16."""
    n, outputs = dist.get_world_size(), []
    grad = gradient(dist.get_rank(), n * _SIZE).bfloat16()
    for dtype in (torch.float32, torch.bfloat16):
        output, sent = torch.empty(_SIZE, dtype=dtype), torch.empty(n * _SIZE)
        compressor.reduce_scatter(grad.to(dtype), output, make_unit(n * _SIZE), sent)
        outputs += [output, sent]
    return outputs


@by_name
def test_16_bit_gradients_are_averaged_in_fp32_and_rounded_once(compressor, two_ranks):
    if isinstance(compressor, NoCompression):
        pytest.skip("torch's own reduction adds in the gradient's dtype")
    for exact, sent, rounded, sent16 in two_ranks.run(_in_bfloat16, compressor):
        assert rounded.dtype == torch.bfloat16
        torch.testing.assert_close(rounded, exact.bfloat16(), rtol=8e-3, atol=1e-7)
        torch.testing.assert_close(sent16, sent, rtol=1e-5, atol=1e-9)


class _Waiting(RuntimeError):
    """An operation would make the host wait for the device."""


class NoHostSync(TorchDispatchMode):
    """Refuses operations whose result the host must know: on a GPU each would stop the stream."""

    forbidden = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_consecutive", "equal")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in self.forbidden:
            raise _Waiting(name)
        indices = args[1] if name in ("index", "index_put", "index_put_") else ()
        if any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in indices):
            raise _Waiting(f"{name} with a mask")
        return func(*args, **(kwargs or {}))


class NoHostReads(TorchFunctionMode):
    """Refuses what reads memory without passing the dispatcher."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.cpu):
            raise _Waiting(func.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: bool(x.any()),
        lambda x: x.masked_select(x > 0),
        lambda x: x.tolist(),
        lambda x: x.unique(),
    ],
)
def test_the_guard_against_waiting_sees_every_kind(wait):
    with NoHostSync(), NoHostReads(), pytest.raises(_Waiting):
        wait(torch.randn(8))


def _without_waiting(compressor):
    """Three steps, so that state is made, used and changed; the state of torch's generator before and after."""
    n = dist.get_world_size()
    unit, output, sent = make_unit(n * 5000), torch.empty(5000), torch.empty(n * 5000)
    before = torch.get_rng_state()
    for step in range(3):
        unit.step, grad = step, gradient(dist.get_rank(), n * 5000, step)
        with torch.no_grad(), NoHostSync(), NoHostReads():
            compressor.reduce_scatter(grad, output, unit, sent)
    return torch.equal(before, torch.get_rng_state())


@by_name
def test_no_host_synchronisation_and_no_global_randomness(compressor, two_ranks):
    assert all(two_ranks.run(_without_waiting, compressor))


def _encoded(compressor):
    unit = make_unit(2 * 3001, step=2)
    grad = gradient(dist.get_rank(), 2 * 3001).view(2, -1)
    kept = grad.clone()
    first, second = (compressor.encode(grad, unit) for _ in range(2))
    return all(torch.equal(first[role], second[role]) for role in first), torch.equal(kept, grad)


@by_name
def test_codecs_encode_the_same_bytes_twice_and_leave_the_gradient_alone(compressor, two_ranks):
    if not isinstance(compressor, Codec):
        pytest.skip("has collectives of its own")
    assert two_ranks.run(_encoded, compressor) == [(True, True)] * 2


@by_name
def test_config_repeats_the_constructor(compressor):
    again = type(compressor)(**compressor.arguments())
    assert again.config() == compressor.config() and repr(again) == repr(compressor)
    assert json.loads(json.dumps(compressor.config())) == compressor.config()


def _three_steps(compressor, default):
    n, outputs = dist.get_world_size(), []
    unit = make_unit(n * _ODD)
    grads = [gradient(dist.get_rank(), n * _ODD, step) for step in range(3)]
    torch.set_default_dtype(default)  # as Lightning does within a step under "bf16-true"
    try:
        for step, grad in enumerate(grads):
            unit.step, output = step, torch.empty(_ODD, dtype=torch.float32)
            compressor.reduce_scatter(grad.clone(), output, unit)
            outputs.append(output)
    finally:
        torch.set_default_dtype(torch.float32)
    return outputs


@by_name
def test_sums_are_in_float32_whatever_the_precision_of_the_run(compressor, two_ranks):
    wanted, found = (two_ranks.run(_three_steps, compressor, dtype) for dtype in (torch.float32, torch.bfloat16))
    for ours, theirs in zip(wanted, found, strict=True):
        assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))
