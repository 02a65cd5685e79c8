"""Which modules become units: found in any model, or asked for."""

import pytest
import torch
from torch import nn

from strategies.wrapping import chosen_blocks, find_blocks, trained_apart
from tests.strategies.engines import Block, Module


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([nn.Sequential(nn.Linear(2, 2), nn.ReLU()) for _ in range(3)])


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.layers = nn.Embedding(3, 2), nn.ModuleList([Layer(), Layer()])
        self.head = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 3))


def test_blocks_are_those_the_model_declares():
    assert find_blocks(Module()) == {Block}


def test_blocks_of_any_other_model_are_what_its_lists_repeat():
    assert find_blocks(Model()) == {Layer}  # not the experts inside, not the linear layers of the head
    assert find_blocks(nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, batch_first=True), 2)) == {
        nn.TransformerEncoderLayer
    }
    assert find_blocks(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))) == set()
    assert find_blocks(nn.Linear(2, 2)) == set()


def test_a_model_of_one_unit_is_not_made_silently():
    with pytest.warns(UserWarning, match="auto_wrap_policy"):
        assert chosen_blocks(nn.Linear(2, 2), None) == set()


def test_blocks_that_were_asked_for_must_be_there():
    assert chosen_blocks(Model(), [nn.Linear]) == {nn.Linear}
    with pytest.raises(ValueError, match=r"no Block.*Layer, Model"):
        chosen_blocks(Model(), {Block})


def test_trained_modules_are_kept_apart_where_others_are_frozen():
    model = Model().requires_grad_(False)
    assert trained_apart(model, {Layer}) == []
    model.head.requires_grad_(True)
    model.layers[1].experts[2][0].requires_grad_(True)
    assert trained_apart(model, {Layer}) == [model.head, model.layers[1].experts[2]]
    model.layers[1].requires_grad_(True)
    assert trained_apart(model, {Layer}) == [model.head]  # a block that is trained as a whole is one unit


@pytest.mark.parametrize("make", [nn.ParameterList, lambda held: nn.ParameterDict({"prompt": held[0]})])
def test_parameters_in_a_container_that_is_never_called_cannot_be_kept_apart(make):
    model = Model().requires_grad_(False)
    model.prompts = make([nn.Parameter(torch.zeros(2))])
    with pytest.raises(ValueError, match="prompts"):
        trained_apart(model, {Layer})


def test_a_parameter_that_is_shared_or_bare_cannot_be_kept_apart():
    model = Model().requires_grad_(False)
    model.head[1].weight = model.embed.weight
    model.head[1].weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"head.1.weight is trained.*CompressedFSDP2"):
        trained_apart(model, {Layer})
