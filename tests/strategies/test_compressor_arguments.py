"""Arguments that make no sense are refused when a compressor is built, with the reason."""

import pytest

from strategies.compressors.by_parameter import ByParameter
from strategies.compressors.dgc import DGC
from strategies.compressors.error_feedback import ErrorFeedback
from strategies.compressors.fp8 import FP8
from strategies.compressors.gradiveq import GradiVeQ
from strategies.compressors.int4 import Int4
from strategies.compressors.int8 import Int8
from strategies.compressors.none import NoCompression
from strategies.compressors.onebit import OneBit
from strategies.compressors.powersgd import PowerSGD
from strategies.compressors.qsgd import QSGD
from strategies.compressors.randomk import RandomK
from strategies.compressors.signsgd import SignSGD
from strategies.compressors.sketch import Sketch
from strategies.compressors.terngrad import TernGrad
from strategies.compressors.thresholdv import ThresholdV
from strategies.compressors.topk import TopK
from strategies.compressors.warmup import WarmUp


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: Int8(block_size=-1), "block_size"),
        (lambda: Int4(block_size=127), "use 128"),
        (lambda: OneBit(block_size=100), "multiple of 8"),
        (lambda: QSGD(levels=7, block_size=7), "multiple of 2"),
        (lambda: FP8("e3m4"), "e4m3"),
        (lambda: QSGD(levels=0), "levels"),
        (lambda: QSGD(levels=128), "8 bits"),
        (lambda: TernGrad(clip=-1.0), "clip"),
        (lambda: TopK(density=0.0), "above 0"),
        (lambda: TopK(density=1.5), "at most 1"),
        (lambda: TopK(density=float("nan")), "above 0"),
        (lambda: RandomK(density=-0.1), "above 0"),
        (lambda: ThresholdV(threshold=0.0), "threshold"),
        (lambda: ThresholdV(capacity=0.0), "above 0"),
        (lambda: ThresholdV(capacity=1e-4, block_size=1024), "room for none"),
        (lambda: TopK(values=TopK()), "two sparsifiers"),
        (lambda: TopK(values=RandomK()), "two sparsifiers"),
        (lambda: RandomK(values=TopK()), "two sparsifiers"),
        (lambda: TopK(values=NoCompression()), "codec"),
        (lambda: ErrorFeedback(ErrorFeedback(Int8())), "own residual"),
        (lambda: ErrorFeedback(WarmUp(ErrorFeedback(Int8()))), "own residual"),
        (lambda: ErrorFeedback(SignSGD()), "scaled=True"),
        (lambda: ErrorFeedback(Int8(), storage="int2"), "storage"),
        (lambda: WarmUp(Int8(), steps=-1), "steps"),
        (lambda: DGC(density=2.0), "at most 1"),
        (lambda: DGC(momentum=1.0), "momentum"),
        (lambda: DGC(warmup_steps=-1), "warmup_steps"),
        (lambda: DGC(values=TopK()), "two sparsifiers"),
        (lambda: ErrorFeedback(DGC()), "own residual"),
        (lambda: PowerSGD(rank=0), "rank"),
        (lambda: Sketch(density=0.0), "above 0"),
        (lambda: Sketch(rows=4), "odd"),
        (lambda: Sketch(width=0.0), "above 0"),
        (lambda: GradiVeQ(components=600), "slice_size"),
        (lambda: GradiVeQ(exact=0), "exact"),
        (lambda: TopK(values=Sketch()), "two sparsifiers"),
        (lambda: ByParameter(PowerSGD()), "outside"),
        (lambda: ByParameter(Int8(), dense_below=-1), "dense_below"),
        (lambda: ByParameter(ErrorFeedback(Int8())), "outside"),
    ],
)
def test_bad_arguments_are_refused_with_the_reason(make, reason):
    with pytest.raises(ValueError, match=reason):
        make()


@pytest.mark.parametrize(
    ("given", "used"),
    [
        (RandomK(0.1), RandomK(0.1, scaled=False)),
        (QSGD(levels=1), QSGD(levels=1, shrink=True)),
        (TernGrad(), TernGrad(shrink=True)),
        (Int8(stochastic=True), Int8()),
        (TopK(values=QSGD()), TopK(values=QSGD(shrink=True))),
        (WarmUp(RandomK(0.1), 3), WarmUp(RandomK(0.1, scaled=False), 3)),
    ],
)
def test_error_feedback_takes_the_contractive_form(given, used):
    assert repr(ErrorFeedback(given).inner) == repr(used) and used.contractive


def test_a_hybrid_is_named_by_its_parts():
    method = ErrorFeedback(TopK(density=0.1, values=QSGD()))
    assert method.name == "error_feedback(topk(qsgd))"
    assert method.config()["inner"]["values"]["class"] == "QSGD"
