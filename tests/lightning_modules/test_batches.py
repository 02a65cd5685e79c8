"""Whatever runs a model on a batch must see the same samples alone, padded or packed.

Oracle: every sample in a batch of its own.
"""

import pytest
import torch
import torch.nn.functional as F

from lightning_modules.batches import IGNORED, labels, logits, tokens_of
from lightning_modules.distillation import distilled_loss
from lightning_modules.perplexity import batch_nll, mean_nll
from lightning_modules.structured_pruning import layer_damage
from lightning_modules.structured_pruning.evaluation import backward
from lightning_modules.structured_pruning.importance.activation import Activation
from lightning_modules.structured_pruning.importance.gate_taylor import GateTaylor
from lightning_modules.token_pruning.samples import response_nll, split_batch
from tests.lightning_modules.structured_pruning.toy import tiny

LENGTHS = (7, 4, 9, 5)
WIDTH = 12


def samples():
    draw = torch.Generator().manual_seed(3)
    return [torch.randint(2, 97, (n,), generator=draw) for n in LENGTHS]


def alone():
    return [{"input_ids": ids[None], "labels": ids[None].clone()} for ids in samples()]


def padded(side, positions=False):
    rows = {"input_ids": [], "labels": [], "attention_mask": []}
    for ids in samples():
        gap = WIDTH - len(ids)
        ends = (gap, 0) if side == "left" else (0, gap)
        rows["input_ids"].append(F.pad(ids, ends, value=5))  # a token that occurs in texts
        rows["labels"].append(F.pad(ids, ends, value=IGNORED))
        rows["attention_mask"].append(F.pad(torch.ones_like(ids), ends))
    batch = {name: torch.stack(part) for name, part in rows.items()}
    if positions:  # as transformers' own generate makes them
        mask = batch["attention_mask"]
        batch["position_ids"] = (mask.cumsum(1) - 1).masked_fill(mask == 0, 1)
    return batch


def packed(order=((0, 1), (2,), (3,))):
    """Several samples a row, padding at the end, every token a label."""
    found = samples()
    batch = {n: torch.zeros(len(order), WIDTH, dtype=torch.long) for n in ("input_ids", "labels", "attention_mask")}
    batch["labels"] += IGNORED
    batch["position_ids"] = torch.arange(WIDTH).repeat(len(order), 1)
    for row, members in enumerate(order):
        start = 0
        for member in members:
            ids, end = found[member], start + len(found[member])
            batch["input_ids"][row, start:end] = batch["labels"][row, start:end] = ids
            batch["attention_mask"][row, start:end] = 1
            batch["position_ids"][row, start:end] = torch.arange(len(ids))
            start = end
        batch["position_ids"][row, start:] = torch.arange(WIDTH - start)
    return batch


BATCHES = {
    "right": lambda: padded("right"),
    "left": lambda: padded("left"),
    "left with positions": lambda: padded("left", positions=True),
    "packed": packed,
}
every_kind = pytest.mark.parametrize("kind", BATCHES)


@every_kind
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral"])
@torch.no_grad()
def test_every_token_has_the_loss_that_it_has_alone(kind, attention, family):
    model, batch = tiny(family), BATCHES[kind]()
    model.set_attn_implementation(attention)
    scores = logits(model, batch)
    targets = F.pad(labels(batch)[:, 1:], (0, 1), value=IGNORED)
    found = F.cross_entropy(scores.transpose(1, 2), targets, ignore_index=IGNORED, reduction="none")[targets != IGNORED]
    wanted = [
        F.cross_entropy(model(one["input_ids"]).logits[0, :-1], one["input_ids"][0, 1:], reduction="none")
        for one in alone()
    ]
    torch.testing.assert_close(found, torch.cat(wanted), atol=1e-5, rtol=1e-5)


