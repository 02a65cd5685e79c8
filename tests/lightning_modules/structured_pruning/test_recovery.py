"""Recovery: what is trained, what is saved, and that nothing lands on the wrong base."""

import json
import shutil
import warnings
from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch as L
import pytest
import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from callbacks import HFExport
from lightning_modules.data.tokenizer import train_bpe
from lightning_modules.distillation import divergence
from lightning_modules.loading import load
from lightning_modules.structured_pruning import LoraRecovery
from lightning_modules.structured_pruning.plan import LayerPlan, PruningPlan
from lightning_modules.structured_pruning.provenance import model_hash
from lightning_modules.structured_pruning.saving import save
from lightning_modules.structured_pruning.sharing import share_equal
from lightning_modules.structured_pruning.slicing import slice_model
from strategies import CompressedFSDP
from strategies.compressors.int8 import Int8
from tests.lightning_modules.data.toy import Toy
from tests.lightning_modules.structured_pruning.toy import KEPT as KEPT_FOUR
from tests.lightning_modules.structured_pruning.toy import ids, plan_for, tiny

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),  # Lightning 2.6 with torch 2.13
    pytest.mark.filterwarnings("ignore:.*(_get_pg_default_device|Multiple backends)"),  # torch's FSDP1 internals
]
KEPT = [LayerPlan([0, 2], list(range(0, 48, 2))), LayerPlan([1, 2, 3], list(range(16)))]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A dense model, it pruned, and another model pruned alike; all with the data's tokenizer."""
    root = tmp_path_factory.mktemp("models")
    data = Toy(cache_dir=str(root / "cache"))
    data.prepare_data()
    data.setup("fit")
    config = AutoConfig.for_model(
        "llama", vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=8,
        num_key_value_heads=4, head_dim=6, max_position_embeddings=64, initializer_range=0.2, pad_token_id=0,
    )  # fmt: skip
    plan = PruningPlan(KEPT, [[4, 48]] * 2, "toy", "")
    for name, seed in (("base", 0), ("other", 1)):
        torch.manual_seed(seed)
        dense = AutoModelForCausalLM.from_config(config)
        save(root / f"{name}-dense", dense, data.tokenizer, "# dense")
        save(root / name, slice_model(dense, plan), data.tokenizer, "# pruned", plan)
    return root


def recovery(folders, base="base", **arguments):
    defaults = {"learning_rate": 1e-2, "warmup_steps": 0, "dropout": 0.0, "lr_schedule": "constant"}
    return LoraRecovery(str(folders / base), **defaults | arguments)


def fit(
    folders, steps, module=None, export=None, checkpoint=None, strategy="auto", devices=1, batch_size=4, save_to=None
):
    L.seed_everything(3, verbose=False)
    module = module or recovery(folders)
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
    trainer = L.Trainer(
        accelerator="cpu", devices=devices, strategy=strategy, max_steps=steps, limit_val_batches=0,
        num_sanity_val_steps=0, callbacks=[HFExport(str(export))] if export else [], **quiet,
    )  # fmt: skip
    data = Toy(cache_dir=str(folders / "cache"), batch_size=batch_size)
    trainer.fit(module, data, ckpt_path=checkpoint, weights_only=True)
    if save_to:
        trainer.save_checkpoint(save_to)
    return module


def adapters(module):
    return {name: p.detach().clone() for name, p in module.named_parameters() if ".lora_" in name}


def logits(model):
    with torch.no_grad():
        return model(input_ids=torch.arange(60).view(3, 20), use_cache=False).logits


def test_fresh_adapters_change_nothing_and_are_all_that_is_trained(folders):
    module = recovery(folders, rank=3)
    module.configure_model()
    base = load(folders / "base")
    assert torch.equal(logits(module.model), logits(base))
    shapes = [p.weight.shape for n, p in base.named_modules() if n.endswith("_proj")]
    assert len(shapes) == 2 * 7
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    assert trained == sum(3 * (rows + columns) for rows, columns in shapes)
    assert module.parameter_count == base.num_parameters()
    assert module.model.training, "or dropout would be off"


