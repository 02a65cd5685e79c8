"""Feedback of an averaged error, on gloo ranks."""

import pytest
import torch
import torch.distributed as dist

from strategies.compressors import ErrorFeedback, Int8, LoCo, TopK
from tests.strategies.engines import fit
from tests.strategies.reductions import gradient, make_unit

_SIZE = 512


def _steps(compressor, steps):
    """The residual after each step, and what was sent of the first gradient."""
    unit, kept = make_unit(2 * _SIZE), []
    for step in range(steps):
        unit.step = step
        compressor.reduce_scatter(gradient(dist.get_rank(), 2 * _SIZE, step), torch.empty(_SIZE), unit)
        kept.append(unit.state["residual"].clone())
    return kept


def test_the_error_is_averaged_and_forgotten(two_ranks):
    inner, beta = TopK(0.1, block_size=0), 0.25
    kept = two_ranks.run(_steps, LoCo(inner, beta, 3, "float32"), 4)[0]
    whole = two_ranks.run(_steps, ErrorFeedback(inner), 1)[0]
    torch.testing.assert_close(kept[0], beta * whole[0])
    assert kept[1].norm() > kept[0].norm() > 0
    again = two_ranks.run(_steps, LoCo(inner, beta, 0, "float32"), 4)[0]
    assert torch.equal(kept[2], again[2]) and kept[3].norm() < 0.7 * again[3].norm()  # forgotten before step 3


def test_eight_bits_hold_it(two_ranks):
    exact, coded = (two_ranks.run(_fit_state, storage)[0] for storage in ("float32", "int8"))
    for name, state in coded.items():
        assert state["residual"].dtype == torch.int8 and exact[name]["residual"].dtype == torch.float32


def _fit_state(storage):
    return fit(LoCo(storage=storage), engine="fsdp2")["state"]


def test_a_resumed_run_is_the_uninterrupted_one(two_ranks, tmp_path):
    path = str(tmp_path / "last.ckpt")
    whole = two_ranks.run(fit, LoCo(), engine="fsdp2", steps=4)
    two_ranks.run(fit, LoCo(), path, engine="fsdp2", steps=2)
    for rank, resumed in enumerate(two_ranks.run(fit, LoCo(), engine="fsdp2", steps=4, ckpt_path=path)):
        assert resumed["losses"] == whole[rank]["losses"][2:]


def test_what_cannot_work_is_refused_by_name():
    for wrong, named in (({"beta": 0}, "beta"), ({"reset": -1}, "reset"), ({"storage": "int4"}, "storage")):
        with pytest.raises(ValueError, match=rf"LoCo\.{named}"):
            LoCo(**wrong)
    with pytest.raises(ValueError, match="keeps its own residual"):
        LoCo(ErrorFeedback(Int8()))
