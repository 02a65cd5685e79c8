"""The trained scorers as a file: it comes back whole, and only for the model that it belongs to."""

import json
from unittest import mock

import pytest
import torch
from torch.nn import functional as F

from lightning_modules.token_pruning.networks.mlp import MLP
from lightning_modules.token_pruning.pruner import TokenPruner
from lightning_modules.token_pruning.scorers.learned import Learned
from tests.lightning_modules.token_pruning.models import build


def test_scores_are_the_formula():
    pruner = TokenPruner(8, [1, 3], network=MLP(5))
    hidden = torch.randn(2, 6, 8) * 100
    norm, up, _, down = pruner.scorers["3"]
    inner = F.gelu(F.layer_norm(hidden, (8,), norm.weight, norm.bias) @ up.weight.T + up.bias)
    torch.testing.assert_close(pruner(hidden, 3), (inner @ down.weight.T + down.bias)[..., 0])
    assert not torch.allclose(pruner(hidden, 3), pruner(hidden, 1))
    assert pruner(hidden.bfloat16(), 3).dtype == torch.float32


def test_default_size_is_a_few_megabytes(tmp_path):
    model = build(hidden_size=256)
    TokenPruner.for_model(model, [1, 3]).save(tmp_path / "pruner")
    size = sum(f.stat().st_size for f in (tmp_path / "pruner").iterdir())
    assert size < 3e6
    assert size > 2 * 256 * 1024 * 4


def test_saved_and_loaded_with_one_call(tmp_path):
    model = build()
    pruner = TokenPruner.for_model(model, [1, 2], network=MLP(16))
    pruner.notes["target"] = "gate"
    for _ in range(2):  # the second replaces the first
        pruner.save(tmp_path / "pruner")
    names = sorted(f.name for f in (tmp_path / "pruner").iterdir())
    assert names == ["README.md", "config.json", "model.safetensors", "pare.json"]
    assert [f.name for f in tmp_path.iterdir()] == ["pruner"]
    again = TokenPruner.load(tmp_path / "pruner", model)
    hidden = torch.randn(1, 5, 64)
    assert torch.equal(again(hidden, 2), pruner(hidden, 2))
    assert again.config() == pruner.config()


def test_rounding_the_base_model_is_no_other_model_but_a_step_of_training_is(tmp_path):
    model = build()
    TokenPruner.for_model(model, [1], network=MLP(4)).save(tmp_path / "p")
    TokenPruner.load(tmp_path / "p", build().bfloat16())
    TokenPruner.load(tmp_path / "p", build().half())
    TokenPruner.load(tmp_path / "p", build().bfloat16().float())  # saved in half precision, loaded in single
    TokenPruner.load(tmp_path / "p", build().half().float())
    trained = build()
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.add_(1e-4)
        others = r"another base model: the values of \S+ are others \(\S+ is there, not \S+; (\d+) of the \1 weights"
        with pytest.raises(ValueError, match=others):
            TokenPruner.load(tmp_path / "p", trained)
        trained = build()
        trained.lm_head.weight[-1, -1] = 9.0
    named = r"values of lm_head.weight are others \(9 is there, not \S+; 1 of the 32 weights looked at differ"
    with pytest.raises(ValueError, match=named):
        TokenPruner.load(tmp_path / "p", trained)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_of_a_rounded_base_model_the_whole_one_and_the_rounded_one_are_the_same_but_another_is_not(dtype):
    pruner = TokenPruner.for_model(build().to(dtype).float(), [1], network=MLP(4))
    for same in (build(), build().to(dtype), build().to(dtype).float(), build().bfloat16(), build().half()):
        pruner.check_base(same)
    other = build().to(dtype)
    with torch.no_grad():
        other.lm_head.weight.mul_(1.02)
    for same in (other, other.float()):
        with pytest.raises(ValueError, match=r"values of lm_head.weight are others"):
            pruner.check_base(same)


def test_each_scorer_sits_where_its_layer_computes():
    model = build()
    pruner = TokenPruner.for_model(model, [1, 3], network=MLP(4))
    with mock.patch("lightning_modules.token_pruning.anatomy.placement") as places:
        places.return_value = {"devices": ["cpu", "meta"], "layers": ["cpu", "cpu", "cpu", "meta", "cpu", "cpu"]}
        scorer = Learned(pruner)
        scorer.prepare(model, [1, 3])
    found = {layer: {p.device.type for p in scorer._ready.scorers[str(layer)].parameters()} for layer in (1, 3)}
    assert found == {1: {"cpu"}, 3: {"meta"}}
    assert {p.device.type for p in pruner.parameters()} == {"cpu"}


@pytest.mark.parametrize(
    ("other", "names"),
    [
        (lambda: build(hidden_size=32), "hidden_size is 32, not 64"),
        (lambda: build(layers=4), "num_hidden_layers is 4, not 6"),
        (lambda: build("qwen2"), "model_type is qwen2, not llama"),
    ],
)
def test_another_base_model_is_refused_with_the_reason(tmp_path, other, names):
    TokenPruner.for_model(build(), [1], network=MLP(4)).save(tmp_path / "p")
    with pytest.raises(ValueError, match=names):
        TokenPruner.load(tmp_path / "p", other())


def test_a_broken_or_foreign_folder_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing"):
        TokenPruner.load(tmp_path / "nothing")
    folder = tmp_path / "p"
    TokenPruner.for_model(build(), [1], network=MLP(4)).save(folder)
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[:-40])
    with pytest.raises(ValueError, match="no usable token pruner"):
        TokenPruner.load(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ValueError, match="not that of a token pruner"):
        TokenPruner.load(folder)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/thesis.tex").touch()
    with pytest.raises(ValueError, match="full"):
        TokenPruner(8, [1]).save(tmp_path / "full")
    assert (tmp_path / "full/thesis.tex").exists()


def test_what_is_wrong_is_named():
    for layers in ([], [1, 1], [-1]):
        with pytest.raises(ValueError, match="layers"):
            TokenPruner(8, layers)
    with pytest.raises(ValueError, match="width"):
        MLP(0)
    with pytest.raises(ValueError, match="layer 2"):
        TokenPruner(8, [1])(torch.zeros(1, 1, 8), 2)
    with pytest.raises(ValueError, match="16 wide"):
        TokenPruner(8, [1])(torch.zeros(1, 1, 16), 1)
