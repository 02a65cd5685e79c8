"""Stock shapes: uniform at every budget, plain classes that engines load, and what is said where there is none."""

import itertools
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import gguf
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig

from common.progress import stage
from lightning_modules.loading import load
from lightning_modules.structured_pruning import StructuredPruning
from lightning_modules.structured_pruning.allocation.inverse import Inverse
from lightning_modules.structured_pruning.allocation.uniform import Uniform
from lightning_modules.structured_pruning.compensation.bias import Bias
from lightning_modules.structured_pruning.compensation.least_squares import LeastSquares
from lightning_modules.structured_pruning.compensation.rotation import Rotation
from lightning_modules.structured_pruning.compensation.unchanged import Unchanged
from lightning_modules.structured_pruning.export import pad_to_stock, padded_parameters
from lightning_modules.structured_pruning.footprint import parameters_of
from lightning_modules.structured_pruning.free import free_parts
from lightning_modules.structured_pruning.importance.refitted import Refitted
from lightning_modules.structured_pruning.layers import LayerShape, decoder_layers, shape_of
from lightning_modules.structured_pruning.layout import Layout
from lightning_modules.structured_pruning.model_shape import ModelShape
from lightning_modules.structured_pruning.plan import LayerPlan
from lightning_modules.structured_pruning.planner import Planner
from lightning_modules.structured_pruning.possible import check_possible, possible_shares
from lightning_modules.structured_pruning.saving import save
from lightning_modules.structured_pruning.slicing import slice_model
from lightning_modules.structured_pruning.stock import group_step, groups_for_share, possible_groups, uniform_parts
from lightning_modules.structured_pruning.trials import Space
from lightning_modules.structured_pruning.verify import compare, reference_logits
from tests.lightning_modules import gguf_file
from tests.lightning_modules.structured_pruning.toy import DROPPED, KEPT, batches, ids, plan_for, tiny

CPU = torch.device("cpu")
SMOLLM2 = LayerShape(3, 3, 64, 1536, 294_912, 1728, 3_540_096)
BUDGETS = [0.05, 0.1, 0.17, 0.22, 0.24, 0.25, 0.33, 0.5, 0.55, 0.6, 0.7]
ALIKE = [LayerPlan([1, 3], list(range(0, 48, 3)))] * 4


def _shapes(model) -> list[LayerShape]:
    return [shape_of(layer) for layer in decoder_layers(model)]


# ---- shapes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("share", [0.0, 0.25, 0.4, 1.0])
@pytest.mark.parametrize("shape", ["stock", "free"])
def test_uniform_is_uniform_at_every_budget(budget, share, shape):
    shapes = [SMOLLM2] * 30
    target = round(budget * 30 * SMOLLM2.parameters)
    if shape == "free":
        keep, _ = free_parts(shapes, Layout("free", Uniform(), multiple=64), target, [], None, None)
    else:
        groups = groups_for_share(shapes, share, target, 64)
        keep = uniform_parts(shapes, groups, target, 64)
    assert len(set(keep)) == 1
    removed = sum(s.parameters - parameters_of(s, k.groups, k.channels) for s, k in zip(shapes, keep, strict=True))
    reachable = share < 0.5 and (share > 0 or budget < 0.7)  # neither kind alone has as much as may be asked of it
    if reachable or shape == "free":
        assert abs(removed - target) <= 32 * 30 * SMOLLM2.channel_parameters
        assert keep[0].channels % 64 == 0


@pytest.mark.parametrize("share", [0.1, 0.25, 0.6])
def test_the_plan_says_from_which_budget_on_a_group_goes_everywhere(share):
    shapes = [SMOLLM2] * 30
    decoder = 30 * SMOLLM2.parameters

    def groups(budget: float) -> int:
        return groups_for_share(shapes, share, round(budget * decoder), 64)

    note = group_step(shapes, 3, 0, share, decoder)
    assert "a group of every layer is 8.3% of the decoder; 3 of 3 are kept" in note
    step = float(note.rpartition("from a budget of ")[2].partition("%")[0]) / 100
    assert groups(step - 0.002) == 3 and groups(step + 0.002) == 2


