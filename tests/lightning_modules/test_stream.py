"""A backward pass that has one decoder layer on the device at a time, against one through the whole model."""

from contextlib import contextmanager

import pytest
import torch

from lightning_modules import stream
from lightning_modules.batches import labels, logits
from lightning_modules.perplexity import next_token_nll
from tests.lightning_modules.block_sparsity.toy import batches, padded, tiny_llama

CPU = torch.device("cpu")


def _loss(batch):
    return lambda scores: next_token_nll(scores, labels(batch))[0]


@pytest.mark.parametrize("side", [None, "left", "right"])
@pytest.mark.parametrize("tied", [True, False])
def test_gradients_and_hooks_are_those_of_the_whole_model(side, tied):
    text = batches(1)[0]
    text = text if side is None else padded(text, [7, 4], side)
    found = []
    for whole in (True, False):
        model, seen = tiny_llama(tied=tied), []
        matrix = model.model.layers[1].self_attn.v_proj

        def watch(_, args, y, seen=seen):
            if y.requires_grad:
                y.register_hook(seen.append)

        matrix.register_forward_hook(watch)
        if whole:
            _loss(text)(logits(model, text)).backward()
        else:
            stream.backward(model, text, CPU, _loss(text))
        assert len(seen) == 1 and "forward" not in vars(model.model.layers[0])
        found.append((seen, {name: p.grad for name, p in model.model.layers.named_parameters()}))
    torch.testing.assert_close(*found)


def test_one_layer_visits_at_a_time_and_everything_is_as_it_was(monkeypatch):
    model, text = tiny_llama().train(), batches(1)[0]
    visits, there, visiting = [], [], stream.visiting

    @contextmanager
    def noted(layer, device):
        assert not there, "another layer is still on the device"
        there.append(layer)
        visits.append(list(model.model.layers).index(layer))
        with visiting(layer, device):
            yield
        there.clear()

    monkeypatch.setattr(stream, "visiting", noted)
    monkeypatch.setattr(type(model), "to", lambda *_: pytest.fail("the whole model was moved"))
    homes = {name: t.data_ptr() for name, t in (*model.named_parameters(), *model.named_buffers())}
    stream.backward(model, text, CPU, _loss(text))
    assert visits == [0, 1, 1, 0]
    assert all(module.training for module in model.modules())
    assert homes == {name: t.data_ptr() for name, t in (*model.named_parameters(), *model.named_buffers())}


def test_what_follows_the_layers_is_computed_on_the_device_and_comes_home():
    """On the meta device, which is another one than the weights'."""
    model, meta = tiny_llama(tied=False), torch.device("meta")
    layers = list(stream.decoder_layers(model).values())
    before = dict((*model.named_parameters(), *model.named_buffers()))
    hidden = torch.empty(2, 12, 32, device=meta)
    with stream._after_layers(model, layers, hidden, meta):
        outside = [model.model.embed_tokens, model.model.norm, model.lm_head, model.model.rotary_emb]
        assert all(t.is_meta for part in outside for t in (*part.parameters(), *part.buffers()))
        assert {p.device.type for p in model.model.layers.parameters()} == {"cpu"}
        assert model.lm_head(model.model.norm(model.model.layers[0](torch.ones(1)))).is_meta
    after = dict((*model.named_parameters(), *model.named_buffers()))
    assert all(after[name] is t and t.device == CPU for name, t in before.items())