def test_fit_trains_merges_and_saves_what_loads_in_one_call(folders, tmp_path):
    module = fit(folders, 5, export=tmp_path / "recovered")
    base = load(folders / "base")
    frozen = {
        n.replace("base_model.model.", "").replace(".base_layer", ""): p for n, p in module.model.named_parameters()
    }
    assert all(torch.equal(frozen[name], p) for name, p in base.named_parameters())
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "recovered")
    assert type(merged).__name__ == "PerLayerLlamaForCausalLM"
    adapted = PeftModel.from_pretrained(load(folders / "base"), str(tmp_path / "recovered/adapter")).eval()
    torch.testing.assert_close(logits(merged), logits(adapted), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(logits(merged), logits(module.model.eval()), atol=1e-5, rtol=1e-4)
    assert (logits(merged) - logits(base)).abs().max() > 0.01
    assert "auto_map" in json.loads((tmp_path / "recovered/config.json").read_text())
    assert len(AutoTokenizer.from_pretrained(tmp_path / "recovered")) <= 300
    assert "trust_remote_code=True" in (tmp_path / "recovered/README.md").read_text()


def test_a_base_of_a_stock_class_stays_one(folders, tmp_path):
    fit(folders, 2, recovery(folders, "base-dense"), export=tmp_path / "recovered")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "recovered")
    config = json.loads((tmp_path / "recovered/config.json").read_text())
    assert type(merged).__name__ == "LlamaForCausalLM" and "auto_map" not in config and "per_layer_config" not in config
    assert not list((tmp_path / "recovered").glob("*.py"))
    assert merged.state_dict().keys() == load(folders / "base-dense").state_dict().keys()


def test_export_merges_a_saved_adapter_and_refuses_another_base(folders, tmp_path):
    fit(folders, 2, export=tmp_path / "recovered")
    data = Toy(cache_dir=str(folders / "cache"))
    data.setup("fit")
    adapter = tmp_path / "recovered/adapter"
    merging = recovery(folders, adapter=str(adapter), merged=str(tmp_path / "again"))
    merging.export(data, torch.device("cpu"))
    one, two = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("recovered", "again"))
    assert torch.equal(logits(one), logits(two))
    with pytest.raises(ValueError, match="export needs the adapter to merge"):
        recovery(folders, adapter=str(adapter)).export(data, torch.device("cpu"))

    wrong = recovery(folders, "other", adapter=str(adapter), merged=str(tmp_path / "wrong"))
    for use in (lambda: wrong.export(data, torch.device("cpu")), wrong.configure_model):
        with pytest.raises(
            ValueError, match=r"was trained on .*/base \(weights \w{12}\), and .*/other has other weights"
        ):
            use()
    assert not (tmp_path / "wrong").exists()
    (adapter / "base.json").unlink()
    with pytest.raises(ValueError, match="nothing says which base it was trained on"):
        recovery(folders, adapter=str(adapter)).configure_model()
    with pytest.raises(FileNotFoundError, match=r"has no adapter_model\.safetensors"):
        recovery(folders, adapter=str(folders / "base")).configure_model()


def test_training_can_go_on_from_an_adapter(folders, tmp_path):
    first = fit(folders, 2, export=tmp_path / "recovered")
    adapter = str(tmp_path / "recovered/adapter")
    for name, value in (("rank", 2), ("alpha", 32), ("target_modules", ["q_proj"])):
        other = recovery(folders, adapter=adapter, **{name: value})
        with pytest.raises(ValueError, match=rf"{name}: the adapter in .*/adapter was trained with"):
            other.check_arguments("fit", None)
        other.check_arguments("validate", None)
    second = recovery(folders, adapter=adapter, dropout=0.1)
    second.check_arguments("fit", None)
    second.configure_model()
    assert second.lora.lora_dropout == 0.1, "training's own"
    assert all(torch.equal(p, adapters(second)[name]) for name, p in adapters(first).items())
    assert all(p.requires_grad for n, p in second.named_parameters() if ".lora_" in n)