def test_all_trials_remove_the_same_and_the_plan_its_multiple():
    shapes, model = [SMOLLM2] * 30, tiny("mistral")
    target = round(0.3 * 30 * SMOLLM2.parameters)
    space = Space(model.config, shapes, Layout(multiple=64), lambda: range(30), target)
    best, trials = space.search(lambda candidate: float(candidate.groups))
    assert len(trials) > 4 and best.channels % 64 == 0 and best.groups == 2
    for candidate in (trial.candidate for trial in trials):
        kept = [SMOLLM2] * (30 - len(candidate.dropped))
        left = sum(parameters_of(s, candidate.groups, candidate.channels) for s in kept)
        assert abs(30 * SMOLLM2.parameters - left - target) <= 30 * SMOLLM2.channel_parameters


def test_every_class_says_which_numbers_of_heads_it_has():
    llama, mistral, qwen2 = tiny("llama"), tiny("mistral"), tiny("qwen2")
    assert possible_groups(llama.config, _shapes(llama)) == [1, 2, 4], "3 groups are 6 heads, which do not divide 32"
    assert possible_groups(mistral.config, _shapes(mistral)) == [1, 2, 3, 4]
    assert possible_groups(qwen2.config, _shapes(qwen2)) == [1, 2, 3, 4], "this one's heads have a width of their own"
    plain = tiny("qwen2", head_dim=4)
    assert possible_groups(plain.config, _shapes(plain)) == [4], "engines divide the hidden size by the heads"


# ---- requests -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"allocation": Inverse()}, "leave allocation out, or set shape: free"),
        ({"attention_share": 1.5}, "attention_share must lie between 0 and 1"),
        ({"attention_share": 0.4}, r"3 of 4 key-value heads, which LlamaForCausalLM cannot .*: 2 \(.* 4 \(attention"),
        (
            {"attention_share": 0.0, "budget": 0.7, "drop_layers": 0},
            r"every layer keeps 4 groups and 4 channels .*, so at most",
        ),
        ({"budget": 0.97}, r"a group or more \(1, 2, 4\) and 4 channels or more, so at most"),
        ({"protect_layers": [4]}, "protect_layers: layers are numbered 0 to 3, got 4"),
        ({"protect_layers": [1, 1]}, "protect_layers names a layer twice"),
        ({"protect_layers": [0, 1], "drop_layers": 3}, "between 0 and 2 with 2 protected, got 3"),
        ({"drop_layers": 4}, "drop_layers must lie between 0 and 3"),
        ({"drop_layers": -1}, "drop_layers must not be negative"),
        ({"drop_layers": 2, "budget": 0.3}, "dropping 2 layers removes .* parameters too many"),
        ({"rounds": 2, "drop_layers": 1}, "rounds above 1 cannot be combined"),
    ],
    ids=lambda value: "" if isinstance(value, str) else " ".join(map(str, value.items())),
)
def test_what_no_stock_shape_is_is_refused_before_any_work(arguments, message, base, tmp_path):
    with pytest.raises(ValueError, match=message):
        module = StructuredPruning(str(base), str(tmp_path / "pruned"), **arguments)
        module.check_arguments("prune", SimpleNamespace(inputs=list))


def test_a_qwen2_whose_heads_fill_the_hidden_size_keeps_its_heads():
    model = tiny("qwen2", head_dim=4)
    shapes = _shapes(model)
    target = round(0.25 * sum(s.parameters for s in shapes))
    check_possible(model.config, shapes, target, Layout(), 1)
    assert Space(model.config, shapes, Layout(), list, target).group_counts(()) == [4]
    with pytest.raises(ValueError, match=r"Qwen2ForCausalLM cannot express; the nearest that it can: 4 \(.* 0\.00"):
        check_possible(model.config, shapes, target, Layout(attention_share=1.0), 1)


def test_a_qwen2_pruned_twice_is_none_that_the_class_cannot_express():
    dense = tiny("qwen2", head_dim=4)
    unlike = [LayerPlan([0, 1, 2], list(range(48))), LayerPlan([0, 1], list(range(48)))] * 2
    once = slice_model(dense, plan_for(dense, unlike))
    for groups in (1, 2):
        twice = slice_model(once, plan_for(once, [LayerPlan(list(range(groups)), list(range(16)))] * 4))
        assert type(twice).__name__ == "PerLayerQwen2ForCausalLM"
    assert possible_groups(once.config, _shapes(once)) == []
    other = slice_model(tiny("qwen2"), plan_for(tiny("qwen2"), unlike))  # heads that never filled the hidden size
    assert possible_groups(other.config, _shapes(other)) == [1, 2]


