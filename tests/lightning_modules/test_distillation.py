import torch
from torch.distributions import Categorical, kl_divergence

from lightning_modules.distillation import divergence
from lightning_modules.perplexity import IGNORED


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