def test_an_interrupted_run_continues_bit_for_bit_from_a_checkpoint_of_adapters_alone(folders, tmp_path):
    straight = fit(folders, 6, recovery(folders, dropout=0.1))
    fit(folders, 3, recovery(folders, dropout=0.1), save_to=tmp_path / "c.ckpt")
    saved = torch.load(tmp_path / "c.ckpt", weights_only=True)
    assert all(".lora_" in name for name in saved["state_dict"]) and len(saved["state_dict"]) == 2 * 7 * 2
    resumed = fit(folders, 6, recovery(folders, dropout=0.1), checkpoint=tmp_path / "c.ckpt")
    assert all(torch.equal(p, adapters(resumed)[name]) for name, p in adapters(straight).items())
    with pytest.raises(ValueError, match=r"base: the checkpoint was trained on .*/base"):
        fit(folders, 6, recovery(folders, "other"), checkpoint=tmp_path / "c.ckpt")
    for name, value in (("rank", 4), ("alpha", 32), ("target_modules", ["q_proj"])):
        with pytest.raises(ValueError, match=f"{name}: the checkpoint was trained with"):
            fit(folders, 6, recovery(folders, **{name: value}), checkpoint=tmp_path / "c.ckpt")
    for name in ("rank", "alpha", "target_modules"):  # a checkpoint of before does not say
        del saved["recovery"][name]
    older = recovery(folders)
    older.configure_model()
    older.on_load_checkpoint(saved)
    with pytest.raises(ValueError, match="target_modules: the checkpoint has other adapters"):
        older = recovery(folders, target_modules=["q_proj"])
        older.configure_model()
        older.on_load_checkpoint(saved)


def test_adapters_in_sixteen_bits_are_warned_of(folders):
    module = recovery(folders)
    for precision, training, expected in (("bf16-true", True, 1), ("32-true", True, 0), ("bf16-true", False, 0)):
        module = recovery(folders)
        module._trainer = SimpleNamespace(precision=precision, training=training, world_size=1, datamodule=None)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            module.configure_model()
        assert sum("adapters and rotary frequencies" in str(one.message) for one in caught) == expected


def test_recomputed_activations_give_the_same_adapters(folders):
    plain, recomputed = (fit(folders, 3, recovery(folders, gradient_checkpointing=flag)) for flag in (False, True))
    for name, p in adapters(plain).items():
        torch.testing.assert_close(p, adapters(recomputed)[name])


def test_the_teacher_is_followed_and_never_trained_or_saved(folders, tmp_path):
    dense = load(folders / "base-dense")
    module = recovery(folders, teacher=str(folders / "base-dense"), distill_weight=1.0, temperature=1.0)
    fit(folders, 30, module, export=tmp_path / "recovered", save_to=tmp_path / "c.ckpt")
    assert all(torch.equal(p, q) for p, q in zip(module.teacher.parameters(), dense.parameters(), strict=True))
    assert not any("teacher" in name for name in torch.load(tmp_path / "c.ckpt", weights_only=True)["state_dict"])
    data = Toy(cache_dir=str(folders / "cache"))
    data.setup("fit")
    batch = next(iter(data.val_dataloader()))

    def distance(model):
        with torch.no_grad():
            scores = (m(input_ids=batch["input_ids"], use_cache=False).logits for m in (model, dense))
            return divergence(*scores, batch["labels"]).item()

    recovered = AutoModelForCausalLM.from_pretrained(tmp_path / "recovered")
    assert distance(recovered) < 0.8 * distance(load(folders / "base"))