def test_the_stock_export_of_a_qwen2_has_heads_that_fill_the_hidden_size():
    dense = tiny("qwen2", head_dim=4)
    plan = plan_for(dense, [LayerPlan([0, 1], list(range(48))), LayerPlan([3], list(range(16)))] * 2)
    pruned = slice_model(dense, plan)
    padded = pad_to_stock(pruned)
    config = padded.model.config
    assert config.num_attention_heads * config.head_dim == config.hidden_size == 32
    assert padded_parameters(dense.config, ModelShape.of(dense, 4), plan.layers) == padded.parameters
    assert torch.allclose(padded.model(ids()).logits, pruned(ids()).logits, atol=1e-5)


def test_a_free_shape_without_a_layer_to_cut_is_refused():
    shapes, everything = _shapes(tiny()), tuple(range(4))
    target = round(0.25 * sum(s.parameters for s in shapes))
    for allocation in (Uniform(), Inverse()):
        layout = Layout("free", allocation, protect_layers=everything)
        with pytest.raises(ValueError, match=r"protect_layers: .* every layer is protected or dropped"):
            check_possible(None, shapes, target, layout, 1)
        with pytest.raises(ValueError, match="protect_layers"):
            free_parts(shapes, layout, target, [], None, None)


@pytest.mark.parametrize(
    "layout", [Layout(attention_share=1.0, drop_layers=0), Layout("free", Uniform(), multiple=4)], ids=["stock", "free"]
)
def test_a_search_looks_at_shares_that_can_be_and_remove_something(layout, tmp_path):
    model = tiny().to("meta")
    shapes = _shapes(model)
    total = sum(shape.parameters for shape in shapes)
    most = 2 * shapes[0].group_parameters / shapes[0].parameters  # two of four groups of every layer
    shares = possible_shares(model.config, shapes, most, layout)
    assert 1 < len(shares) < 128 and shares[-1] == most, "some of them cannot be"
    for share in shares:
        plan = Planner(model, "toy", [], Refitted(), layout, tmp_path, stage).plan(round(share * total), {})
        assert any(len(layer.groups) < 4 or len(layer.channels) < 48 for layer in plan.layers)


def test_llama_3_8b_can_lose_half_of_its_key_value_heads_or_none():
    sizes = {"hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8}
    config = AutoConfig.for_model("llama", **sizes)
    shapes = [LayerShape(8, 4, 128, 14336, 2 * 4096 * 5 * 128, 3 * 4096, 218_112_000)] * 32
    assert possible_groups(config, shapes) == [1, 2, 4, 8]
    target = round(0.1 * 32 * 218_112_000)
    with pytest.raises(ValueError, match=r"leaves 7 of 8 .* nearest that it can: 4 \(.*, 8 \("):
        check_possible(config, shapes, target, Layout(attention_share=0.25, multiple=64), 1)


# ---- plain classes ------------------------------------------------------------------------------------------------


def test_what_is_alike_is_a_plain_class_that_loads_without_pare(tmp_path, tokenizer):
    models = {
        "tied": ("LlamaForCausalLM", tiny("llama", tie_word_embeddings=True)),
        "biased": ("LlamaForCausalLM", tiny("llama", attention_bias=True, mlp_bias=True)),
        "qwen2": ("Qwen2ForCausalLM", tiny("qwen2", tie_word_embeddings=True)),
        "mistral": ("MistralForCausalLM", tiny("mistral")),
    }
    plans = {"parts": ALIKE, "layer": [ALIKE[0], DROPPED[1], ALIKE[0], ALIKE[0]]}
    for name, what in itertools.product(models, plans):
        (cls, dense), kept, folder = models[name], plans[what], tmp_path / f"{name}-{what}"
        plan = plan_for(dense, kept)
        pruned = slice_model(dense, plan)
        compare(*reference_logits(dense, plan, ids()), pruned, ids(), 1e-6).raise_if_failed()
        save(folder, pruned, tokenizer, "# card", plan)
        assert not list(folder.rglob("*.py"))
        config = json.loads((folder / "config.json").read_text())
        assert config["architectures"] == [cls] and "auto_map" not in config and "per_layer_config" not in config
        assert (config["num_key_value_heads"], config["head_dim"], config["intermediate_size"]) == (2, 6, 16)
        assert config["num_hidden_layers"] == sum(not layer.dropped for layer in kept)
        save_file({"logits": pruned(ids()).logits.detach(), "ids": ids()}, folder / "expected.safetensors.test")
    program = (
        "import sys\nfrom transformers import AutoModelForCausalLM\nfrom safetensors.torch import load_file\n"
        "for name in sys.argv[1:]:\n"
        "    expected = load_file(name + '/expected.safetensors.test')\n"
        "    model = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=False)\n"
        "    assert (model(expected['ids']).logits == expected['logits']).all(), name\n"
        "assert not any(name.startswith(('lightning', 'transformers_modules')) for name in sys.modules)\n"
    )
    command = [sys.executable, "-I", "-c", program, *(str(one) for one in tmp_path.iterdir())]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=280)
    assert done.returncode == 0, done.stderr


