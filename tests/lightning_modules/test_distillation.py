from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch.distributions import Categorical, kl_divergence

from callbacks import RunRecord
from lightning_modules.block_sparsity import BlockSparsity
from lightning_modules.distillation import distilled_loss, divergence
from lightning_modules.perplexity import IGNORED
from lightning_modules.structured_pruning import LoraRecovery
from tests.lightning_modules.structured_pruning.toy import ids, tiny


def test_it_is_the_mean_divergence_of_the_predicted_positions():
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 5, 11, requires_grad=True), torch.randn(2, 5, 11)
    labels = torch.tensor([[1, IGNORED, 3, 4, 5], [IGNORED, 2, IGNORED, IGNORED, 1]])
    expected = [  # position t counts where label t + 1 does
        kl_divergence(Categorical(logits=teacher[b, t] / 2), Categorical(logits=student[b, t] / 2))
        for b, t in [(0, 1), (0, 2), (0, 3), (1, 0), (1, 3)]
    ]
    loss = divergence(student, teacher, labels, 2.0)
    torch.testing.assert_close(loss, 4 * sum(expected) / 5)
    loss.backward()
    assert (student.grad[0, 0] == 0).all() and (student.grad[1, 3] != 0).any()
    assert divergence(teacher, teacher, labels, 2.0) == 0
    assert divergence(student, teacher, torch.full_like(labels, IGNORED), 2.0) == 0


def parts(student, teacher, batch, temperature=1.0):
    """Cross entropy by transformers itself, and the divergence by torch's distributions."""
    with torch.no_grad():
        scores, wanted = (model(batch["input_ids"]).logits[:, :-1] / temperature for model in (student, teacher))
        text = student(batch["input_ids"], labels=batch["labels"]).loss
    return text, temperature**2 * kl_divergence(Categorical(logits=wanted), Categorical(logits=scores)).mean()


@pytest.mark.parametrize("weight", [0.0, 0.2, 1.0])
def test_the_weight_is_the_teachers_share(weight):
    student, teacher, batch = tiny(seed=1), tiny(seed=2), {"input_ids": ids(), "labels": ids()}
    text, distance = parts(student, teacher, batch, 2.0)
    found = distilled_loss(student, teacher, batch, weight, 2.0)
    torch.testing.assert_close(found.text, text)
    torch.testing.assert_close(found.divergence, distance)
    torch.testing.assert_close(found.mixture, (1 - weight) * text + weight * distance)
    found.mixture.backward()
    assert all(p.grad is None for p in teacher.parameters()) and student.model.layers[0].mlp.up_proj.weight.grad.any()


def test_hidden_states_are_compared_in_pairs_relative_to_the_teachers_and_where_text_counts():
    student, teacher = tiny(seed=1, num_hidden_layers=2), tiny(seed=2, num_hidden_layers=3)
    labels = ids().clone()
    labels[0, :7] = IGNORED
    batch, pairs = {"input_ids": ids(), "labels": labels}, [(1, 2), (2, 3)]
    with torch.no_grad():
        mine, theirs = (
            model(batch["input_ids"], output_hidden_states=True).hidden_states for model in (student, teacher)
        )
    expected = []
    for i, j in pairs:
        shares = [
            ((mine[i][b, t] - theirs[j][b, t]).norm() / theirs[j][b, t].norm()).square()
            for b in range(2)
            for t in range(19)
            if labels[b, t + 1] != IGNORED
        ]
        expected.append(sum(shares) / len(shares))
    found = distilled_loss(student, teacher, batch, 0.5, 1.0, 0.7, pairs)
    torch.testing.assert_close(found.hidden, sum(expected) / 2)
    torch.testing.assert_close(found.mixture, 0.5 * found.text + 0.5 * found.divergence + 0.7 * found.hidden)
    found.hidden.backward()
    assert student.model.layers[0].mlp.up_proj.weight.grad.any()
    assert distilled_loss(student, teacher, batch, 0.5).hidden is None
    assert distilled_loss(teacher, teacher, batch, 0.5, 1.0, 0.7, [(1, 1), (3, 3)]).hidden == 0


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    for name, seed in (("student", 1), ("teacher", 2)):
        tiny(seed=seed, vocab_size=97, hidden_size=48).save_pretrained(root / name)
    return root


def _recovery(folders):
    module = LoraRecovery(
        str(folders / "student"), dropout=0.0, teacher=str(folders / "teacher"), distill_weight=0.2, temperature=2.0
    )
    module.configure_model()
    return module, module.teacher.eval(), 2.0


def _blocks(folders):
    module = BlockSparsity(
        str(folders / "student"), block=8, topk=6, teacher=str(folders / "teacher"), distill_weight=0.2
    )
    module.configure_model()
    module._trainer = SimpleNamespace(strategy=SingleDeviceStrategy("cpu"))
    module.on_fit_start()
    return module, module._teacher.model, 1.0


@pytest.mark.parametrize("make", [_recovery, _blocks])
def test_the_modules_give_the_teacher_its_share_and_log_each_loss_under_its_name(folders, make):
    module, teacher, temperature = make(folders)
    logged = {}
    module.log = lambda name, value, **_: logged.update({name: value.item()})
    module.log_dict = lambda values: logged.update({name: value.item() for name, value in values.items()})
    batch = {"input_ids": ids(), "labels": ids()}
    text, distance = parts(module.model, teacher, batch, temperature)
    outputs = module.training_step(batch, 0)
    mixture = 0.8 * text + 0.2 * distance
    torch.testing.assert_close(outputs["loss"], mixture)
    assert logged == {
        "train/loss": pytest.approx(text.item(), rel=1e-5),
        "train/divergence": pytest.approx(distance.item(), rel=1e-4),
        "train/mixture": pytest.approx(mixture.item(), rel=1e-5),
    }
    record = RunRecord()
    record.on_train_batch_end(_step_done(), module, outputs, batch, 0)
    assert record.summary()["train_loss"] == pytest.approx(text.item(), rel=1e-5)


def _step_done():
    return SimpleNamespace(accumulate_grad_batches=1, fit_loop=SimpleNamespace(_should_accumulate=lambda: False))


def test_a_loss_that_is_no_cross_entropy_is_not_recorded_as_one():
    record = RunRecord()
    record.on_train_batch_end(_step_done(), None, {"loss": torch.tensor(7.0), "train_loss": None}, {}, 0)
    assert record.summary().get("train_loss") is None
    record.on_train_batch_end(
        _step_done(), SimpleNamespace(automatic_optimization=True), {"loss": torch.tensor(2.0)}, {}, 0
    )
    assert record.summary()["train_loss"] == 2.0
