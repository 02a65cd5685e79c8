"""What holds for every engine: FSDP1, FSDP2 and DDP on gloo ranks, through the Trainer."""

from unittest import mock

import pytest
import torch

from strategies import CompressedDDP
from strategies.compressors.bidirectional import Bidirectional
from strategies.compressors.by_parameter import ByParameter
from strategies.compressors.error_feedback import ErrorFeedback
from strategies.compressors.int4 import Int4
from strategies.compressors.int8 import Int8
from strategies.compressors.none import NoCompression
from tests.strategies.engines import ENGINES, Module, Net, error, fit, reference, tolerance
from tests.strategies.test_compressed_fsdp import COMPRESSORS, WAYS

by_engine = pytest.mark.parametrize("engine", ENGINES)


CASES = [(2, compressor) for compressor in COMPRESSORS] + [(3, compressor) for compressor in WAYS]


@pytest.mark.parametrize(("n", "compressor"), CASES, ids=str)
@by_engine
def test_gradient_is_the_mean_over_ranks(engine, n, compressor, two_ranks, three_ranks):
    results = {2: two_ranks, 3: three_ranks}[n].run(fit, compressor, engine=engine)
    assert error(results[0], reference(n)) < tolerance(compressor)
    for result in results[1:]:
        for name, weight in results[0]["weights"].items():
            assert torch.equal(weight, result["weights"][name])


@by_engine
def test_uncompressed_training_is_native_training(engine, two_ranks):
    native, counted = (
        two_ranks.run(fit, compressor, steps=4, engine=engine)[0] for compressor in (None, NoCompression())
    )
    assert error(native, reference(2)) < 1e-6
    assert not native["units"] and not native["traffic"].sent
    for name, weight in native["weights"].items():
        torch.testing.assert_close(counted["weights"][name], weight)


@by_engine
def test_one_reduction_per_unit_and_step_under_accumulation(engine, two_ranks):
    once, twice = (two_ranks.run(fit, Int8(), steps=2, accumulate=k, engine=engine)[0] for k in (1, 2))
    for result in (once, twice):
        calls = {unit: count for (unit, name), count in result["traffic"].calls.items() if name == "all_to_all"}
        assert calls == {name: 2 for name, *_ in result["units"]}
    assert once["traffic"].gradient_bytes() == twice["traffic"].gradient_bytes() > 0
    assert once["traffic"].ideal == twice["traffic"].ideal


@by_engine
def test_accumulated_gradient_is_the_mean_of_its_micro_batches(engine, two_ranks):
    result = two_ranks.run(fit, NoCompression(), steps=1, accumulate=2, engine=engine)[0]
    assert error(result, reference(2)) < 1e-6  # the batches are equal


@by_engine
def test_ideal_bytes_are_those_of_a_ring_over_the_units(engine, two_ranks):
    result = two_ranks.run(fit, Int8(), steps=1, engine=engine)[0]
    passes = 2 if engine == "ddp" else 1  # an all-reduce is a reduce-scatter and an all-gather
    assert result["traffic"].ideal == {name: passes * 4 * numel / 2 for name, _, numel, _ in result["units"]}
    assert sum(valid for *_, valid in result["units"]) == sum(p.numel() for p in Module().parameters())


@by_engine
def test_clipping_scales_by_the_norm_over_all_ranks(engine, two_ranks):
    free, clipped = (two_ranks.run(fit, NoCompression(), steps=1, clip=clip, engine=engine) for clip in (None, 1e-3))
    exact = torch.cat([g.flatten() for g in reference(2).values()]).norm().item()
    assert [result["norms"][0] for result in free] == pytest.approx([exact, exact], rel=1e-5)
    start = dict(Module().net.named_parameters())
    moves = [clipped[0]["weights"][name] - start[name] for name in start]
    moved = torch.cat([move.flatten() for move in moves]).norm().item()
    assert moved == pytest.approx(0.1 * 1e-3, rel=1e-2)  # SGD at 0.1 with a gradient of norm 1e-3


KINDS = [("fsdp1", "sharded"), ("fsdp1", "full"), ("fsdp2", "sharded"), ("fsdp2", "full"), ("ddp", None)]


