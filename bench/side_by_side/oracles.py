"""Every compressor's error and bytes, worked out apart from its code; a key is the compressor's ``repr``.

A new compressor brings a line to each of the two tables for every one of its ``examples()``.
"""

from collections.abc import Callable
from statistics import NormalDist
from typing import TypeVar

from strategies.compressors import Compressor
from strategies.units import ParameterSlice

Value = TypeVar("Value")
_NORMAL = NormalDist()


def _beyond(density: float) -> float:
    """Share of a Gaussian's energy outside its largest ``density`` of elements."""
    threshold = _NORMAL.inv_cdf(1 - density / 2)
    return 1 - density - 2 * threshold * _NORMAL.pdf(threshold)


def _shrunk(nmse: float, omega: float) -> float:
    """Error of an unbiased method × 1/(1+ω): bias and variance."""
    factor = 1 / (1 + omega)
    return (1 - factor) ** 2 + factor**2 * nmse


_BF16, _INT8, _INT4, _SIGN, _TERN = 2.8e-6, 4.9e-5, 1.4e-2, 1 - 2 / 3.14159, 1.43

# Normalised squared error of decode(encode(x)) on Gaussian gradients of standard deviation 1e-3: as measured by a
# separate prototype, or following from the distribution. Errors of ranks are independent, so their mean has the same.
NMSE: dict[str, float] = {
    "NoCompression()": 0.0,
    "NoCompressionA2A()": 0.0,
    "BF16()": _BF16,
    "FP16()": 4.3e-8,
    "FP8(format='e4m3', block_size=256)": 7e-4,
    "FP8(format='e5m2', block_size=256)": 2.8e-3,
    "Int8(block_size=256, stochastic=False)": _INT8,
    "Int8(block_size=256, stochastic=True)": 2 * _INT8,
    "Int8(block_size=0, stochastic=False)": (4.9 / 127) ** 2 / 12,  # the largest of half a million is near 4.9 σ
    "Int4(block_size=128, stochastic=False)": _INT4,
    "Int4(block_size=128, stochastic=True)": 2 * _INT4,
    "OneBit(block_size=256)": _SIGN,
    "OneBit(block_size=0)": _SIGN,
    "SignSGD(scaled=True, block_size=256)": _SIGN,
    "SignSGD(scaled=False, block_size=256)": 1e6,  # ±1 where gradients are near 1e-3: a direction, no estimate
    "QSGD(levels=127, block_size=256, shrink=False)": 2.65e-3,
    "QSGD(levels=7, block_size=256, shrink=False)": 0.86,
    "QSGD(levels=1, block_size=256, shrink=False)": 11.8,
    "QSGD(levels=7, block_size=256, shrink=True)": _shrunk(0.86, 16 / 7),
    "NaturalCompression()": 8.2e-2,
    "TernGrad(block_size=256, clip=0.0, shrink=False)": _TERN,  # E max|x| of 256 is 3.04 σ: 3.04·√(2/π) − 1
    "TernGrad(block_size=256, clip=2.5, shrink=False)": 2.5 * 0.794 - 2 * 0.9876 + 1,  # Stein's lemma
    "TernGrad(block_size=256, clip=0.0, shrink=True)": _shrunk(_TERN, 15),
    "TopK(density=0.01, block_size=1024, values=None)": _beyond(0.01),
    "TopK(density=0.1, block_size=1024, values=None)": _beyond(0.1),
    "TopK(density=0.05, block_size=256, values=None)": _beyond(0.05),
    "TopK(density=0.1, block_size=0, values=None)": _beyond(0.1),
    "TopK(density=0.1, block_size=1024, values=Int8(block_size=256, stochastic=False))": _beyond(0.1),
    "RandomK(density=0.1, scaled=True, values=None)": 9.0,
    "RandomK(density=0.1, scaled=False, values=None)": 0.9,
    "RandomK(density=0.1, scaled=False, values=Int8(block_size=256, stochastic=False))": 0.9,
    "ThresholdV(threshold=0.0015, capacity=0.25, block_size=1024, values=None)": _beyond(0.1336),  # P(|x| > 1.5 σ)
    "ThresholdV(threshold=0.0015, capacity=0.25, block_size=1024, values=Int8(block_size=256, stochastic=False))": (
        _beyond(0.1336)
    ),
    "ThresholdV(threshold=0.001, capacity=0.05, block_size=1024, values=None)": _beyond(0.05),  # only 5 % fit
    "DGC(density=0.1, momentum=0.9, warmup_steps=0, block_size=1024, values=None)": _beyond(0.1),
    "DGC(density=0.01, momentum=0.9, warmup_steps=400, block_size=1024, values=None)": _beyond(0.25),  # first stage
    "PowerSGD(rank=4)": 1 - 4 / 32,  # a tall random matrix of 32 columns has its energy spread evenly over them
    # noise has no heavy hitters: measured with a textbook count sketch (scattered additions) in float64
    "Sketch(density=0.1, rows=3, width=0.1)": 0.837,
    "GradiVeQ(slice_size=512, components=64, exact=5, refresh=100)": 0.0,  # its first steps are exact
    # half of the elements in Int8, a quarter ("second") in Int4, a quarter in Int8 again
    "ByParameter(inner=Int8(block_size=256, stochastic=False), rules={'*second*': Int4(block_size=128, "
    "stochastic=False)}, dense_below=1024, dense_1d=True)": 0.25 * _INT4 + 0.75 * _INT8,
    "WarmUp(inner=Int4(block_size=128, stochastic=False), steps=1)": 0.0,
    "WarmUp(inner=Int4(block_size=128, stochastic=False), steps=0)": _INT4,
    # without a residual from earlier steps, error feedback sends what its inner method does
    "ErrorFeedback(inner=Int8(block_size=256, stochastic=False), storage='float32')": _INT8,
    "ErrorFeedback(inner=OneBit(block_size=256), storage='float32')": _SIGN,
    "ErrorFeedback(inner=OneBit(block_size=256), storage='bfloat16')": _SIGN,
    "ErrorFeedback(inner=TopK(density=0.1, block_size=1024, values=Int8(block_size=256, stochastic=False)), "
    "storage='float32')": _beyond(0.1),
    "OneBitAdam(inner=None, warmup_steps=1, beta1=0.9)": 0.0,
    # on the way to the owners, which is all there is of a reduce-scatter
    "Bidirectional(inner=Int8(block_size=256, stochastic=False), back=None)": _INT8,
    "Bidirectional(inner=ErrorFeedback(inner=Int4(block_size=128, stochastic=False), storage='float32'), "
    "back=Int8(block_size=256, stochastic=False))": _INT4,
    "LoCo(inner=None, beta=0.2, reset=512, storage='int8')": _INT4,  # nothing has been lost yet
    "Adaptive(budget=8.0, every=100, choices=[Int4(block_size=128, stochastic=False), Int8(block_size=256, "
    "stochastic=False)])": _INT4,  # before anything is measured
    "Hadamard(inner=Int4(block_size=128, stochastic=False), size=32)": _INT4,  # a Gaussian stays one
    # where all ranks are one node, or each is one, there is one hop
    "TwoHops(inner=Int8(block_size=256, stochastic=False), node_size=64, between=None)": _INT8,
    "TwoHops(inner=Int8(block_size=256, stochastic=False), node_size=1, between=Int4(block_size=128, "
    "stochastic=False))": _INT4,
}