def test_what_the_class_cannot_express_is_of_the_per_layer_class():
    dense = tiny("llama")
    assert type(slice_model(dense, plan_for(dense, [LayerPlan([0, 1, 2], [0])] * 4))).__name__.startswith("PerLayer")
    assert type(slice_model(dense, plan_for(dense, KEPT))).__name__.startswith("PerLayer")
    crossed = [LayerPlan([0], [0, 1], [2, 3, 4, 5])] * 4
    assert type(slice_model(dense, plan_for(dense, crossed))).__name__.startswith("PerLayer")


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2"])
def test_llama_cpp_takes_a_stock_shape(name, tmp_path, tokenizer):
    """Its converter's conditions and its loader's, and the tensors go through a file and back."""
    fields = {"llama": {"head_dim": 8}, "mistral": {"head_dim": 8, "sliding_window": None}, "qwen2": {"head_dim": 4}}
    dense = tiny(name, vocab_size=320, **fields[name])
    groups = [0, 1, 2, 3] if name == "qwen2" else [1, 3]
    pruned = slice_model(dense, plan_for(dense, [LayerPlan(groups, list(range(0, 48, 3)))] * 4))
    gguf_file.write(tmp_path / "model.gguf", pruned, tokenizer)
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    arch = "qwen2" if name == "qwen2" else "llama"

    def value(key: str) -> int:
        (number,) = reader.fields[f"{arch}.{key}"].parts[-1].tolist()  # one number: no list of one a layer
        return number

    heads, kv_heads, dim = (value(f"attention.{key}") for key in ("head_count", "head_count_kv", "key_length"))
    hidden, width = value("embedding_length"), value("feed_forward_length")
    assert heads % kv_heads == 0 and value("rope.dimension_count") == dim
    if arch == "qwen2":
        assert heads * dim == hidden  # it expects square projections of queries
    tensors = {tensor.name: tuple(tensor.shape.tolist()) for tensor in reader.tensors}
    expected = {
        "attn_q.weight": (hidden, heads * dim),
        "attn_k.weight": (hidden, kv_heads * dim),
        "attn_v.weight": (hidden, kv_heads * dim),
        "attn_output.weight": (heads * dim, hidden),
        "ffn_gate.weight": (hidden, width),
        "ffn_up.weight": (hidden, width),
        "ffn_down.weight": (width, hidden),
    }
    for layer in range(value("block_count")):
        assert {part: tensors[f"blk.{layer}.{part}"] for part in expected} == expected
    names = gguf.get_tensor_name_map(_architecture(arch), 4)
    known = {names.get_name(key, try_suffixes=(".weight", ".bias")) for key in pruned.state_dict()}
    assert known == set(tensors), "the converter has a name for every tensor"
    with torch.no_grad():
        again = load(tmp_path / "model.gguf")(ids()).logits
        assert torch.allclose(again, pruned(ids()).logits, atol=1e-5)


def _architecture(name: str) -> gguf.MODEL_ARCH:
    return next(arch for arch, known in gguf.MODEL_ARCH_NAMES.items() if known == name)


@pytest.mark.parametrize(
    ("name", "fields"),
    [("llama", {}), ("llama", {"attention_bias": True, "mlp_bias": True}), ("mistral", {}), ("qwen2", {})],
)
@pytest.mark.parametrize("kept", [KEPT, DROPPED, [KEPT[2]] * 4, [KEPT[1]] * 4])
def test_the_size_of_the_padded_export_is_known_without_weights(name, fields, kept):
    dense = tiny(name, **fields)
    plan = plan_for(dense, kept)
    padded = pad_to_stock(slice_model(dense, plan))
    assert padded_parameters(dense.config, ModelShape.of(dense, 4), plan.layers) == padded.parameters


