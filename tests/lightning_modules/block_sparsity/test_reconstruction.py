"""Layer-wise reconstruction against the same thing done slowly, with the whole model for every step."""

import copy

import pytest
import torch
import torch.nn.functional as F

from lightning_modules.block_sparsity.masks import violations
from lightning_modules.block_sparsity.pruner import Pruner
from lightning_modules.block_sparsity.reconstruction import Reconstruction
from lightning_modules.block_sparsity.schedules.linear import LinearSchedule
from lightning_modules.block_sparsity.scores.magnitude import Magnitude
from tests.lightning_modules.block_sparsity.toy import batches, padded, prune, tiny_llama

TARGET = LinearSchedule(dense=0.3, mid_2_4=0.4, topk=0.3).rows[-1].ratios
RATE = 3e-3


def _learn(text, steps):
    """A model pruned by magnitude whose layers have learned; its pruner, and the errors."""
    model = tiny_llama()
    pruner = Pruner(model, block=8, k=6)
    errors = prune(model, pruner, TARGET, Magnitude(), text, reconstruction=Reconstruction(steps, RATE)).layers
    return model, pruner, errors


def _output(model, layer, batch):
    """What a layer of the whole model gives for one batch."""
    found = []
    hook = model.model.layers[layer].register_forward_hook(lambda _, __, out: found.append(out))
    model(**{name: part for name, part in batch.items() if name in ("input_ids", "position_ids")}, use_cache=False)
    hook.remove()
    return found[0]


def _slowly(model, keep, text, steps):
    """Reconstruct by running all of the model for every step; the errors after each layer."""
    dense, errors = copy.deepcopy(model), []
    for number, layer in enumerate(model.model.layers):
        mine = {n: m for n, m in model.named_modules() if n in keep and m in set(layer.modules())}
        with torch.no_grad():
            targets = [_output(dense, number, batch) for batch in text]
            for name, matrix in mine.items():
                matrix.weight.mul_(keep[name])
        optimizer = torch.optim.Adam([m.weight for m in mine.values()], RATE)
        for step in range(steps):
            optimizer.zero_grad()
            F.mse_loss(_output(model, number, text[step % len(text)]), targets[step % len(text)]).backward()
            for name, matrix in mine.items():
                matrix.weight.grad.mul_(keep[name])
            optimizer.step()
            with torch.no_grad():
                for name, matrix in mine.items():
                    matrix.weight.mul_(keep[name])
        with torch.no_grad():
            wrong = sum((_output(model, number, b) - t).pow(2).sum() for b, t in zip(text, targets, strict=True))
            errors.append(float(wrong / sum(t.pow(2).sum() for t in targets)))
    model.zero_grad()
    return errors


def test_layers_learn_the_whole_models_outputs_from_the_pruned_models_inputs():
    text, slow = batches(3), tiny_llama()
    _, pruner, found = _learn(text, steps=5)
    wanted = _slowly(slow, pruner.keep, text, steps=5)
    assert [after for _, after in found] == pytest.approx(wanted, rel=1e-3)
    for name, matrix in pruner.matrices.items():
        torch.testing.assert_close(matrix.weight, slow.get_submodule(name).weight, rtol=1e-4, atol=1e-5)


def test_reconstruction_brings_outputs_closer_and_holds_masks():
    model, pruner, errors = _learn(batches(4, 4), steps=20)
    norm = tiny_llama().model.norm.weight
    assert len(errors) == 2 and all(after < 0.9 * before for before, after in errors)
    assert violations(pruner.matrices, pruner.keep) == 0
    assert torch.equal(model.model.norm.weight, norm) and all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_teaches_nothing(side):
    batch, weights = batches(1)[0], []
    row = {name: part[:1, :7] for name, part in batch.items()}
    for text in (row, padded({name: part[:1] for name, part in batch.items()}, [7], side)):
        _, pruner, _ = _learn([text], steps=3)
        weights.append({name: matrix.weight for name, matrix in pruner.matrices.items()})
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, rtol=1e-4, atol=1e-5)
