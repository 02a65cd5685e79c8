"""Pruned prompts on the GPU: keeping everything changes nothing, and what is kept is what the CPU keeps."""

from collections.abc import Iterator
from typing import Any

import torch

from bench.gpu.models import small
from bench.gpu.setting import Setting, at_most, found
from lightning_modules.token_pruning.prefill import PromptPruner
from lightning_modules.token_pruning.schedule import Schedule
from lightning_modules.token_pruning.scorers.last_window import LastWindow

LIMIT_S, GPUS = 30.0, 1


@torch.no_grad()
def run(setting: Setting) -> Iterator[dict[str, Any]]:
    """Differences of logits and of choices."""
    model = small(setting)
    ids = torch.randint(1, 512, (1, 256), generator=torch.Generator().manual_seed(0)).to(setting.device)
    stages = Schedule(layers=[1, 2], keep=0.6, sinks=4, tail=0.0, min_tail=16)
    plain = model(ids).logits
    with PromptPruner(LastWindow(), stages.keeping(1.0)).prefill(model):
        apart = float((model(ids).logits - plain).abs().max())
    yield at_most("keep-all", "largest difference of logits when every token is kept", apart, 0.0)
    pruner = PromptPruner(LastWindow(), stages)
    with pruner.prefill(model) as run:
        text = model.generate(ids, max_new_tokens=8, do_sample=False)
        here = run.kept().cpu()
    on_cpu = model.to("cpu")
    with PromptPruner(LastWindow(), stages).prefill(on_cpu) as run:
        again = on_cpu.generate(ids.cpu(), max_new_tokens=8, do_sample=False)
        there = run.kept()
    share = float((here != there).float().mean())
    yield at_most("kept", "share of choices that differ from the CPU's (scores that tie may)", share, 0.02)
    same = int((text.cpu() == again).all())
    yield found("answer", "greedy continuation equal to the CPU's", same)
