"""The engine: real FSDP1 on gloo ranks, through the Trainer."""

import warnings

import lightning.pytorch as L
import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.utils.data import DataLoader, TensorDataset

from strategies import CompressedFSDP
from strategies.compressors import known_compressors
from strategies.compressors.int8 import Int8
from strategies.compressors.none import NoCompression
from strategies.units import transformer_blocks
from tests.strategies.oracles import NMSE

COMPRESSORS = [cls.examples()[0] for cls in known_compressors()]


def _tolerance(compressor) -> float:
    """Relative L2 error of a whole gradient that has passed through the engine once: small blocks are uneven."""
    return 1e-6 + 3 * NMSE[repr(compressor)] ** 0.5


class Block(nn.Module):
    """Two layers whose sizes divide by no number of ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(7, 13), nn.Linear(13, 7)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)))


class Net(nn.Module):
    _no_split_modules = ("Block",)

    def __init__(self) -> None:
        super().__init__()
        self.inlet, self.blocks, self.outlet = nn.Linear(5, 7), nn.Sequential(Block(), Block()), nn.Linear(7, 3)

    def forward(self, x):
        return self.outlet(self.blocks(self.inlet(x)))


class Module(L.LightningModule):
    """Keeps the whole reduced gradient of every step."""

    def __init__(self, width: int | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = Net()
        if width:
            self.net.outlet = nn.Linear(7, width)
        self.grads: list[dict[str, torch.Tensor]] = []
        self.norms: list[float] = []

    def training_step(self, batch, batch_idx):
        return self.net(batch[0]).pow(2).mean()

    def on_before_optimizer_step(self, optimizer):
        self.norms.append(self.trainer.strategy.grad_norm().item())
        with FSDP.summon_full_params(self.trainer.strategy.model, with_grads=True):
            self.grads.append({n: p.grad.float().clone() for n, p in self.net.named_parameters()})

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1, momentum=0.9)


def _rows(rank: int) -> torch.Tensor:
    """Four equal batches of four: the order of batches, which is the data's business, cannot matter here."""
    return torch.randn(4, 5, generator=torch.Generator().manual_seed(rank)).repeat(4, 1)


def _fit(compressor, folder=None, steps=2, ckpt_path=None, module=None, clip=None, accumulate=1, **strategy):
    warnings.simplefilter("ignore")
    precision = strategy.pop("precision", "32-true")
    module = module or Module()
    engine = CompressedFSDP(compressor=compressor, **strategy)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=torch.distributed.get_world_size(),
        strategy=engine,
        max_steps=steps,
        gradient_clip_val=clip,
        accumulate_grad_batches=accumulate,
        precision=precision,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        use_distributed_sampler=False,
    )
    loader = DataLoader(TensorDataset(_rows(torch.distributed.get_rank())), batch_size=4)
    trainer.fit(module, loader, ckpt_path=ckpt_path)
    if folder is not None:
        trainer.save_checkpoint(folder)
    units = [(u.name, [p.fqn for p in u.parameters], u.numel, u.valid_numel) for u in engine.units]
    return {
        "grads": module.grads,
        "norms": module.norms,
        "units": units,
        "traffic": engine.traffic.take(),
        "weights": _whole(trainer),
        "step": trainer.global_step,
    }


def _whole(trainer) -> dict[str, torch.Tensor]:
    with FSDP.summon_full_params(trainer.strategy.model):
        parameters = trainer.lightning_module.net.named_parameters()
        return {n.replace("_fsdp_wrapped_module.", ""): p.detach().clone() for n, p in parameters}


def _reference(n: int) -> dict[str, torch.Tensor]:
    """Mean gradient of the first step without any engine."""
    module = Module()
    sum(module.net(_rows(rank)[:4]).pow(2).mean() for rank in range(n)).div(n).backward()
    return {name: p.grad for name, p in module.net.named_parameters()}