Formula = Callable[[int, int], int]


def parameters(numel: int) -> list[ParameterSlice]:
    """Two matrices and a bias without gaps; a lone vector when there is too little for that."""
    if numel < 200:
        return [ParameterSlice("lone", (numel,), 0)]
    rows = numel // 2 // 32
    first, second = ParameterSlice("first", (rows, 32), 0), ParameterSlice("second", (rows // 2, 32), rows * 32)
    used = first.numel + second.numel
    third = ParameterSlice("third", ((numel - used) // 32, 32), used)
    used += third.numel
    return [first, second, third, *([ParameterSlice("bias", (numel - used,), used)] if used < numel else [])]


def padded(nbytes: int) -> int:
    """Every part of a row starts on 16 bytes."""
    return -(-nbytes // 16) * 16


def _blocks(size: int, block: int) -> int:
    return -(-size // block)


def _bits(bits: int, block: int, per_block: int = 4) -> Formula:
    """``bits`` an element and ``per_block`` bytes a block."""
    return lambda s, n: (padded(-(-s * bits // 8)) + padded(per_block * _blocks(s, block))) * (n - 1)


def _kept(density: float, size: int) -> int:
    return max(1, round(density * size))


def _sparse(density: float, block: int, index: Callable[[int, int], int], int8: bool = False) -> Formula:
    """k values and ``index(k, block)`` bytes of positions a block; the last block is rounded up to whole bytes."""

    def formula(s: int, n: int) -> int:
        b = block or s
        whole, rest = (s // b, -(-(s % b) // 8) * 8) if block else (0, -(-s // 8) * 8)
        parts = [(whole, b)] if whole else []
        parts += [(1, rest)] if rest else []
        values = sum(count * _kept(density, length) for count, length in parts)
        positions = sum(count * index(_kept(density, length), length) for count, length in parts)
        coded = padded(values) + padded(4 * _blocks(values, 256)) if int8 else padded(4 * values)
        return (coded + padded(positions)) * (n - 1)

    return formula


def _random(density: float, int8: bool = False) -> Formula:
    def formula(s: int, n: int) -> int:
        k = _kept(density, s)
        return (padded(k) + padded(4 * _blocks(k, 256)) if int8 else padded(4 * k)) * (n - 1)

    return formula


def _cheaper(k: int, block: int) -> int:
    """Bytes of k positions: 8 bits each in up to 256 elements, else 16; or a bitmap."""
    return min(k * (1 if block <= 256 else 2), block // 8)


def _by_parameter(s: int, n: int) -> int:
    """Rows as long as each group's longest: "second" in Int4, bias and lone vectors in fp32, the rest in Int8."""
    groups = {"second": _bits(4, 128), "dense": _FP32, "inner": _bits(8, 256)}
    rows = {label: [0] * n for label in groups}
    for parameter in parameters(s * n):
        dense = len(parameter.shape) < 2 or parameter.numel < 1024
        label = "second" if parameter.fqn == "second" else "dense" if dense else "inner"
        for row in range(n):
            start, stop = max(parameter.offset, row * s), min(parameter.offset + parameter.numel, (row + 1) * s)
            rows[label][row] += max(0, stop - start)
    return sum(groups[label](max(lengths), n) for label, lengths in rows.items() if max(lengths))


def _low_rank(s: int, n: int) -> int:
    """Two all-reduces: P of every matrix with what goes dense, then Q of every matrix."""
    shapes = [parameter.shape for parameter in parameters(s * n)]
    factored = [shape for shape in shapes if len(shape) == 2 and 4 * sum(shape) < shape[0] * shape[1]]
    dense = s * n - sum(a * b for a, b in factored)
    first, second = sum(4 * a for a, _ in factored) + dense, sum(4 * b for _, b in factored)
    return sum(round(2 * 4 * floats * (n - 1) / n) for floats in (first, second))


def _sketched(s: int, n: int) -> int:
    """Three rows of s/10 counters, positions and values of s/10 elements; positions are gathered, not padded."""
    tenth = _kept(0.1, s)
    return (padded(4 * 3 * tenth) + 4 * tenth + padded(4 * tenth)) * (n - 1)


_FP32: Formula = lambda s, n: padded(4 * s) * (n - 1)  # noqa: E731
_ONE = "Int8(block_size=256, stochastic=False)"

# Bytes that one rank sends for N elements in rows of s to n ranks.
SENT: dict[str, Formula] = {
    "NoCompression()": lambda s, n: 2 * 4 * s * (n - 1),  # gloo's reduce-scatter is an all-reduce
    "NoCompressionA2A()": _FP32,
    "BF16()": lambda s, n: padded(2 * s) * (n - 1),
    "FP16()": lambda s, n: (padded(2 * s) + 16) * (n - 1),
    "FP8(format='e4m3', block_size=256)": _bits(8, 256),
    "FP8(format='e5m2', block_size=256)": _bits(8, 256),
    _ONE: _bits(8, 256),
    "Int8(block_size=256, stochastic=True)": _bits(8, 256),
    "Int8(block_size=0, stochastic=False)": lambda s, n: (padded(s) + 16) * (n - 1),
    "Int4(block_size=128, stochastic=False)": _bits(4, 128),
    "Int4(block_size=128, stochastic=True)": _bits(4, 128),
    "OneBit(block_size=256)": _bits(1, 256, 8),
    "OneBit(block_size=0)": lambda s, n: (padded(-(-s // 8)) + 16) * (n - 1),
    "SignSGD(scaled=True, block_size=256)": _bits(1, 256),
    "SignSGD(scaled=False, block_size=256)": _bits(1, 256),
    "QSGD(levels=127, block_size=256, shrink=False)": _bits(8, 256),
    "QSGD(levels=7, block_size=256, shrink=False)": _bits(4, 256),
    "QSGD(levels=7, block_size=256, shrink=True)": _bits(4, 256),
    "QSGD(levels=1, block_size=256, shrink=False)": _bits(2, 256),
    "NaturalCompression()": lambda s, n: padded(s) * (n - 1),
    "TernGrad(block_size=256, clip=0.0, shrink=False)": _bits(2, 256),
    "TernGrad(block_size=256, clip=2.5, shrink=False)": _bits(2, 256),
    "TernGrad(block_size=256, clip=0.0, shrink=True)": _bits(2, 256),
    "TopK(density=0.01, block_size=1024, values=None)": _sparse(0.01, 1024, lambda k, b: 2 * k if b > 256 else k),
    "TopK(density=0.1, block_size=1024, values=None)": _sparse(0.1, 1024, lambda k, b: b // 8),
    "TopK(density=0.05, block_size=256, values=None)": _sparse(0.05, 256, lambda k, b: k),
    "TopK(density=0.1, block_size=0, values=None)": _sparse(0.1, 0, lambda k, b: b // 8),
    f"TopK(density=0.1, block_size=1024, values={_ONE})": _sparse(0.1, 1024, lambda k, b: b // 8, int8=True),
    "RandomK(density=0.1, scaled=True, values=None)": _random(0.1),
    "RandomK(density=0.1, scaled=False, values=None)": _random(0.1),
    f"RandomK(density=0.1, scaled=False, values={_ONE})": _random(0.1, int8=True),
    "ThresholdV(threshold=0.0015, capacity=0.25, block_size=1024, values=None)": _sparse(0.25, 1024, _cheaper),
    f"ThresholdV(threshold=0.0015, capacity=0.25, block_size=1024, values={_ONE})": _sparse(0.25, 1024, _cheaper, True),
    "ThresholdV(threshold=0.001, capacity=0.05, block_size=1024, values=None)": _sparse(0.05, 1024, _cheaper),
    "DGC(density=0.1, momentum=0.9, warmup_steps=0, block_size=1024, values=None)": _sparse(0.1, 1024, _cheaper),
    "DGC(density=0.01, momentum=0.9, warmup_steps=400, block_size=1024, values=None)": _sparse(0.25, 1024, _cheaper),
    "PowerSGD(rank=4)": _low_rank,
    "Sketch(density=0.1, rows=3, width=0.1)": _sketched,
    "GradiVeQ(slice_size=512, components=64, exact=5, refresh=100)": _FP32,
    f"ByParameter(inner={_ONE}, rules={{'*second*': Int4(block_size=128, stochastic=False)}}, dense_below=1024, "
    "dense_1d=True)": _by_parameter,
    "WarmUp(inner=Int4(block_size=128, stochastic=False), steps=1)": _FP32,
    "WarmUp(inner=Int4(block_size=128, stochastic=False), steps=0)": _bits(4, 128),
    f"ErrorFeedback(inner={_ONE}, storage='float32')": _bits(8, 256),
    "ErrorFeedback(inner=OneBit(block_size=256), storage='float32')": _bits(1, 256, 8),
    "ErrorFeedback(inner=OneBit(block_size=256), storage='bfloat16')": _bits(1, 256, 8),
    f"ErrorFeedback(inner=TopK(density=0.1, block_size=1024, values={_ONE}), storage='float32')": (
        _sparse(0.1, 1024, lambda k, b: b // 8, int8=True)
    ),
    "OneBitAdam(inner=None, warmup_steps=1, beta1=0.9)": _FP32,
    f"Bidirectional(inner={_ONE}, back=None)": _bits(8, 256),
    "Bidirectional(inner=ErrorFeedback(inner=Int4(block_size=128, stochastic=False), storage='float32'), "
    f"back={_ONE})": _bits(4, 128),
    "LoCo(inner=None, beta=0.2, reset=512, storage='int8')": _bits(4, 128),
    f"Adaptive(budget=8.0, every=100, choices=[Int4(block_size=128, stochastic=False), {_ONE}])": _bits(4, 128),
    "Hadamard(inner=Int4(block_size=128, stochastic=False), size=32)": (
        lambda s, n: _bits(4, 128)(-(-s // 32) * 32, n)
    ),
    f"TwoHops(inner={_ONE}, node_size=64, between=None)": _bits(8, 256),
    f"TwoHops(inner={_ONE}, node_size=1, between=Int4(block_size=128, stochastic=False))": _bits(4, 128),
}


def published_error(compressor: Compressor | str) -> float:
    """Normalised squared error on Gaussian gradients of a compressor, or of one with such a ``repr``; see ``NMSE``.

    Raises:
        LookupError: The table has no line for it.
    """
    return _line(NMSE, "NMSE", "its published or derived error", compressor)


def bytes_sent(compressor: Compressor, size: int, ranks: int) -> int:
    """Bytes that one rank sends for ``size * ranks`` elements; see ``SENT``.

    Raises:
        LookupError: The table has no line for it.
    """
    return _line(SENT, "SENT", "its byte formula", compressor)(size, ranks)


def _line(table: dict[str, Value], name: str, what: str, compressor: Compressor | str) -> Value:
    key = compressor if isinstance(compressor, str) else repr(compressor)
    if key not in table:
        raise LookupError(f"no oracle for {key}: add {what} under that key to {name} in {__name__}")
    return table[key]