def test_hidden_states_of_kept_layers_are_paired_with_what_entered_them_in_the_teacher(folders, tmp_path):
    dense = tiny(num_hidden_layers=5)
    plan = plan_for(dense, [KEPT_FOUR[0], KEPT_FOUR[1], LayerPlan([], []), LayerPlan([], []), KEPT_FOUR[2]])
    data = Toy(cache_dir=str(folders / "cache"))
    data.setup("fit")
    save(tmp_path / "dense", dense, data.tokenizer, "# dense")
    save(tmp_path / "dropped", slice_model(dense, plan), data.tokenizer, "# pruned", plan)
    module = LoraRecovery(str(tmp_path / "dropped"), teacher=str(tmp_path / "dense"), hidden_weight=1.0, dropout=0.0)
    module.configure_model()
    assert module._pairs == [(1, 1), (2, 4), (3, 5)]
    logged = {}
    module.log = lambda name, value, **_: logged.update({name: value.item()})
    module.log_dict = lambda values: None
    module.training_step({"input_ids": ids(), "labels": ids()}, 0)
    assert logged["train/hidden"] > 0
    (tmp_path / "dropped/pruning_plan.json").unlink()
    with pytest.raises(ValueError, match=r"hidden_weight: the teacher has 5 layers and the base 3, and .* has no plan"):
        module.check_arguments("fit", None)
    for arguments in ({"hidden_weight": -1.0}, {"hidden_weight": 1.0}):
        with pytest.raises(ValueError, match="hidden_weight must not be negative, and needs a teacher"):
            recovery(folders, **arguments)
    narrow = tiny(hidden_size=24)
    save(tmp_path / "narrow", narrow, data.tokenizer, "# narrow")
    module = LoraRecovery(str(tmp_path / "narrow"), teacher=str(tmp_path / "dense"), hidden_weight=1.0)
    with pytest.raises(ValueError, match="the teacher's hidden states are 32 wide, the base's 24"):
        module.check_arguments("fit", None)


def test_what_teacher_and_base_have_in_common_is_held_once(folders):
    module = recovery(folders, teacher=str(folders / "base-dense"))
    module.configure_model()
    dense, teacher = load(folders / "base-dense"), module.teacher
    own = {id(p) for p in module.model.parameters()}
    common = {name for name, p in teacher.named_parameters() if id(p) in own}
    assert {"model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"} <= common
    assert not any("_proj" in name for name in common), "every projection was cut"
    with torch.no_grad():
        assert torch.equal(teacher.eval()(torch.arange(20)[None]).logits, dense(torch.arange(20)[None]).logits)
    assert share_equal(load(folders / "base-dense"), module.model.get_base_model()) == sum(
        p.nbytes for name, p in dense.named_parameters() if "_proj" not in name
    )
    other = load(folders / "other-dense")
    before = {name: p.clone() for name, p in other.named_parameters()}
    share_equal(other, module.model)
    assert all(torch.equal(p, before[name]) for name, p in other.named_parameters())
    moved = module.to(torch.float64)
    assert id(moved.teacher.lm_head.weight) in {id(p) for p in moved.model.parameters()}, "they move as one"


def test_a_base_stored_in_half_precision_is_known_by_the_same_hash_however_it_is_loaded(folders, tmp_path):
    load(folders / "base", "bfloat16").save_pretrained(tmp_path / "half")
    hashes = set()
    for dtype in ("auto", "float32", "bfloat16"):
        module = LoraRecovery(str(tmp_path / "half"), dtype=dtype)
        module.configure_model()
        hashes.add(module.base_hash)
    assert hashes == {model_hash(load(tmp_path / "half", "float32"))}


def test_a_base_in_half_precision_gets_the_same_adapter_folder(folders, tmp_path):
    module = recovery(folders, dtype="bfloat16", attention="eager")
    fit(folders, 3, module, export=tmp_path / "recovered", save_to=tmp_path / "c.ckpt")
    base = [p for name, p in module.model.named_parameters() if ".lora_" not in name]
    assert {p.dtype for p in base} == {torch.bfloat16}
    assert load(tmp_path / "recovered", "auto").dtype == torch.float32  # as the base is on disk
    fit(folders, 4, recovery(folders), checkpoint=tmp_path / "c.ckpt")  # the same base, loaded wider
    again = recovery(folders, adapter=str(tmp_path / "recovered/adapter"), dtype="bfloat16")
    again.configure_model()
    for name, weight in adapters(module).items():
        torch.testing.assert_close(adapters(again)[name], weight)


