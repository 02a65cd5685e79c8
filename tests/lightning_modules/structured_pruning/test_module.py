"""The commands, on a small model and a stand-in for the data: prune, verify, export, and what they refuse."""

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lightning_modules.loading import load, load_tokenizer
from lightning_modules.structured_pruning import StructuredPruning, module
from lightning_modules.structured_pruning.allocation.curves import Curves
from lightning_modules.structured_pruning.allocation.global_ranking import Global
from lightning_modules.structured_pruning.allocation.inverse import Inverse
from lightning_modules.structured_pruning.allocation.uniform import Uniform
from lightning_modules.structured_pruning.compensation.least_squares import LeastSquares
from lightning_modules.structured_pruning.compensation.unchanged import Unchanged
from lightning_modules.structured_pruning.importance.gate_taylor import GateTaylor
from lightning_modules.structured_pruning.importance.per_tensor_truncation import PerTensorTruncation
from lightning_modules.structured_pruning.importance.random import Random
from lightning_modules.structured_pruning.importance.sequential_taylor import SequentialTaylor
from lightning_modules.structured_pruning.plan import FILE, PruningPlan
from lightning_modules.structured_pruning.provenance import settings_hash
from tests.lightning_modules.structured_pruning.toy import batches, tiny

CPU = torch.device("cpu")
# peft 0.21 still asks transformers by the old name
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


