"""Residuals in checkpoints: a resumed run goes on as if it had not stopped, on any number of ranks."""

import pytest
import torch

from common.variants import variants
from strategies import residuals
from strategies.compressors import Compressor
from strategies.compressors.error_feedback import ErrorFeedback
from strategies.compressors.int8 import Int8
from strategies.compressors.onebit import OneBit
from strategies.compressors.qsgd import QSGD
from strategies.compressors.topk import TopK
from tests.strategies.engines import ENGINES, Module, fit


@pytest.mark.parametrize("storage", ["float32", "int8"])
@pytest.mark.parametrize("kind", ["sharded", "full"])
@pytest.mark.parametrize("engine", ENGINES)
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(engine, kind, storage, two_ranks, tmp_path):
    method, path = ErrorFeedback(TopK(0.2, values=QSGD(levels=7)), storage), str(tmp_path / "last.ckpt")
    options = {"engine": engine} | ({"state_dict_type": kind} if engine != "ddp" else {})
    whole = two_ranks.run(fit, method, steps=4, **options)
    two_ranks.run(fit, method, folder=path, steps=2, **options)
    resumed = two_ranks.run(fit, method, steps=4, ckpt_path=path, **options)
    for rank in range(2):
        assert set(resumed[rank]["state"]) == set(whole[rank]["state"]) != set()
        for name, weight in whole[rank]["weights"].items():
            assert torch.equal(weight, resumed[rank]["weights"][name])
        for unit, state in whole[rank]["state"].items():
            assert state["residual"].any()
            assert all(torch.equal(part, resumed[rank]["state"][unit][name]) for name, part in state.items())
    assert any(
        not torch.equal(whole[0]["state"][unit]["residual"], whole[1]["state"][unit]["residual"])
        for unit in whole[0]["state"]
    )


def _owed(ranks, unit):
    """Mean of what the ranks owe, by parameter; and of all that is no parameter."""
    flat = torch.stack([rank["state"][unit]["residual"] for rank in ranks]).mean(0)
    pieces = {}
    for one in ranks[0]["slices"][unit]:
        place = slice(one.offset, one.offset + one.numel)
        pieces.setdefault(one.fqn, []).append(flat[place].clone())
        flat[place] = 0
    return {fqn: torch.cat(parts) for fqn, parts in pieces.items()}, flat


@pytest.mark.parametrize("engine", ENGINES)
def test_three_ranks_owe_what_two_did(engine, two_ranks, three_ranks, tmp_path):
    method, path = ErrorFeedback(OneBit()), str(tmp_path / "last.ckpt")
    before = two_ranks.run(fit, method, folder=path, steps=2, engine=engine)
    after = three_ranks.run(fit, method, ckpt_path=path, steps=2, engine=engine)  # at its last step: nothing is sent
    for unit in before[0]["state"]:
        (was, was_padding), (now, padding) = _owed(before, unit), _owed(after, unit)
        assert any(part.any() for part in was.values()) and was.keys() == now.keys()
        for fqn, part in was.items():
            torch.testing.assert_close(now[fqn], part)
        assert not was_padding.any() and not padding.any()


def _refusal(path, compressor, width=None):
    try:
        fit(compressor, ckpt_path=path, module=Module(width=width))
    except ValueError as error:
        return str(error)
    return "accepted"


def test_another_compressors_residual_is_refused(two_ranks, tmp_path):
    path = str(tmp_path / "last.ckpt")
    two_ranks.run(fit, ErrorFeedback(OneBit()), folder=path)
    for other in (ErrorFeedback(TopK()), Int8()):
        assert all("same compressor" in message for message in two_ranks.run(_refusal, path, other))


def test_another_models_residual_is_refused(two_ranks):
    assert all("another model" in message for message in two_ranks.run(_other_model))


def _other_model():
    from tests.strategies.reductions import make_unit

    units = [make_unit(4096)]
    residuals.store(units[0], "residual", torch.ones(4096))
    saved = residuals.collect(units, "X()")
    try:
        residuals.restore([saved, saved], [make_unit(8192)], "X()", torch.device("cpu"))
    except ValueError as error:
        return str(error)
    return "accepted"


def test_a_run_without_state_saves_none_and_starts_feedback_from_nothing(two_ranks, tmp_path):
    path = tmp_path / "last.ckpt"
    two_ranks.run(fit, Int8(), folder=str(path))
    assert not list(path.glob("compressor*"))
    result = two_ranks.run(fit, ErrorFeedback(OneBit()), ckpt_path=str(path), steps=3)
    assert all(state["residual"].any() for state in result[0]["state"].values())


def _each_its_own(paths):
    from torch.distributed import get_rank

    try:
        fit(ErrorFeedback(Int8()), ckpt_path=paths[get_rank()], steps=4, engine="ddp")
    except RuntimeError as error:
        return str(error)
    return "accepted"


def test_ranks_that_read_different_checkpoints_do_not_train_on(two_ranks, tmp_path):
    paths = [str(tmp_path / f"{steps}.ckpt") for steps in (2, 3)]
    for steps, path in zip((2, 3), paths, strict=True):
        two_ranks.run(fit, ErrorFeedback(Int8()), folder=path, steps=steps, engine="ddp")
    for message in two_ranks.run(_each_its_own, paths):
        assert "rank 0 goes on at {'step': 2" in message and "rank 1 at {'step': 3" in message


def _wide(**options):
    from tests.strategies.test_compressed_ddp import Wide

    return fit(ErrorFeedback(Int8()), module=Wide(), engine="ddp", bucket_cap_mb=1, **options)


def test_residuals_of_several_buckets_come_back_to_theirs(two_ranks, tmp_path):
    path = str(tmp_path / "last.ckpt")
    whole = two_ranks.run(_wide, steps=4)
    two_ranks.run(_wide, steps=2, folder=path)
    for rank, resumed in enumerate(two_ranks.run(_wide, steps=4, ckpt_path=path)):
        assert len(resumed["state"]) > 1
        assert resumed["norms"] == whole[rank]["norms"][2:] and resumed["losses"] == whole[rank]["losses"][2:]
        for unit, state in whole[rank]["state"].items():
            assert torch.equal(state["residual"], resumed["state"][unit]["residual"])


def _on_dirty_memory(method):
    """Three steps, with what torch allocates left as it is or filled with NaN: outputs and state."""
    import torch.distributed as dist

    from tests.strategies.reductions import gradient, make_unit

    n, size, results = dist.get_world_size(), 1500, []
    for dirty in (False, True):
        torch.use_deterministic_algorithms(dirty, warn_only=True)  # fills fresh memory
        try:
            unit, outputs = make_unit(n * size), []
            for step in range(3):
                unit.step, grad = step, gradient(dist.get_rank(), n * size, step)
                method.all_reduce(grad, unit)
                outputs.append(grad)
            results.append([*outputs, *unit.state.values()])
        finally:
            torch.use_deterministic_algorithms(False)
    return [torch.equal(a, b) for a, b in zip(*results, strict=True)]


@pytest.mark.parametrize("method", [one for cls in variants(Compressor) for one in cls.examples()], ids=repr)
def test_no_method_reads_memory_that_nobody_wrote(method, two_ranks):
    for equal in two_ranks.run(_on_dirty_memory, method):
        assert all(equal)
