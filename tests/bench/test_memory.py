"""What the command computes is what a training run holds."""

import lightning.pytorch as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from bench import memory
from strategies import CompressedDDP, CompressedFSDP2
from strategies.compressors.error_feedback import ErrorFeedback
from strategies.compressors.int8 import Int8


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(16, 64), nn.Linear(64, 16)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)))


class Net(nn.Module):
    _no_split_modules = ("Block",)

    def __init__(self):
        super().__init__()
        self.blocks, self.head = nn.Sequential(Block(), Block()), nn.Linear(16, 4)

    def forward(self, x):
        return self.head(self.blocks(x))


class Module(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net, self.held = Net(), {}

    def training_step(self, batch, batch_idx):
        return self.net(batch).square().mean()

    def on_before_optimizer_step(self, optimizer):
        if not optimizer.state:
            return
        moments = [state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
        parameters = list(self.net.parameters())
        self.held = {
            "parameters": _bytes(parameters),
            "gradients": _bytes([p.grad for p in parameters]),
            "optimizer": _bytes(moments),
            "residual": _bytes([unit.state["residual"] for unit in self.trainer.strategy.units]),
        }

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters())


def _bytes(tensors):
    local = [tensor.to_local() if hasattr(tensor, "to_local") else tensor for tensor in tensors]
    return sum(tensor.nbytes for tensor in local)


def _train(engine):
    strategy = {"fsdp": CompressedFSDP2, "ddp": CompressedDDP}[engine](compressor=ErrorFeedback(inner=Int8()))
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
    module = Module()
    trainer = L.Trainer(
        accelerator="cpu", devices=2, strategy=strategy, max_steps=2, use_distributed_sampler=False, **quiet
    )
    trainer.fit(module, DataLoader(torch.randn(8, 16), batch_size=2))
    return module.held


@pytest.mark.parametrize("engine", ["fsdp", "ddp"])
def test_a_run_holds_what_is_computed(two_ranks, engine):
    head, block = 16 * 4 + 4, 16 * 64 + 64 + 64 * 16 + 16
    computed = memory.estimate([head, block, block], 2, engine, "float32")
    for held in two_ranks.run(_train, engine):
        assert held == {name: getattr(computed, name) for name in held} and len(held) == 4


def test_units_are_blocks_and_the_rest(tmp_path):
    from transformers import LlamaConfig

    shape = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    LlamaConfig(**shape, num_hidden_layers=3, vocab_size=100).save_pretrained(tmp_path)
    layer = 32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 64 + 2 * 32
    assert memory.units_of(str(tmp_path)) == [2 * 100 * 32 + 32, layer, layer, layer]


def test_gathered_units_and_start():
    held = memory.estimate([100, 50, 50], 2, gathered_bytes=2)
    assert held.gathered == 2 * (100 + 50) + 4 * 100 and held.start == 4 * (100 + 100)
    whole = memory.estimate([100, 50, 50], 2, "ddp")
    assert whole.gathered == 0 and whole.start == 4 * 200
    assert held.training == 3 * 4 * 100 + 4 * 100 + held.gathered
    with pytest.raises(ValueError, match="ranks must be at least 1"):
        memory.estimate([1], 0)