def calibration(count, seed, skip=0):
    """The first of 8 rows after some, two a batch."""
    found = batches(4)[skip // 2 :][: (count + 1) // 2]
    return [{name: part[: count - 2 * i] for name, part in batch.items()} for i, batch in enumerate(found)]


@pytest.fixture
def data(tokenizer):
    wide, narrow = batches(2)  # batches of instructions are as wide as their longest row
    return SimpleNamespace(
        tokenizer=tokenizer,
        block_size=20,
        batch_size=2,
        name="toy",
        perplexity_on="toy text",
        calibration=calibration,
        val_dataloader=lambda: [wide, {name: part[:, :15] for name, part in narrow.items()}],
    )


@pytest.fixture
def make(base, tmp_path):
    def module(**arguments) -> StructuredPruning:
        given = {"base": str(base), "output": str(tmp_path / "pruned"), "calibration_blocks": 6, "verify_blocks": 4}
        given |= {"shape": "free", "probe_blocks": 6}  # stock shapes: test_stock.py
        return StructuredPruning(**(given | {"cache_dir": str(tmp_path / "cache")} | arguments))

    return module


def _measured(monkeypatch) -> list[str]:
    """Names of what is measured and not taken from a file."""
    calls: list[str] = []
    for cls in (GateTaylor,):
        score = cls.score
        monkeypatch.setattr(cls, "score", lambda self, *a, score=score: calls.append(self.name) or score(self, *a))
    from lightning_modules.structured_pruning import layer_damage

    nll = layer_damage.mean_nll
    monkeypatch.setattr(layer_damage, "mean_nll", lambda *a: calls.append("loss") or nll(*a))
    return calls


def test_prune_verify_and_export(make, data, tmp_path):
    fields = make().prune(data, CPU)
    structure = fields["structure"]
    assert structure["importance"] == "gate_taylor" and structure["allocation"] == "inverse"
    assert structure["zeroed_and_sliced"] <= 1e-4 < structure["pruned_and_dense"]
    assert structure["reload_difference"] == 0
    assert fields["val_ppl"] == structure["ppl_after"] != structure["ppl_before"]
    requested, obtained = structure["budget_requested"], structure["budget_obtained"]
    assert requested == round(0.25 * structure["decoder_parameters_before"])
    assert abs(requested - obtained) <= 0.005 * structure["decoder_parameters_before"]
    model = load(tmp_path / "pruned")
    assert model.num_parameters() == structure["parameters_after"]
    assert [entry["groups_kept"] for entry in structure["layers"]] == [
        layer.num_key_value_heads for layer in model.config.per_layer_config
    ]
    assert (tmp_path / "pruned/model.safetensors").stat().st_size == pytest.approx(
        structure["weight_bytes_after"], rel=0.1
    )
    card = (tmp_path / "pruned/README.md").read_text()
    assert "trust_remote_code=True" in card and str(tmp_path) not in card, "no folder of this machine in a card"
    json.dumps(fields, allow_nan=False)

    verified = make().verify(data, CPU)["structure"]
    assert verified["zeroed_and_sliced"] <= 1e-4 and verified["rolled_head"] > 1e-3
    with pytest.warns(UserWarning, match="padding"):
        exported = make().export(data, CPU)["structure"]
    assert exported["portable_class"] == "LlamaForCausalLM" and exported["portable_max_difference"] <= 1e-5
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned-portable")
    assert stock.num_parameters() == exported["portable_parameters"]


def test_measurements_are_kept_and_an_interrupted_one_goes_on(make, data, tmp_path, monkeypatch):
    calls = _measured(monkeypatch)
    make().prune(data, CPU)
    assert calls == ["loss"] * 5 + ["gate_taylor"]
    plan = PruningPlan.load(tmp_path / "pruned" / FILE)
    make(budget=0.3).prune(data, CPU)
    assert len(calls) == 6
    (damage,) = (tmp_path / "cache/structured_pruning").glob("*/damage-*.json")
    (scores,) = (tmp_path / "cache/structured_pruning").glob("*/scores-*.safetensors")
    kept = json.loads(damage.read_text())["losses"][:3]
    damage.write_text(json.dumps({"losses": kept, "hash": settings_hash(kept)}))
    scores.write_bytes(b"not safetensors")
    make().prune(data, CPU)
    assert calls[6:] == ["loss"] * 2 + ["gate_taylor"]
    assert PruningPlan.load(tmp_path / "pruned" / FILE) == plan
    damage.write_text(damage.read_text().replace(".", "1.", 1))  # still JSON, of other numbers
    flipped = bytearray(scores.read_bytes())
    flipped[-3] ^= 1  # still safetensors, of other scores
    scores.write_bytes(flipped)
    make().prune(data, CPU)
    assert calls[9:] == ["loss"] * 5 + ["gate_taylor"]
    assert PruningPlan.load(tmp_path / "pruned" / FILE) == plan


def _half_asked(batch):
    return batch | {"labels": batch["labels"].masked_fill(torch.arange(20) < 10, -100)}


def _two_samples(batch):
    return batch | {"position_ids": (torch.arange(20) % 10).expand_as(batch["input_ids"])}


def _other_text(batch):
    return {name: part.flip(1) for name, part in batch.items()}


@pytest.mark.parametrize("change", [_half_asked, _two_samples, _other_text])
def test_measurements_on_another_text_are_made_anew(make, data, monkeypatch, change):
    calls = _measured(monkeypatch)
    make().prune(data, CPU)
    before = make().prune(data, CPU)["structure"]["layers"]
    assert len(calls) == 6
    data.calibration = lambda count, seed: [change(batch) for batch in calibration(count, seed)]
    after = make().prune(data, CPU)["structure"]["layers"]
    assert calls[6:] == ["loss"] * 5 + ["gate_taylor"] and after != before


def test_the_calibration_text_is_drawn_by_the_seed_of_the_run(make, data, monkeypatch):
    asked = []
    data.calibration = lambda count, seed: asked.append((count, seed)) or calibration(count, seed)
    for seed in ("3", "4"):
        monkeypatch.setenv("PL_GLOBAL_SEED", seed)
        make().prune(data, CPU)
    assert asked == [(6, 3), (6, 4)]


def test_dtype_and_attention_reach_base_and_result_and_a_tokenizer_may_come_from_the_data(make, data, base, tmp_path):
    bare = tmp_path / "bare"
    load(base).save_pretrained(bare)
    with pytest.raises(ValueError, match=r"has no tokenizer.*data\.tokenizer"):
        make(base=str(bare)).prune(data, CPU)
    data.named_tokenizer = data.tokenizer
    module = make(base=str(bare), dtype="bfloat16", attention="eager")
    module.prune(data, CPU)
    saved = load(tmp_path / "pruned", "auto")
    assert saved.dtype == torch.bfloat16
    assert load_tokenizer(tmp_path / "pruned").get_vocab() == data.tokenizer.get_vocab()
    built = module.build_model()
    assert built.dtype == torch.bfloat16 and built.config._attn_implementation == "eager"


def test_dry_run_writes_no_model_and_counts_as_the_real_run_does(make, data, tmp_path, capsys):
    planned = make().prune(data, CPU, dry_run=True)["structure"]
    out = capsys.readouterr().out
    assert not (tmp_path / "pruned").exists() and "KV cache per token" in out
    assert (
        planned["peak_bytes"].keys() == {"load", "perplexity", "score", "slice", "verify", "compensate"}
        and "memory at the" in out
    )
    real = make().prune(data, CPU)["structure"]
    assert planned["layers"] == real["layers"]
    assert all(real[name] == value for name, value in planned.items() if name.endswith(("before", "after")))


def test_a_uniform_dry_run_reads_no_weights(make, data, base, tmp_path):
    (tmp_path / "config_only").mkdir()
    (tmp_path / "config_only/config.json").write_text((base / "config.json").read_text())
    module = make(base=str(tmp_path / "config_only"), allocation=Uniform())
    structure = module.prune(data, CPU, dry_run=True)["structure"]
    assert structure["layers"] == make(allocation=Uniform()).prune(data, CPU)["structure"]["layers"]


@pytest.mark.parametrize("importance", [SequentialTaylor(), Random(seed=3)], ids=lambda i: i.name)
@pytest.mark.parametrize("allocation", [Uniform(), Global()], ids=lambda a: a.name)
def test_methods_combine(importance, allocation, make, data):
    structure = make(importance=importance, allocation=allocation, budget=0.4).prune(data, CPU)["structure"]
    assert (structure["importance"], structure["allocation"]) == (importance.name, allocation.name)
    assert structure["zeroed_and_sliced"] <= 1e-4


def test_whole_layers_can_go(make, data, tmp_path):
    structure = make(drop_layers=1, budget=0.4, allocation=Inverse(cap=0.9)).prune(data, CPU)["structure"]
    assert [entry["groups_kept"] > 0 for entry in structure["layers"]].count(False) == 1
    assert load(tmp_path / "pruned").config.num_hidden_layers == 3
    make().verify(data, CPU)
    with pytest.raises(ValueError, match="dropping 2 layers removes"):
        make(drop_layers=2, budget=0.3).prune(data, CPU)
    with pytest.raises(ValueError, match="drop_layers must lie between 0 and 3"):
        make(drop_layers=4).prune(data, CPU)


def test_rounds_with_recovery_remove_the_whole_budget(make, data, tmp_path):
    module = make(rounds=2, recovery_steps=2, recovery_learning_rate=1e-2, budget=0.4)
    planners, planner = [], module._planner
    module._planner = lambda *given: planners.append(planner(*given)) or planners[-1]
    structure = module.prune(data, CPU)["structure"]
    assert structure["score_seconds"] == sum(one.score_seconds for one in planners) > planners[1].score_seconds
    assert structure["settings"]["round"] == 2 and structure["settings"]["notes"] == []
    assert abs(structure["budget_obtained"] - structure["budget_requested"]) <= 0.01 * structure["budget_requested"]
    assert load(tmp_path / "pruned").num_parameters() == structure["parameters_after"]
    verified = make().verify(data, CPU)["structure"]  # goes the same way again
    assert verified["zeroed_and_sliced"] <= 1e-9 < verified["pruned_and_dense"]
    plans = [PruningPlan.load(tmp_path / f"pruned/rounds/{number}.json") for number in (1, 2)]
    whole = PruningPlan.load(tmp_path / "pruned" / FILE)
    assert [len(layer.groups) for layer in whole.layers] == [len(layer.groups) for layer in plans[1].layers]
    assert whole.shapes == plans[0].shapes != plans[1].shapes and whole.base_hash == plans[0].base_hash

    adapters = tmp_path / "pruned/rounds/1.safetensors"
    changed = {name: 1.5 * weight for name, weight in load_file(adapters).items()}
    (tmp_path / "pruned/pare.json").unlink()
    save_file(changed, adapters)
    with pytest.raises(ValueError, match="weights were changed after pruning"):
        make().verify(data, CPU)
    plans[1].save(tmp_path / "pruned/rounds/1.json")
    with pytest.raises(ValueError, match="a plan is not for the model that the round before leaves"):
        make().verify(data, CPU)


@pytest.mark.parametrize("allocation", [Inverse, Curves])
def test_the_largest_budget_under_a_limit_is_found(allocation, make, data, base):
    # What the model itself finds likeliest: any pruning makes it less likely.
    text = load(base).generate(batches(1)[0]["input_ids"][:, :2], max_new_tokens=18, do_sample=False)
    likely, asked = [{"input_ids": text, "labels": text}], []

    def drawn(count, seed, skip=0):
        asked.append((count, skip))
        return likely if skip else calibration(count, seed)

    def pruned(validation):
        data.calibration, data.val_dataloader = drawn, lambda: validation
        return make(
            max_ppl_ratio=1.2, search_blocks=2, budget=0.6, allocation=allocation(cap=0.8), compensation=Unchanged(),
            overwrite=True,
        ).prune(data, CPU)["structure"]  # fmt: skip

    structure = pruned(likely)
    share = structure["settings"]["share_found"]
    assert 0 < share < 0.6 and asked == [(6, 0), (2, 6)]
    assert structure["ppl_after"] <= 1.2001 * structure["ppl_before"]
    assert structure["settings"]["chosen_on"].startswith("2 blocks of training text that parts are not scored on")
    other = pruned(batches(2))  # what is reported has no part in the choice
    assert other["settings"]["share_found"] == share and other["ppl_before"] != structure["ppl_before"]


def test_a_given_plan_is_followed(make, data, tmp_path):
    first = make(importance=Random(seed=1)).prune(data, CPU)["structure"]
    again = make(output=str(tmp_path / "again"), plan=str(tmp_path / "pruned" / FILE)).prune(data, CPU)["structure"]
    assert again["layers"] == first["layers"] and again["importance"] == "random"
    plan = json.loads((tmp_path / "pruned" / FILE).read_text())
    del plan["sha256"]
    (tmp_path / "other.json").write_text(json.dumps(plan | {"base_hash": "0" * 64}))
    with pytest.raises(ValueError, match="plan: made for"):
        make(plan=str(tmp_path / "other.json")).prune(data, CPU)


def test_the_truncating_control_is_saved_but_says_it_is_no_slice(make, data):
    structure = make(importance=PerTensorTruncation(), budget=0.5).prune(data, CPU)["structure"]
    assert structure["zeroed_and_sliced"] > 1e-2
    with pytest.raises(ValueError, match="query heads do not belong"):
        make().verify(data, CPU)


def test_what_cannot_be_is_refused_before_anything_is_written(make, data, base, tmp_path):
    for arguments, message in (
        ({"budget": 0.95}, "the nearest possible"),
        ({"budget": 1.5}, "budget: a share"),
        ({"budget": 100.0, "budget_unit": "bytes"}, "budget: 100 bytes cannot be met"),
        ({"channel_multiple": 64}, "channel_multiple"),
    ):
        with pytest.raises(ValueError, match=message):
            make(**arguments).prune(data, CPU)
    with pytest.raises(ValueError, match="max_ppl_ratio"):
        make(max_ppl_ratio=0.9)
    with pytest.raises(ValueError, match="verify_blocks"):
        make(verify_blocks=0)
    with pytest.raises(FileNotFoundError, match="run prune first"):
        make().verify(data, CPU)
    assert not (tmp_path / "pruned").exists()


@pytest.mark.parametrize("name", ["mlp.down_proj", "mlp.up_proj"])
@pytest.mark.parametrize("compensation", [Unchanged(), LeastSquares()], ids=lambda c: c.name)
def test_verify_sees_one_weight_that_is_a_hundredth_off(make, data, tmp_path, name, compensation):
    make(compensation=compensation).prune(data, CPU)
    make().verify(data, CPU)  # what was done is said by the plan
    (tmp_path / "pruned/pare.json").unlink()
    weights = load_file(tmp_path / "pruned/model.safetensors")
    weights[f"model.layers.2.{name}.weight"][3, 2] *= 1.01
    save_file(weights, tmp_path / "pruned/model.safetensors", {"format": "pt"})
    wanted = (
        f"verify: model.layers.2.{name}.weight is not" if compensation.refits else "logits of the sliced model differ"
    )
    with pytest.raises(ValueError, match=wanted):
        make().verify(data, CPU)


def test_compensation_is_recorded_saved_and_better_than_none(make, data, tmp_path, capsys):
    """On text like the calibration text: this toy knows no other."""
    data.calibration = lambda count, seed: batches(20)
    data.val_dataloader = lambda: batches(20)
    structure = make(budget=0.4).prune(data, CPU)["structure"]
    bare = make(output=str(tmp_path / "bare"), budget=0.4, compensation=Unchanged()).prune(data, CPU)["structure"]
    assert (structure["compensation"], bare["compensation"]) == ("least_squares", "unchanged")
    done = structure["settings"]["compensation"]
    assert done["folds"] == 4 and done["fits"] and done["tensors"] and structure["layers"] == bare["layers"]
    changed, slice_ = (load_file(tmp_path / f"{name}/model.safetensors") for name in ("pruned", "bare"))
    assert {name for name in slice_ if not torch.equal(slice_[name], changed[name])} == set(done["tensors"])
    dense = make(output=str(tmp_path / "d")).prune(data, CPU, dry_run=True)["structure"]
    assert "compensation" not in dense["settings"]
    capsys.readouterr()
    make().verify(data, CPU)
    shown = capsys.readouterr().out
    assert "error by least_squares" in shown and f"{done['fits'][0]['left']:.2%}" in shown
    assert "| compensation | least_squares |" in (tmp_path / "pruned/README.md").read_text()


def test_biases_that_a_compensation_adds_are_counted_saved_and_verified(make, data, tmp_path):
    structure = make(compensation=LeastSquares(bias=True)).prune(data, CPU)["structure"]
    model = load(tmp_path / "pruned")
    assert model.config.attention_bias and model.config.mlp_bias
    assert structure["parameters_after"] == model.num_parameters() and structure["reload_difference"] == 0
    make().verify(data, CPU)


def test_rounds_with_compensation_are_gone_through_again(make, data, tmp_path, monkeypatch):
    make(rounds=2, recovery_steps=2, budget=0.4, compensation=LeastSquares(damping=[1e3])).prune(data, CPU)
    refitted = tmp_path / "pruned/rounds/1.refitted.safetensors"
    tensors = load_file(refitted)
    assert tensors and not (tmp_path / "pruned/rounds/2.refitted.safetensors").exists()
    put, given = module.put_refitted, []
    monkeypatch.setattr(module, "put_refitted", lambda model, found: given.append(found) or put(model, found))
    make().verify(data, CPU)
    assert [found.keys() for found in given] == [tensors.keys()]
    (tmp_path / "pruned/pare.json").unlink()
    save_file({name: 1.5 * tensor for name, tensor in tensors.items()}, refitted)
    with pytest.raises(ValueError, match="what was refitted in round 1 is not what its plan says"):
        make().verify(data, CPU)
    refitted.unlink()
    with pytest.raises(ValueError, match="what was refitted in round 1 is not what its plan says"):
        make().verify(data, CPU)


def test_text_of_another_tokenizer_is_refused(make, data):
    data.tokenizer = range(400)
    with pytest.raises(ValueError, match="use the model's own tokenizer"):
        make().prune(data, CPU)


def test_verify_refuses_another_base(make, data, base, tmp_path, tokenizer):
    make().prune(data, CPU)
    tiny(vocab_size=320, seed=9).save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"plan: made for .* with weights"):
        make(base=str(tmp_path / "other")).verify(data, CPU)


def test_the_module_validates_what_was_saved(make, data, tmp_path):
    make().prune(data, CPU)
    module = make()
    module._trainer = SimpleNamespace(datamodule=data)
    module.configure_model()
    assert type(module.model).__name__ == "PerLayerLlamaForCausalLM"
