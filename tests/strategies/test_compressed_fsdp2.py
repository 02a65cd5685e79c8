"""What is FSDP2's own: layout, operations, hybrid sharding; on gloo ranks."""

import warnings

import lightning.pytorch as L
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, TensorDataset

from strategies import CompressedFSDP2, transport
from strategies.compressors.int8 import Int8
from strategies.compressors.none import NoCompression
from strategies.fsdp2_collectives import UnitReduceScatter
from strategies.traffic import Traffic
from strategies.units import Unit
from tests.strategies.engines import Module, error, fit, reference, rows


def _run(*args, **kwargs):
    return fit(*args, engine="fsdp2", **kwargs)


class Spy:
    """Reduces natively and keeps what it was given."""

    def __init__(self) -> None:
        self.seen = {}

    def warm_up(self, job, use="reduce"):
        return set()

    def reduce_scatter(self, grad, output, unit):
        self.seen[unit.name] = (grad.clone(), unit.parameters)
        transport.reduce_scatter_mean(grad, output, unit)


def _layout():
    """Largest difference between a unit's slices and this rank's own gradient; what lies outside all slices."""
    spy, own = Spy(), Module()
    _run(spy, steps=1)
    own.net(rows(dist.get_rank())[:4]).pow(2).mean().backward()
    exact = {name: p.grad for name, p in own.named_parameters()}
    wrong, outside, found = 0.0, 0.0, {}
    for name, (grad, slices) in spy.seen.items():
        prefix = "" if name == "root" else f"{name}."
        for piece in slices:
            start = found.get(prefix + piece.fqn, 0)
            found[prefix + piece.fqn] = start + piece.shape[0]
            part = exact[prefix + piece.fqn][start : start + piece.shape[0]]
            window = grad[piece.offset : piece.offset + piece.numel]
            wrong = max(wrong, (window.view(piece.shape) - part).abs().max().item())
            window.zero_()
        outside += grad.abs().sum().item()
    return wrong, outside, found == {name: p.shape[0] for name, p in own.named_parameters()}


def test_slices_say_where_every_row_of_every_parameter_lies(three_ranks):
    for wrong, outside, complete in three_ranks.run(_layout):
        assert wrong < 1e-6 and outside == 0.0 and complete


def test_every_unit_has_its_name_and_its_parameters(two_ranks):
    units = two_ranks.run(_run, NoCompression())[0]["units"]
    assert [name for name, *_ in units] == ["root", "net.blocks.0", "net.blocks.1"]
    root, first, _ = units
    assert first[1] == 2 * ["up.weight", "up.bias", "down.weight", "down.bias"]  # rank 0's rows, then rank 1's
    assert root[1] == 2 * ["net.inlet.weight", "net.inlet.bias", "net.outlet.weight", "net.outlet.bias"]
    assert first[2] == 2 * (7 * 7 + 7 + 4 * 13 + 4)  # 13 and 7 rows are padded to 14 and 8


def _operate(op):
    unit = Unit("unit", [], 8, dist.group.WORLD, Traffic())
    comm = UnitReduceScatter(unit, lambda unit, grad, output: NoCompression().reduce_scatter(grad, output, unit))
    grad = torch.arange(8.0) * (dist.get_rank() + 1)
    output = comm.allocate((4,), dtype=torch.float32, device=torch.device("cpu"))
    comm(output_tensor=output, input_tensor=grad, group=dist.group.WORLD, op=op)
    return output


@pytest.mark.parametrize(("op", "factor"), [(dist.ReduceOp.AVG, 1.5), (dist.ReduceOp.SUM, 3.0)])
def test_the_operation_that_torch_asks_for_is_honoured(op, factor, two_ranks):
    assert torch.equal(torch.cat(two_ranks.run(_operate, op)), torch.arange(8.0) * factor)


def test_an_operation_that_cannot_be_read_is_refused():
    class Premultiplied:
        def __str__(self):
            return "PREMUL_SUM"

    comm = UnitReduceScatter(Unit.__new__(Unit), None)
    comm.unit.name, comm.unit.numel, comm.unit.world_size = "unit", 8, 2
    with pytest.raises(ValueError, match="set_force_sum_reduction_for_comms"):
        comm(torch.empty(4), torch.empty(8), None, Premultiplied())
    with pytest.raises(RuntimeError, match="got no gradient"):
        comm(torch.empty(3), torch.empty(6), None, dist.ReduceOp.AVG)


class Divided(Module):
    """Asks FSDP2 to divide gradients by 3 instead of the number of ranks."""

    def on_fit_start(self):
        for module in self.trainer.strategy._fsdp_modules():
            module.set_gradient_divide_factor(3.0)


def _divided():
    return _run(Int8(16), module=Divided())


def test_a_gradient_divide_factor_is_honoured(two_ranks):
    result = two_ranks.run(_divided)[0]
    assert error(result, {name: grad * 2 / 3 for name, grad in reference(2).items()}) < 1.5e-2