@pytest.mark.parametrize(("engine", "kind"), KINDS)
def test_checkpoint_resumes_where_it_left_off(engine, kind, two_ranks, tmp_path):
    options = {"engine": engine, **({"state_dict_type": kind} if kind else {})}
    whole = two_ranks.run(fit, Int8(), steps=4, **options)[0]
    path = str(tmp_path / "last.ckpt")
    two_ranks.run(fit, Int8(), folder=path, steps=3, **options)
    resumed = two_ranks.run(fit, Int8(), steps=4, ckpt_path=path, **options)[0]
    assert resumed["step"] == 4
    for name, weight in whole["weights"].items():
        assert torch.equal(weight, resumed["weights"][name])
    assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]  # nothing half-written beside it


def _expect_refusal(path, options):
    try:
        fit(Int8(), ckpt_path=path, module=Module(width=11), **options)
    except (ValueError, FileNotFoundError) as refusal:
        return str(refusal)
    return "accepted"


@pytest.mark.parametrize(("engine", "kind"), KINDS)
def test_checkpoint_of_another_model_is_refused_by_name(engine, kind, two_ranks, tmp_path):
    options = {"engine": engine, **({"state_dict_type": kind} if kind else {})}
    path = str(tmp_path / "last.ckpt")
    two_ranks.run(fit, Int8(), folder=path, **options)
    for message in two_ranks.run(_expect_refusal, path, options):
        assert path in message and "does not fit this model" in message
    for message in two_ranks.run(_expect_refusal, path + ".no", options):
        assert "no checkpoint at" in message


@by_engine
def test_bf16_mixed_reduces_in_fp32(engine, two_ranks):
    result = two_ranks.run(fit, NoCompression(), precision="bf16-mixed", engine=engine)[0]
    factor = 1 if engine == "ddp" else 2  # gloo's reduce-scatter is an all-reduce
    assert result["traffic"].gradient_bytes() == factor * sum(result["traffic"].ideal.values())
    assert error(result, reference(2)) < 2e-2


class Fused(Module):
    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 1e-2, fused=True)


def _fused(engine):
    return fit(NoCompression(), module=Fused(), engine=engine, precision="bf16-mixed", clip=1e-3)


@by_engine
def test_bf16_mixed_clips_under_a_fused_optimizer(engine, two_ranks):
    for result in two_ranks.run(_fused, engine):
        assert result["step"] == 2


class Unlike(Module):
    """Every rank draws other weights."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(torch.distributed.get_rank())
        self.net = Net()


def _unlike(engine, **options):
    return fit(Int8(16), module=Unlike(), engine=engine, steps=1, **options)


REPLICATED = [("ddp", {}), ("fsdp1", {"sharding_strategy": "NO_SHARD"}), ("fsdp2", {"replicas": 2})]
REPLICATED += [("fsdp2", {"replicas": 2, "replica_compressor": Int8(16)})]


@pytest.mark.parametrize(("engine", "options"), REPLICATED, ids=repr)
def test_replicas_begin_with_one_model_whatever_they_drew(engine, options, four_ranks):
    first, *others = four_ranks.run(_unlike, engine, **options)
    for other in others:
        assert all(torch.equal(weight, other["weights"][name]) for name, weight in first["weights"].items())


def _named(engine, options):
    method = ByParameter(Int4(16), {"net.outlet.*": NoCompression(), "net.blocks.0.up.weight": Int8(16)}, 0, False)
    seen = []
    with mock.patch.object(method, "_choose", lambda parameter: seen.append(parameter.fqn) or ("inner", method.inner)):
        fit(method, engine=engine, **options)
    return set(seen), {name for name, _ in Module().named_parameters()}


@pytest.mark.parametrize("engine", ENGINES)
def test_rules_see_full_names_under_every_engine(engine, two_ranks):
    for seen, names in two_ranks.run(_named, engine, {}):
        assert seen == names


def test_residuals_are_refused_where_gradients_are_scaled_by_what_changes(two_ranks):
    for said in two_ranks.run(_refused_scaled):
        assert said == (
            "ErrorFeedback keeps gradients from step to step, and precision=16-mixed scales them by a factor that "
            "changes: use bf16-mixed"
        )


class Scaled(CompressedDDP):
    def setup_optimizers(self, trainer):
        with mock.patch.object(self.precision_plugin, "precision", "16-mixed"):  # which CPUs do not have
            super().setup_optimizers(trainer)


def _refused_scaled():
    try:
        fit(Bidirectional(ErrorFeedback(Int4(16)), Int8(16)), engine=Scaled)
    except ValueError as error:
        return str(error)
    return None