def _error(result: dict, reference: dict[str, torch.Tensor]) -> float:
    step = {name.replace("_fsdp_wrapped_module.", ""): grad for name, grad in result["grads"][0].items()}
    got = torch.cat([step[name].flatten() for name in reference])
    exact = torch.cat([grad.flatten() for grad in reference.values()])
    return ((got - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("compressor", COMPRESSORS, ids=repr)
@pytest.mark.parametrize("sharding", ["FULL_SHARD", "SHARD_GRAD_OP", "NO_SHARD"])
def test_gradient_through_fsdp_is_the_mean_over_ranks(compressor, sharding, two_ranks):
    results = two_ranks.run(_fit, compressor, sharding_strategy=sharding)
    assert _error(results[0], _reference(2)) < _tolerance(compressor)
    for name, weight in results[0]["weights"].items():
        assert torch.equal(weight, results[1]["weights"][name])


def test_three_ranks_shard_sizes_that_do_not_divide(three_ranks):
    results = three_ranks.run(_fit, Int8(block_size=16))
    assert _error(results[0], _reference(3)) < _tolerance(Int8())


def test_every_unit_has_its_name_and_its_parameters(two_ranks):
    units = two_ranks.run(_fit, NoCompression())[0]["units"]
    assert [name for name, *_ in units] == ["root", "net.blocks.0", "net.blocks.1"]
    root, first, _ = units
    assert first[1] == ["up.weight", "up.bias", "down.weight", "down.bias"]
    assert root[1] == ["net.inlet.weight", "net.inlet.bias", "net.outlet.weight", "net.outlet.bias"]
    assert first[3] == 7 * 13 + 13 + 13 * 7 + 7 <= first[2]


def test_blocks_are_found_by_the_models_own_declaration():
    assert transformer_blocks(Module()) == {Block}
    assert transformer_blocks(nn.Linear(2, 2)) == set()


def test_one_reduction_per_unit_and_step_under_accumulation(two_ranks):
    once, twice = (two_ranks.run(_fit, Int8(), steps=2, accumulate=k)[0]["traffic"] for k in (1, 2))
    reductions = {k: v for k, v in once.calls.items() if k[1] == "all_to_all"}
    assert set(reductions.values()) == {2}
    assert once.gradient_bytes() == twice.gradient_bytes()


def test_native_path_is_left_alone_and_uncounted(two_ranks):
    result = two_ranks.run(_fit, None)[0]
    assert _error(result, _reference(2)) < 1e-6
    assert not result["units"] and not result["traffic"].sent


def test_clipping_scales_by_the_norm_over_all_ranks(two_ranks):
    free, clipped = (two_ranks.run(_fit, NoCompression(), steps=1, clip=clip)[0] for clip in (None, 1e-3))
    exact = torch.cat([g.flatten() for g in _reference(2).values()]).norm().item()
    assert free["norms"][0] == pytest.approx(exact, rel=1e-5)
    start = dict(Module().net.named_parameters())
    moves = [clipped["weights"][name] - start[name] for name in start]
    moved = torch.cat([move.flatten() for move in moves]).norm().item()
    assert moved == pytest.approx(0.1 * 1e-3, rel=1e-2)  # SGD at 0.1 with a gradient of norm 1e-3


@pytest.mark.parametrize("kind", ["sharded", "full"])
def test_checkpoint_resumes_where_it_left_off(kind, two_ranks, tmp_path):
    whole = two_ranks.run(_fit, Int8(), steps=4, state_dict_type=kind)[0]
    path = str(tmp_path / "last.ckpt")
    two_ranks.run(_fit, Int8(), folder=path, steps=3, state_dict_type=kind)
    resumed = two_ranks.run(_fit, Int8(), steps=4, ckpt_path=path, state_dict_type=kind)[0]
    assert resumed["step"] == 4
    for name, weight in whole["weights"].items():
        assert torch.equal(weight, resumed["weights"][name])
    assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]  # nothing half-written beside it


def _expect_refusal(path):
    try:
        _fit(Int8(), ckpt_path=path, module=Module(width=11))
    except ValueError as error:
        return str(error)
    return "accepted"


def test_checkpoint_of_another_model_is_refused_by_name(two_ranks, tmp_path):
    path = str(tmp_path / "last.ckpt")
    two_ranks.run(_fit, Int8(), folder=path)
    for message in two_ranks.run(_expect_refusal, path):
        assert path in message and "does not fit this model" in message


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_mixed_precision_reduces_in_fp32(precision, two_ranks):
    result = two_ranks.run(_fit, NoCompression(), precision=precision)[0]
    ideal = sum(result["traffic"].ideal.values())
    assert result["traffic"].gradient_bytes() == pytest.approx(2 * ideal)  # gloo's factor, 4-byte elements
    assert _error(result, _reference(2)) < 2e-2


@pytest.mark.parametrize("sharding", ["HYBRID_SHARD", "_HYBRID_SHARD_ZERO2"])
def test_hybrid_sharding_is_refused(sharding):
    with pytest.raises(ValueError, match="inter-node"):
        CompressedFSDP(compressor=Int8(), sharding_strategy=sharding)


def test_parameter_gathers_are_counted(two_ranks):
    traffic = two_ranks.run(_fit, Int8(), steps=1)[0]["traffic"]
    gathered = {unit for unit, collective in traffic.calls if collective == "all_gather"}
    assert gathered == {"root", "net.blocks.0", "net.blocks.1"}
    assert traffic.parameter_bytes() > 0