@every_kind
def test_loss_and_gradients_of_a_batch_are_those_of_its_samples(kind):
    model = tiny()
    tokens = sum(LENGTHS) - len(LENGTHS)
    backward(model, BATCHES[kind]())
    found = model.model.layers[1].mlp.up_proj.weight.grad.clone()
    model.zero_grad()
    nll = sum(batch_nll(model, one)[0] for one in alone())
    (nll / tokens).backward()
    torch.testing.assert_close(found, model.model.layers[1].mlp.up_proj.weight.grad, atol=1e-6, rtol=1e-4)
    total, count = batch_nll(model, BATCHES[kind]())
    torch.testing.assert_close(total, nll)
    assert count == tokens
    assert mean_nll(model, [BATCHES[kind]()]) == pytest.approx(mean_nll(model, alone()), rel=1e-6)


@every_kind
def test_what_layers_are_worth_does_not_depend_on_padding_and_packing(kind, tmp_path):
    model = tiny()
    one, other = (
        layer_damage.measure(model, text, tmp_path / name)
        for text, name in (([BATCHES[kind]()], "batch.json"), (alone(), "alone.json"))
    )
    assert one.dense == pytest.approx(other.dense, rel=1e-5)
    assert one.without == pytest.approx(other.without, rel=1e-5)


@every_kind
def test_energies_of_parts_do_not_count_padding(kind):
    model = tiny()
    for found, wanted in zip(
        Activation().score(model, [BATCHES[kind]()]), Activation().score(model, alone()), strict=True
    ):
        torch.testing.assert_close(found.groups, wanted.groups, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.channels, wanted.channels, rtol=1e-4, atol=1e-5)


def test_scores_by_gradients_are_the_same_however_a_text_is_laid_out():
    model = tiny()
    wanted = GateTaylor().score(model, [padded("right")])
    for kind in BATCHES:
        for found, expected in zip(GateTaylor().score(model, [BATCHES[kind]()]), wanted, strict=True):
            torch.testing.assert_close(found.channels, expected.channels, rtol=1e-3, atol=1e-6)


@every_kind
@torch.no_grad()
def test_a_teacher_sees_samples_alone(kind):
    student, teacher = tiny(seed=1), tiny(seed=2)
    how = (0.3, 2.0, 0.5, [(1, 1), (2, 3)])
    found = distilled_loss(student, teacher, BATCHES[kind](), *how)
    parts = [distilled_loss(student, teacher, one, *how) for one in alone()]
    shares = torch.tensor([n - 1.0 for n in LENGTHS]) / (sum(LENGTHS) - len(LENGTHS))
    for name in found._fields:
        wanted = (torch.stack([getattr(part, name) for part in parts]) * shares).sum()
        torch.testing.assert_close(getattr(found, name), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_token_pruning_reads_padded_samples_as_alone(side):
    model, batch = tiny(), padded(side)
    pruned = split_batch(batch, 2)
    nll, tokens = response_nll(model(**pruned.inputs(), use_cache=False).logits, pruned.labels)
    assert tokens.tolist() == [2] * 4
    for row, ids in enumerate(samples()):
        single = split_batch({"input_ids": ids[None], "labels": ids[None]}, 2)
        wanted, _ = response_nll(model(**single.inputs(), use_cache=False).logits, single.labels)
        torch.testing.assert_close(nll[row], wanted[0], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_kernels_that_pack_one_row_only_get_one_row(monkeypatch):
    """Flash attention; here sdpa under its name, which shows shapes but not the kernel."""
    model, batch, shapes = tiny(), packed(), []
    wanted = logits(model, batch)
    model.register_forward_pre_hook(lambda m, a, k: shapes.append(k["input_ids"].shape), with_kwargs=True)
    monkeypatch.setattr(type(model.config), "_attn_implementation", "flash_attention_2", raising=False)
    real = type(model).forward

    def forward(self, *args, **kwargs):
        with monkeypatch.context() as now:
            now.setattr(type(model.config), "_attn_implementation", "sdpa", raising=False)
            return real(self, *args, **kwargs)

    monkeypatch.setattr(type(model), "forward", forward)
    found = logits(model, batch)
    assert shapes == [(1, 3 * WIDTH)]
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


def test_tokens_are_what_is_not_padding():
    batch = packed()
    assert len(tokens_of(torch.zeros(3, WIDTH, 2), batch)) == sum(LENGTHS)
    assert len(tokens_of(torch.zeros(3, WIDTH, 2), {"input_ids": batch["input_ids"]})) == 3 * WIDTH