# ---- the commands -------------------------------------------------------------------------------------------------


@pytest.fixture
def data(tokenizer):
    def calibration(count, seed):
        return batches(4)[: (count + 1) // 2]

    return SimpleNamespace(
        tokenizer=tokenizer,
        block_size=20,
        batch_size=2,
        name="toy",
        perplexity_on="toy text",
        calibration=calibration,
        val_dataloader=lambda: batches(2),
    )


@pytest.fixture
def make(base, tmp_path):
    def module(**arguments) -> StructuredPruning:
        given = {"base": str(base), "output": str(tmp_path / "pruned"), "calibration_blocks": 6, "verify_blocks": 4}
        return StructuredPruning(**(given | {"cache_dir": str(tmp_path / "cache")} | arguments))

    return module


def test_prune_verify_and_export_a_stock_shape(make, data, tmp_path, capsys):
    dry = make().prune(data, CPU, dry_run=True)["structure"]
    printed = " ".join(capsys.readouterr().out.split())
    assert "its stock export, MB" in printed and "tried by masks" in printed and "a group of every layer is" in printed
    assert "0 – 3" in printed or dry["settings"]["dropped"], "layers that are alike take one row"
    assert not (tmp_path / "pruned").exists()
    structure = make().prune(data, CPU)["structure"]
    assert structure["layers"] == dry["layers"] and structure["settings"]["trials"] == dry["settings"]["trials"]
    assert structure["shape"] == "stock" and structure["allocation"] is None
    assert structure["model_class"] == "LlamaForCausalLM"
    kept = {(e["groups_kept"], e["channels_kept"]) for e in structure["layers"] if e["groups_kept"]}
    assert len(kept) == 1
    assert structure["export_bytes_after"] == structure["weight_bytes_after"]
    step = 4 * 4 * 96  # 4 channels of every layer
    assert abs(structure["budget_obtained"] - structure["budget_requested"]) <= step / 2
    make().verify(data, CPU)
    exported = make().export(data, CPU)["structure"]
    assert exported["portable_class"] == "LlamaForCausalLM" and exported["portable_padding_parameters"] == 0
    assert "plain LlamaForCausalLM" in (tmp_path / "pruned/README.md").read_text()
    json.dumps(structure, allow_nan=False)


def _own_text(folder: Path):
    """What a model itself finds likeliest, as calibration: any pruning makes it less likely."""
    text = load(folder).generate(ids(8)[:, :3], max_new_tokens=17, do_sample=False)
    return lambda count, seed: [{"input_ids": text, "labels": text}]


def _edited(folder: Path, tokenizer, change) -> Path:
    model = tiny(vocab_size=320)
    with torch.no_grad():
        change(model)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _idle_mlps(model) -> None:
    for layer in model.model.layers:
        layer.mlp.down_proj.weight[:, 8:] *= 1e-3


def _idle_heads(model) -> None:
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight[:, 24:] *= 1e-3


def _idle_layer(model) -> None:
    model.model.layers[2].self_attn.o_proj.weight *= 1e-2
    model.model.layers[2].mlp.down_proj.weight *= 1e-2


@pytest.mark.parametrize(
    ("change", "budget", "groups", "dropped"),
    [(_idle_mlps, 0.25, 4, []), (_idle_heads, 0.26, 2, []), (_idle_layer, 0.25, 4, [2])],
    ids=["MLPs", "heads", "a layer"],
)
def test_trials_find_what_costs_nothing(change, budget, groups, dropped, make, data, tmp_path, tokenizer):
    folder = _edited(tmp_path / "edited", tokenizer, change)
    data.calibration = _own_text(folder)
    structure = make(base=str(folder), budget=budget).prune(data, CPU)["structure"]
    settings = structure["settings"]
    assert max(entry["groups_kept"] for entry in structure["layers"]) == groups
    assert settings["dropped"] == dropped
    losses = sorted(trial["loss"] for trial in settings["trials"])
    assert losses[0] < losses[1] - 1e-3


def test_a_trial_is_the_loss_of_the_sliced_model_and_is_made_once(make, data, tmp_path, monkeypatch):
    from lightning_modules.perplexity import mean_nll
    from lightning_modules.structured_pruning import planner

    asked = []
    monkeypatch.setattr(planner, "mean_nll", lambda *a: asked.append(1) or mean_nll(*a))
    module = make(channel_multiple=1, probe_blocks=3, budget=0.35, compensation=Unchanged())
    trials = module.prune(data, CPU)["structure"]["settings"]["trials"]
    assert len(asked) == len(trials) > 2
    best = min(trials, key=lambda trial: trial["loss"])
    text = [batches(4)[0], {name: part[:1] for name, part in batches(4)[1].items()}]
    assert mean_nll(load(tmp_path / "pruned"), text) == pytest.approx(best["loss"], rel=1e-5)
    whole = ModelShape.of(tiny(vocab_size=320), 4)
    sizes = set()
    for trial in trials:
        kept = [s for i, s in enumerate(whole.shapes) if i not in trial["dropped"]]
        sizes.add(sum(parameters_of(s, trial["groups"], trial["channels"]) for s in kept))
    assert max(sizes) - min(sizes) <= 4 * 96, "all remove the same, to a channel of every layer"
    module.prune(data, CPU)
    assert len(asked) == len(trials)
    (kept,) = (tmp_path / "cache/structured_pruning").glob("*/trials-*.json")
    kept.write_text(kept.read_text().replace(".", ".1", 1))
    module.prune(data, CPU)
    assert len(asked) == 2 * len(trials)


def test_shapes_are_judged_after_a_refit_on_other_text_than_they_are_tried_on(tmp_path, monkeypatch):
    """Every channel has a twin, whose part the other can take over once it is refitted; a layer does very little."""
    from lightning_modules.structured_pruning import planner, refitting

    monkeypatch.setattr(refitting, "stage", None)  # one within that of the trials would write over its bar
    model = tiny(dtype=torch.float64)
    with torch.no_grad():
        for layer in model.model.layers:
            for matrix in (layer.mlp.gate_proj, layer.mlp.up_proj):
                matrix.weight[24:] = matrix.weight[:24]
        model.model.layers[2].self_attn.o_proj.weight *= 0.1
        model.model.layers[2].mlp.down_proj.weight *= 0.1
    text = model.generate(ids(16)[:, :3], max_new_tokens=29, do_sample=False)
    rows = [{"input_ids": row, "labels": row} for row in text.split(2)]
    target = round(0.25 * sum(shape.parameters for shape in _shapes(model)))
    seen = []
    refitted_on = planner.refit
    monkeypatch.setattr(planner, "refit", lambda *given: seen.append(given[3]) or refitted_on(*given))

    def trials(compensation) -> tuple[list[dict], list[int]]:
        given = (model, "toy", rows, Refitted(by_loss=False), Layout(multiple=1), tmp_path, stage, 3, compensation)
        plan = Planner(*given).plan(target, {})
        assert not Planner(*given).work(target)
        return plan.settings["trials"], plan.settings["dropped"]

    masked, dropped = trials(Unchanged())
    assert dropped == [2] and not seen and {trial["refitted"] for trial in masked} == {None}
    again, dropped = trials(LeastSquares(damping=[1e-6]))
    assert dropped == [] and [trial["loss"] for trial in again] == [trial["loss"] for trial in masked]
    losses = {tuple(trial["dropped"]): trial["refitted"] for trial in again if trial["refitted"] is not None}
    assert losses[()] < losses[(2,)] and 2 <= len(losses) <= 3
    assert len(seen) == len(losses) and {sum(len(b["input_ids"]) for b in text) for text in seen} == {5}
    first = seen[0][0]["input_ids"]
    assert torch.equal(first, rows[1]["input_ids"][1:]), "the probes are other rows"
    assert trials(LeastSquares(damping=[1e-6])) == (again, []) and len(seen) == len(losses), "measured once"
    few = Planner(model, "toy", rows[:2], Refitted(), Layout(), tmp_path, stage, 3, LeastSquares())
    assert {trial["refitted"] for trial in few.plan(target, {}).settings["trials"]} == {None}


@pytest.mark.parametrize(
    ("compensation", "rows", "padded"), [(Bias(), 4, 4), (LeastSquares(), 8, 15), (Rotation(folds=6), 6, 10)]
)
def test_a_quick_refit_has_the_rows_that_are_held_out_in_turn_and_the_tokens_that_it_needs(
    compensation, rows, padded, tmp_path
):
    text = batches(10)
    ids = torch.cat([batch["input_ids"] for batch in text])
    for expected in (rows, padded):
        planner = Planner(tiny(), "toy", text, Refitted(), Layout(), tmp_path, stage, 3, compensation)
        found = torch.cat([batch["input_ids"] for batch in planner._refit_rows])
        assert torch.equal(found, ids[3 : 3 + expected])
        for batch in text:  # half of it for the second time
            batch["attention_mask"] = torch.ones_like(batch["input_ids"]).index_fill_(1, torch.arange(10), 0)


@pytest.mark.parametrize("drop_by", ["damage", "block_influence"])
def test_the_estimate_counts_what_is_still_to_be_measured(drop_by, make, data, caplog):
    caplog.set_level("INFO")
    make(drop_by=drop_by).prune(data, CPU, dry_run=True)
    make(drop_by=drop_by).prune(data, CPU, dry_run=True)
    first, second = (record.message for record in caplog.records if record.message.startswith("scoring:"))
    assert all(part in first for part in ("layers ", "gate_taylor ", "shapes "))
    assert second == "scoring: everything is measured already"


def test_a_fixed_stock_shape_needs_no_weights(make, data, base, tmp_path):
    (tmp_path / "config_only").mkdir()
    (tmp_path / "config_only/config.json").write_text((base / "config.json").read_text())
    fixed = {"attention_share": 0.0, "drop_layers": 0}
    dry = make(base=str(tmp_path / "config_only"), **fixed).prune(data, CPU, dry_run=True)["structure"]
    real = make(**fixed).prune(data, CPU)["structure"]
    assert dry["layers"] == real["layers"] and real["settings"]["trials"] == []


@pytest.mark.parametrize("drop_by", ["damage", "block_influence"])
def test_protected_layers_are_never_dropped(drop_by, make, data, tmp_path, tokenizer):
    folder = _edited(tmp_path / "edited", tokenizer, _idle_layer)
    common = {"base": str(folder), "budget": 0.3, "drop_layers": 1, "drop_by": drop_by}
    assert make(**common).prune(data, CPU)["structure"]["settings"]["dropped"] == [2]
    assert make(**common, protect_layers=[2]).prune(data, CPU)["structure"]["settings"]["dropped"] != [2]
    free = make(**(common | {"drop_layers": "auto"}), shape="free", protect_layers=[2]).prune(data, CPU)["structure"]
    kept = [(entry["groups_kept"], entry["channels_kept"]) for entry in free["layers"]]
    assert kept[2] == (4, 48) and all(
        groups and pair != (4, 48) for i, pair in enumerate(kept) if i != 2 for groups in pair
    )


def test_a_free_shape_divides_the_targets_of_both_kinds(make, data):
    for share in (0.0, 0.5, 1.0):
        structure = make(shape="free", attention_share=share, budget=0.2, channel_multiple=1).prune(data, CPU)[
            "structure"
        ]
        heads = sum(e["groups"] - e["groups_kept"] for e in structure["layers"])
        group = _shapes(tiny())[0].group_parameters
        assert heads * group == pytest.approx(share * structure["budget_requested"], abs=1.5 * group)
        requested = structure["budget_requested"]
        assert abs(structure["budget_obtained"] - requested) <= (96 if share < 1 else group)


# peft 0.21 still asks transformers by the old name
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_rounds_of_stock_shapes_are_a_stock_shape(make, data, tmp_path):
    structure = make(rounds=2, recovery_steps=2, budget=0.4).prune(data, CPU)["structure"]
    assert len({(e["groups_kept"], e["channels_kept"]) for e in structure["layers"]}) == 1
    assert structure["model_class"] == "LlamaForCausalLM"
    make().verify(data, CPU)


def test_a_model_of_unlike_layers_becomes_one_of_like_layers(make, data, base, tmp_path, tokenizer):
    dense = load(base)
    kept = [LayerPlan([0, 1, 2, 3], list(range(48))), LayerPlan([0, 1], list(range(40)))] * 2
    save(tmp_path / "unlike", slice_model(dense, plan_for(dense, kept)), tokenizer, "# unlike")
    structure = make(base=str(tmp_path / "unlike"), budget=0.4).prune(data, CPU)["structure"]
    assert len({(e["groups_kept"], e["channels_kept"]) for e in structure["layers"] if e["groups_kept"]}) == 1
    assert structure["model_class"] == "LlamaForCausalLM"
    with pytest.raises(ValueError, match="are fewer than go at least"):
        make(base=str(tmp_path / "unlike"), budget=0.02).prune(data, CPU)
