"""Codecs chosen by measured error under a byte budget, on gloo ranks."""

import pytest
import torch
import torch.distributed as dist

from strategies.compressors import BF16, Adaptive, ErrorFeedback, Int4, Int8, OneBit
from strategies.compressors.adaptive import least_error
from strategies.traffic import Traffic
from strategies.units import Unit
from tests.strategies.engines import error, fit, reference

CHOICES = [Int4(16), Int8(16), BF16()]
_SIZE = 4096


def test_the_most_error_is_saved_for_the_bytes():
    errors, sizes = [[10.0, 1.0, 0.0], [100.0, 90.0, 0.0], [1.0, 0.5, 0.0]], [[1, 4, 8]] * 3
    assert least_error(errors, sizes, 3) == [0, 0, 0]
    assert least_error(errors, sizes, 10) == [0, 2, 0]  # 100 for 7 bytes before 9 for 3
    assert least_error(errors, sizes, 13) == [1, 2, 0]
    assert least_error(errors, sizes, 24) == [2, 2, 2]
    assert least_error([[5.0, 5.0]], [[1, 9]], 99) == [0]  # nothing saved is not worth a byte
    assert sum(sizes[i][place] for i, place in enumerate(least_error(errors, sizes, 17))) <= 17


def _steps(compressor, steps=4):
    """What each of two units was sent in each step; the second one's gradient is a thousand times the first's."""
    n, rank = dist.get_world_size(), dist.get_rank()
    traffic = Traffic()
    units = [Unit(name, [], n * _SIZE, dist.group.WORLD, traffic) for name in ("small", "large")]
    for part in compressor.within():
        part.meet(units)
    sent, chosen = [], []
    for step in range(steps):
        for unit, scale in zip(units, (1e-3, 1.0), strict=True):
            unit.step = step
            draw = torch.Generator().manual_seed(10 * step + rank)
            compressor.reduce_scatter(torch.randn(n * _SIZE, generator=draw) * scale, torch.empty(_SIZE), unit)
        sent.append(traffic.take().bytes_by("unit"))
        chosen.append(next(part.chosen() for part in compressor.within() if part.chosen()))
    return sent, chosen


def test_bits_go_where_the_error_is_and_keep_to_the_budget(two_ranks):
    results = two_ranks.run(_steps, Adaptive(6.0, 10, [OneBit(), Int4(), Int8()]))
    sent, chosen = results[0]
    assert chosen == results[1][1]  # the same on all ranks
    assert chosen[0] == {"small": "onebit", "large": "int8"}  # as measured in the first step, for the next
    assert all(sum(step.values()) <= 6 / 8 * 2 * _SIZE for step in sent[1:])
    measured = sum(sent[0].values()) - 2 * (_SIZE // 2 + 4 * _SIZE // 128)  # both begin with four bits
    assert measured == 2 * 3 * 8 and sent[1] == sent[2] == sent[3]


def _waits():
    """Reads of tensors by the host in each of six steps, the fourth with choices that a resume has brought."""
    reads, steps = [], []
    method = Adaptive(6.0, 2, [OneBit(), Int4(), Int8()])
    units = [Unit(name, [], _SIZE, dist.group.WORLD, Traffic()) for name in ("a", "b", "c")]
    method.meet(units)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("tolist", "item", "__int__", "__float__", "__bool__"):
            plain = getattr(torch.Tensor, name)

            def counted(tensor, plain=plain):
                reads.append(tensor)
                return plain(tensor)

            patch.setattr(torch.Tensor, name, counted)
        for step in range(6):
            for unit in units:
                if step == 3:
                    unit.state["choice"] = torch.tensor(1)
                unit.step = step
                method.reduce_scatter(torch.randn(_SIZE), torch.empty(_SIZE // 2), unit)
            steps.append((len(reads), method.chosen()))
            reads.clear()
    return steps


def test_the_host_waits_once_a_measurement_and_once_for_what_a_resume_brings(two_ranks):
    for steps in two_ranks.run(_waits):
        assert [reads for reads, _ in steps] == [1, 0, 1, 3, 1, 0]
        assert set(steps[3][1].values()) == {"int4"}  # not what was chosen before


def _fit(**options):
    return fit(ErrorFeedback(Adaptive(12.0, 2, CHOICES)), **options)


@pytest.mark.parametrize("engine", ["fsdp1", "fsdp2", "ddp"])
def test_choices_are_saved_and_training_goes_on_bit_for_bit(engine, two_ranks, tmp_path):
    path = str(tmp_path / "last.ckpt")
    whole = two_ranks.run(_fit, engine=engine, steps=4)
    two_ranks.run(_fit, engine=engine, folder=path, steps=1)  # measured and chosen, and not yet used
    for rank, resumed in enumerate(two_ranks.run(_fit, engine=engine, ckpt_path=path, steps=4)):
        assert resumed["losses"] == whole[rank]["losses"][1:]
        assert error(whole[rank], reference(2)) < 0.2
        assert all("choice" in state for state in whole[rank]["state"].values())
        for name, weight in whole[rank]["weights"].items():
            assert torch.equal(weight, resumed["weights"][name])


def _refusal():
    try:
        fit(Adaptive(1.5, 2, CHOICES), engine="fsdp2")
    except ValueError as refused:
        return str(refused)
    return "accepted"


def test_what_cannot_work_is_refused_by_name(two_ranks):
    for said in two_ranks.run(_refusal):
        assert "Adaptive.budget=1.5" in said and "give at least that" in said
    with pytest.raises(ValueError, match=r"Adaptive\.every"):
        Adaptive(4.0, 0)
    with pytest.raises(ValueError, match=r"Adaptive\.choices"):
        Adaptive(4.0, choices=[])