@pytest.mark.parametrize("dtype", ["bfloat16", "auto", "float32"])
def test_a_base_is_read_once_and_is_what_it_would_be_loaded_as(folders, dtype, monkeypatch):
    reads = []
    monkeypatch.setattr(
        "lightning_modules.structured_pruning.recovery.load", lambda *a, **k: reads.append(a) or load(*a, **k)
    )
    module = recovery(folders, dtype=dtype)
    module.configure_model()
    wanted = load(folders / "base", dtype)
    assert len(reads) == 1 and module.base_hash == model_hash(load(folders / "base"))
    found = module.model.get_base_model()
    assert found.config.dtype == wanted.config.dtype
    got = {name.replace(".base_layer", ""): part for name, part in (*found.named_parameters(), *found.named_buffers())}
    for name, part in (*wanted.named_parameters(), *wanted.named_buffers()):
        assert got[name].dtype == part.dtype and torch.equal(got[name], part)


def test_a_tilde_is_the_home_folder(folders, monkeypatch):
    monkeypatch.setenv("HOME", str(folders))
    module = LoraRecovery("~/base", adapter="~/a", merged="~/m", teacher="~/base-dense")
    assert (module.adapter, module.merged) == (folders / "a", folders / "m")
    module = LoraRecovery("~/base", teacher="~/base-dense")
    module.check_arguments("fit", None)
    module.configure_model()


def test_arguments_are_checked(folders, tmp_path):
    for arguments, message in (
        ({"rank": 0}, "rank must be positive"),
        ({"temperature": 0}, "temperature must be positive"),
        ({"distill_weight": 0}, "distill_weight must be above 0"),
    ):
        with pytest.raises(ValueError, match=message):
            recovery(folders, **arguments)
    with pytest.raises(ValueError, match=r"Target modules .* not found"):
        recovery(folders, target_modules=["c_attn"]).configure_model()
    config = AutoConfig.from_pretrained(folders / "base-dense", vocab_size=299)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "teacher")
    AutoTokenizer.from_pretrained(folders / "base").save_pretrained(tmp_path / "teacher")
    with pytest.raises(ValueError, match="teacher: its vocabulary has 299 tokens, the base's has 300"):
        recovery(folders, teacher=str(tmp_path / "teacher")).configure_model()


def test_a_teacher_of_other_tokens_is_refused_though_it_has_as_many(folders, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(folders / "base")
    shutil.copytree(folders / "base-dense", tmp_path / "teacher")
    words = "other words for a tokenizer of the same size "
    train_bpe([words * 40], len(tokenizer)).save_pretrained(tmp_path / "teacher")
    data = SimpleNamespace(tokenizer=tokenizer, inputs=list)
    recovery(folders, teacher=str(folders / "base-dense")).check_arguments("fit", data)
    with pytest.raises(ValueError, match=r"the data's tokenizer is not the one of .*teacher"):
        recovery(folders, teacher=str(tmp_path / "teacher")).check_arguments("fit", data)


def _sharded(folders: Path, out: Path, compressed: bool) -> None:
    strategy = CompressedFSDP(compressor=Int8() if compressed else None, state_dict_type="full")
    module = recovery(folders, gradient_checkpointing=True)
    fit(folders, 4, module, out / "recovered", strategy=strategy, devices=2, batch_size=2, save_to=out / "c.ckpt")


@pytest.mark.parametrize("compressed", [False, True])
def test_two_sharded_ranks_train_the_same_adapters_as_one(folders, tmp_path, two_ranks, compressed):
    two_ranks.run(_sharded, folders, tmp_path, compressed)
    fit(folders, 4, recovery(folders), tmp_path / "alone", batch_size=4)
    sharded, alone = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("recovered", "alone"))
    difference = (logits(sharded) - logits(alone)).abs().max()
    changed = (logits(alone) - logits(load(folders / "base"))).abs().max()
    assert difference < (0.2 if compressed else 1e-3) * changed
    assert all(".lora_" in name for name in torch.load(tmp_path / "c.ckpt", weights_only=True)["state_dict"])
