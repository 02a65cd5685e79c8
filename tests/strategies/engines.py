"""Real training of a small net through any engine, and what its gradients should have been."""

import warnings

import lightning.pytorch as L
import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, TensorDataset

from bench.side_by_side.oracles import published_error
from strategies import CompressedDDP, CompressedFSDP, CompressedFSDP2
from strategies.compressors import Compressor

ENGINES = {"fsdp1": CompressedFSDP, "fsdp2": CompressedFSDP2, "ddp": CompressedDDP}


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
        self.losses: list[float] = []

    def training_step(self, batch, batch_idx):
        loss = self.net(batch[0]).pow(2).mean()
        self.losses.append(loss.item())
        return loss

    def on_before_optimizer_step(self, optimizer):
        self.norms.append(self.trainer.strategy.grad_norm().item())
        if isinstance(self.trainer.strategy, CompressedFSDP):
            with FSDP.summon_full_params(self.trainer.strategy.model, with_grads=True):
                self._keep()
        else:
            self._keep()

    def _keep(self):
        self.grads.append({n: whole(p.grad).float().clone() for n, p in self.net.named_parameters()})

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1, momentum=0.9)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def rows(rank: int) -> torch.Tensor:
    """Four equal batches of four: the order of batches, which is the data's business, cannot matter here."""
    return torch.randn(4, 5, generator=torch.Generator().manual_seed(rank)).repeat(4, 1)


def fit(
    compressor,
    folder=None,
    steps=2,
    ckpt_path=None,
    module=None,
    clip=None,
    accumulate=1,
    engine="fsdp1",
    precision="32-true",
    **strategy,
):
    """Train on this rank; everything a test may ask about the run."""
    warnings.simplefilter("ignore")
    module = module or Module()
    built = ENGINES.get(engine, engine)(compressor=compressor, **strategy)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=torch.distributed.get_world_size(),
        strategy=built,
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
    loader = DataLoader(TensorDataset(rows(torch.distributed.get_rank())), batch_size=4)
    trainer.fit(module, loader, ckpt_path=ckpt_path)
    if folder is not None:
        trainer.save_checkpoint(folder)
    units = [(u.name, [p.fqn for p in u.parameters], u.numel, u.valid_numel) for u in built.units]
    return {
        "grads": module.grads,
        "norms": module.norms,
        "losses": module.losses,
        "units": units,
        "slices": {u.name: u.parameters for u in built.units},
        "traffic": built.traffic.take(),
        "state": {u.name: {name: part.clone() for name, part in u.state.items()} for u in built.units},
        "weights": _weights(trainer),
        "step": trainer.global_step,
        "codec_backend": built.codec_backend,
    }


def _weights(trainer) -> dict[str, torch.Tensor]:
    parameters = dict(trainer.lightning_module.net.named_parameters())
    if isinstance(trainer.strategy, CompressedFSDP):
        with FSDP.summon_full_params(trainer.strategy.model):
            parameters = dict(trainer.lightning_module.net.named_parameters())
            return {n.replace("_fsdp_wrapped_module.", ""): p.detach().clone() for n, p in parameters.items()}
    return {n: whole(p.detach()).clone() for n, p in parameters.items()}


def reference(n: int) -> dict[str, torch.Tensor]:
    """Mean gradient of the first step without any engine."""
    module = Module()
    sum(module.net(rows(rank)[:4]).pow(2).mean() for rank in range(n)).div(n).backward()
    return {name: p.grad for name, p in module.net.named_parameters()}


def error(result: dict, exact_grads: dict[str, torch.Tensor]) -> float:
    """Relative L2 error of the first step's gradient."""
    step = {name.replace("_fsdp_wrapped_module.", ""): grad for name, grad in result["grads"][0].items()}
    got = torch.cat([step[name].flatten() for name in exact_grads])
    exact = torch.cat([grad.flatten() for grad in exact_grads.values()])
    return ((got - exact).norm() / exact.norm()).item()


def tolerance(compressor: Compressor) -> float:
    """Relative L2 error of a whole gradient that has passed through an engine once: small blocks are uneven."""
    return 1e-6 + 3 * published_error(compressor) ** 0.5