class Partly(Module):
    """A layer that no step uses, and one that is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.net.unused = nn.Linear(4, 4)
        self.net.frozen = nn.Linear(3, 3).requires_grad_(False)

    def _keep(self):
        self.unused = self.net.unused.weight.grad.full_tensor()


def _partly():
    module = Partly()
    result = _run(Int8(), module=module)
    return module.unused, result["slices"]["root"]


def test_unused_parameters_reduce_to_zero_and_frozen_ones_not_at_all(two_ranks):
    unused, slices = two_ranks.run(_partly)[0]
    assert torch.equal(unused, torch.zeros(4, 4))
    names = {piece.fqn for piece in slices}
    assert "net.unused.weight" in names and "net.frozen.weight" not in names


class Sharded(Module):
    """Shards itself, as Lightning asks of users of FSDP2: each layer, and no root."""

    def configure_model(self):
        for layer in (self.net.inlet, self.net.outlet, *self.net.blocks):
            fully_shard(layer, mesh=self.device_mesh["data_parallel"])


def _sharded():
    return _run(Int8(), module=Sharded())


def test_a_module_that_shards_itself_is_left_as_it_is(two_ranks):
    result = two_ranks.run(_sharded)[0]
    assert [name for name, *_ in result["units"]] == ["net.inlet", "net.blocks.0", "net.blocks.1", "net.outlet"]
    assert error(result, reference(2)) < 1.5e-2


@pytest.mark.parametrize(("sharding", "gathers"), [("FULL_SHARD", 2), ("SHARD_GRAD_OP", 1)])
def test_parameter_gathers_are_counted(sharding, gathers, two_ranks):
    result = two_ranks.run(_run, Int8(), steps=3, sharding_strategy=sharding)[0]
    calls = {unit: count for (unit, name), count in result["traffic"].calls.items() if name == "all_gather"}
    assert calls == {"root": 3, "net.blocks.0": 3 * gathers, "net.blocks.1": 3 * gathers}
    size = {name: numel for name, _, numel, _ in result["units"]}
    assert result["traffic"].bytes_by("unit", gradients=False) == {u: calls[u] * 4 * size[u] // 2 for u in calls}


# Hybrid sharding: two copies of a model that is sharded over two ranks each.


@pytest.mark.parametrize("compressor", [NoCompression(), Int8(16)], ids=lambda c: c.name)
def test_hybrid_sharding_averages_over_all_ranks(compressor, four_ranks):
    results = four_ranks.run(_run, compressor, replicas=2, clip=1.0)
    tolerance = {"none": 1e-6, "int8": 1.5e-2}[compressor.name]
    exact = torch.cat([g.flatten() for g in reference(4).values()]).norm().item()
    for result in results:
        assert error(result, reference(4)) < tolerance
        assert result["norms"][0] == pytest.approx(exact, rel=tolerance)
        for name, weight in results[0]["weights"].items():
            assert torch.equal(weight, result["weights"][name])
    traffic, units = results[3]["traffic"], results[3]["units"]
    for name, _, numel, _ in units:
        assert traffic.calls[name, "all_reduce"] == 2
        assert traffic.sent[name, "all_reduce", "values"] == 2 * 4 * numel // 2  # 2(2 − 1)/2 of the shard, in 2 steps
        assert traffic.ideal[name] == 2 * (4 * numel / 2 + 4 * numel / 2)


def test_hybrid_sharding_resumes_where_it_left_off(four_ranks, tmp_path):
    whole = four_ranks.run(_run, Int8(), steps=3, replicas=2)[0]
    path = str(tmp_path / "last.ckpt")
    four_ranks.run(_run, Int8(), folder=path, steps=2, replicas=2)
    for resumed in four_ranks.run(_run, Int8(), steps=3, ckpt_path=path, replicas=2):
        for name, weight in whole["weights"].items():
            assert torch.equal(weight, resumed["weights"][name])


def _expect_refusal(**options):
    try:
        _run(Int8(), **options)
    except ValueError as refusal:
        return str(refusal)
    return "accepted"


@pytest.mark.parametrize("replicas", [2, 3])
def test_replicas_that_leave_nothing_to_shard_are_refused(replicas, two_ranks):
    for message in two_ranks.run(_expect_refusal, replicas=replicas):
        assert f"replicas={replicas}" in message


def _evaluated():
    """Validation between steps must neither change training nor leave parameters gathered."""
    warnings.simplefilter("ignore")
    module = Validated()
    trainer = L.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=CompressedFSDP2(compressor=Int8()),
        max_steps=3,
        val_check_interval=1,
        num_sanity_val_steps=0,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        use_distributed_sampler=False,
    )
    loader = DataLoader(TensorDataset(rows(dist.get_rank())), batch_size=4)
    trainer.fit(module, loader, loader)
    return module.losses, module.kinds


class Validated(Module):
    def validation_step(self, batch, batch_idx):
        self.net(batch[0])

    def on_train_batch_start(self, batch, batch_idx):
        self.kinds = {type(p).__name__ for p in self.parameters()}


def test_validation_leaves_training_as_it_was(two_ranks):
    (losses, kinds), _ = two_ranks.run(_evaluated)
    assert losses == two_ranks.run(_run, Int8(), steps=3)[0]["losses"]
    assert kinds == {"DTensor"}  # sharded when training goes on


@pytest.mark.parametrize(
    ("options", "error_type", "names"),
    [
        ({"sharding_strategy": "NO_SHARD"}, ValueError, "CompressedDDP"),
        ({"replicas": 0}, ValueError, "replicas"),
        ({"parameter_compressor": NoCompression()}, TypeError, "NoCompression"),
    ],
)
def test_wrong_arguments_are_refused_with_the_fix(options, error_type, names):
    with pytest.raises(error_type, match=names):
        CompressedFSDP2(**options)
