"""The comparison measures what it says: known errors come out, and the mean is the mean of all ranks."""

import pytest
import torch

from bench.side_by_side.__main__ import Counters, examples, measure, of_pare
from bench.side_by_side.gradients import SOURCES, transformer
from bench.side_by_side.references import references
from common.variants import variants
from strategies.compressors import Codec, Int8, NoCompression


def _reference(name):
    grads, parameters = SOURCES["gauss"](3)
    return measure(references(parameters)[name], grads, Counters(None))["nmse"]


@pytest.mark.parametrize(
    ("name", "nmse"),
    [
        ("torch DDP fp16_compress_hook", 9.4e-8),
        ("torch DDP quantization_pertensor_hook", 1.5e-4),
        ("formula: int8 summed by the collective, 127 // n levels", 6.6e-4),
    ],
)
def test_references_have_the_error_of_their_formula(name, nmse, two_ranks):
    # one scale for 4 million Gaussians: their largest is 5.2 σ; 254 steps over its range, or 126
    for measured in two_ranks.run(_reference, name):
        assert measured == pytest.approx(nmse, rel=0.25)


def _means():
    grads, parameters = SOURCES["gauss"](1)
    exact = of_pare(NoCompression(), parameters, grads, Counters(None))
    off = measure(lambda grad, step: grad, grads, Counters(None))  # forgets the other rank
    return exact["nmse"], off["nmse"]


def test_the_error_is_taken_against_the_mean_of_all_ranks(two_ranks):
    for exact, own in two_ranks.run(_means):
        assert exact < 1e-12 and own == pytest.approx(1.0, rel=0.01)


def _layout():
    grads, parameters = transformer(2, warm_up=0)
    last = parameters[-1]
    return grads.shape[1] == last.offset + last.numel, torch.equal(grads[0], grads[1]), grads.norm().item()


def test_transformer_gradients_differ_by_step_and_rank(two_ranks):
    (fits, same, norm), (_, _, other) = two_ranks.run(_layout)
    assert fits and not same and norm > 0 and norm != other


def test_wrappers_are_left_out():
    names = {type(compressor).__name__ for compressor in examples()}
    assert {"Int8", "TopK", "PowerSGD"} <= names and not names & {"ErrorFeedback", "WarmUp", "ByParameter"}


def test_a_method_without_an_oracle_is_a_clear_failure():
    from bench.side_by_side.oracles import bytes_sent, published_error

    new = Int8(block_size=12)
    for ask in (published_error, lambda method: bytes_sent(method, 100, 2)):
        with pytest.raises(LookupError, match=r"Int8\(block_size=12.*add its .* in bench.side_by_side.oracles"):
            ask(new)


def test_speed_is_measured_of_every_form_of_every_codec():
    from bench.experiments.codec_speed import known

    forms = {repr(form) for cls in variants(Codec) for form in cls.examples()}
    assert {repr(codec) for codec in known().values()} == forms and repr(Int8()) in known()
