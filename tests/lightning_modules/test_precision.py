"""Sums over a run are right under every precision that a Trainer can be given.

The text has 18 million tokens, which float32 can no longer count one by one, and ends in some that are nearly
impossible: sums that lose small summands miss these. Losses are known to the last bit, because all scores are numbers
that every precision can represent.
"""

from types import SimpleNamespace

import lightning.pytorch as L
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.utils.data import DataLoader

from callbacks.gradient_guard import GradientGuard
from lightning_modules.causal_lm import CausalLM
from lightning_modules.metrics import WeightedMean
from lightning_modules.perplexity import mean_nll, next_token_nll
from lightning_modules.token_pruning.evaluation import PruningQuality

PRECISIONS = ["32-true", "64-true", "bf16-true", "16-true", "bf16-mixed", "16-mixed"]
every_precision = pytest.mark.parametrize("precision", PRECISIONS)
SCORES = torch.tensor([[0.0, 1.0, -40.0], [0.5, -0.25, -40.0], [0.0, 0.0, 0.0]])


class Bigram(nn.Module):
    """Predicts each token from the one before by a table."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding.from_pretrained(SCORES.clone(), freeze=False)
        self.config = SimpleNamespace(model_type="bigram", _attn_implementation=None)

    def forward(self, input_ids, use_cache=False):
        return SimpleNamespace(logits=self.table(input_ids))

    def get_input_embeddings(self):
        return self.table

    def num_parameters(self):
        return self.table.weight.numel()


class BigramLM(CausalLM):
    def build_model(self):
        return Bigram()


def text():
    """Long batches of the tokens 0 and 1, then short ones that end with the token 2."""
    draw = torch.Generator().manual_seed(0)
    for _ in range(9):
        ids = torch.randint(2, (2, 1_000_003), generator=draw)
        yield {"input_ids": ids, "labels": ids}
    rare = torch.tensor([[0, 2]])
    for _ in range(300):
        yield {"input_ids": rare, "labels": rare}


def reference():
    counts = torch.zeros(3, 3, dtype=torch.float64)
    for batch in text():
        ids = batch["input_ids"]
        counts += torch.bincount((3 * ids[:, :-1] + ids[:, 1:]).flatten(), minlength=9).view(3, 3)
    return float(-(counts * SCORES.double().log_softmax(-1)).sum() / counts.sum())


@pytest.fixture(scope="module")
def long_text():
    return list(text()), reference()


def trainer(precision, **arguments):
    if precision == "16-mixed":  # for which Lightning would take bf16-mixed on CPUs
        arguments["plugins"] = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))
        precision = None
    return L.Trainer(
        accelerator="cpu", precision=precision, logger=False, enable_progress_bar=False, enable_checkpointing=False,
        enable_model_summary=False, **arguments,
    )  # fmt: skip


@every_precision
def test_the_perplexity_of_a_long_text_is_the_same_under_every_precision(precision, long_text):
    batches, expected = long_text
    running, module = trainer(precision), BigramLM()
    running.validate(module, DataLoader(batches, batch_size=None), verbose=False)
    assert running.callback_metrics["val/loss"].item() == pytest.approx(expected, rel=1e-6)
    assert module.val_nll.total.dtype == module.val_nll.weight.dtype == torch.float64
    assert module.model.table.weight.dtype == {"64-true": torch.float64, "bf16-true": torch.bfloat16}.get(
        precision, torch.float16 if precision == "16-true" else torch.float32
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_so_is_the_mean_outside_of_a_trainer(dtype, long_text):
    batches, expected = long_text
    assert mean_nll(Bigram().to(dtype), batches) == pytest.approx(expected, rel=1e-6)


class Counting(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4))
        self.mean = WeightedMean()
        self.quality = PruningQuality([0.5])

    def validation_step(self, batch, batch_idx):
        for _ in range(1000):
            self.mean.update(torch.tensor(3.0), 1000)
        self.quality._nll("unpruned", torch.tensor([300.25, 0.5], dtype=torch.float32), torch.tensor([100_000, 3]))


@every_precision
def test_sums_keep_their_type_where_the_module_is_cast(precision):
    module = Counting()
    trainer(precision).validate(module, DataLoader([torch.zeros(1)] * 5), verbose=False)
    assert module.mean.weight == 5_000_000 and module.mean.compute() == pytest.approx(3 / 1000, rel=1e-12)
    assert module.quality.compute()["val/loss"] == pytest.approx(300.75 / 100_003, rel=1e-12)
    module.to(torch.bfloat16).half()
    assert module.mean.weight == 5_000_000 and module.mean.total.dtype == torch.float64
    module.mean.reset()
    assert module.mean.weight.dtype == torch.float64


def _mean_of_ranks():
    mean, rank = WeightedMean(), dist.get_rank()
    mean.update(torch.tensor(100.0 + rank), 2**24 + 3 * rank)
    return mean.compute().item()


def test_the_mean_is_over_all_ranks(two_ranks):
    assert two_ranks.run(_mean_of_ranks) == [pytest.approx(201 / (2**25 + 3), rel=1e-12)] * 2


def test_a_mean_of_nothing_or_of_nan_is_nan():
    mean = WeightedMean()
    mean.update(torch.tensor(torch.nan), 2)
    mean.update(torch.tensor(1.0), 2)
    assert mean.compute().isnan()


def test_losses_of_double_scores_are_double():
    nll, _ = next_token_nll(SCORES.double()[None], torch.tensor([[0, 1, 2]]))
    assert nll.dtype == torch.float64


class Steep(L.LightningModule):
    """Gradients of 3,000 in each of 10,000 places: their norm, 300,000, is beyond float16."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(10_000))

    def training_step(self, batch, batch_idx):
        return (self.weight * 3000).sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-9)


@pytest.mark.parametrize("precision", ["32-true", "64-true", "bf16-true", "16-true"])
def test_gradient_norms_are_measured_wide(precision):
    guard = GradientGuard()
    running = trainer(precision, callbacks=[guard], max_steps=2)
    running.fit(Steep(), DataLoader([torch.zeros(1)] * 2))
    norm = running.callback_metrics["train/grad_norm"].item()
    assert norm == pytest.approx(300_000, rel=1e-3 if precision != "bf16-true" else 5e-3) and guard.nan_steps == 0
