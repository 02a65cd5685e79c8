"""Prune, export, unpack, verify; the folders and tier maps that they read and write."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from common.manifest import DamagedError
from common.records.schema import TIERS
from lightning_modules.block_sparsity import commands, load_packed, verification
from lightning_modules.block_sparsity import module as block_module
from lightning_modules.block_sparsity.packed_model import read_packed
from lightning_modules.block_sparsity.pruner import TIERS_FILE, Pruner
from lightning_modules.block_sparsity.schedules.linear import LinearSchedule
from lightning_modules.block_sparsity.scores.magnitude import Magnitude
from tests.lightning_modules import gguf_file
from tests.lightning_modules.block_sparsity.runs import SCHEDULE, SIZES, data_of, fit, module_of
from tests.lightning_modules.block_sparsity.toy import batches, prune, save_tiny, tiny_llama

CPU = torch.device("cpu")


def test_tier_maps_may_lie_elsewhere_and_say_their_iteration(dense, data_cache, tmp_path):
    data = data_of(data_cache)
    module_of(dense, tmp_path / "1", iteration=1).prune(data, CPU)
    tuned = tmp_path / "tuned"  # by another program, which leaves no maps
    AutoModelForCausalLM.from_pretrained(tmp_path / "1").save_pretrained(tuned)
    for maps in (tmp_path / "1", tmp_path / "1" / TIERS_FILE):
        module = module_of(tuned, tmp_path / "2", iteration=2, tier_maps=str(maps))
        module.prune(data, CPU)
        assert module.pruner.iteration == 2
    before, after = (module_of(tmp_path / n, tmp_path / "x") for n in "12")
    before.configure_model(), after.configure_model()
    assert (before.pruner.iteration, after.pruner.iteration) == (1, 2)
    for name, keep in after.pruner.keep.items():
        assert not (keep & ~before.pruner.keep[name]).any()
    with safe_open(tmp_path / "2" / TIERS_FILE, "pt") as file:
        shares = {name: float(file.metadata()[name]) for name in ("dense", "mid_2_4", "topk")}
    assert shares == pytest.approx(vars(after.pruner.ratios()), abs=1e-5)
    with pytest.raises(FileNotFoundError, match=r"model\.tier_maps: .*nowhere"):
        module_of(tuned, tmp_path / "3", tier_maps=str(tmp_path / "nowhere")).check_arguments("prune", None)
    assert [path.name for path in (tmp_path / "2").glob("*.safetensors")] == ["model.safetensors"]


def test_a_gguf_file_is_pruned(dense, data_cache, tmp_path):
    data, zeros, model = data_of(data_cache), [], AutoModelForCausalLM.from_pretrained(dense)
    model.resize_token_embeddings(len(data.tokenizer))  # the file has a name for every token
    model.save_pretrained(tmp_path / "model")
    gguf_file.write(tmp_path / "model.gguf", model, data.tokenizer)
    for model in (tmp_path / "model", tmp_path / "model.gguf"):
        zeros.append(module_of(model, tmp_path / "out").prune(data, CPU)["tiers"]["sparsity"])
    assert zeros[0] == zeros[1] > 0.4
    with pytest.raises(FileNotFoundError, match="has no tier maps"):
        module_of(tmp_path / "model.gguf", tmp_path / "x").check_arguments("export", data)


def test_a_target_of_bytes_is_met_and_its_k_is_known_afterwards(dense, data_cache, tmp_path):
    data, options = data_of(data_cache), {"topk": "auto", "target_bits": 9.0, "scope": "global"}
    block = fit(module_of(dense, tmp_path / "out", **options), data_cache, tmp_path)
    zeros = [entry["sparsity"] for entry in block["iterations"]]
    assert zeros == sorted(zeros) and zeros[0] < zeros[-1]
    module = module_of(tmp_path / "out", tmp_path / "packed", topk=None)
    sizes = module.export(data, CPU)["tiers"]
    assert 8.7 < sizes["packed_bits_per_weight"] <= 9.0
    assert module_of(tmp_path / "out", tmp_path / "packed", topk=None).verify(data, CPU)["tiers"]["verified"]
    with pytest.raises(ValueError, match=f"set topk to {module.pruner.k}"):
        module_of(tmp_path / "out", tmp_path / "x", topk=module.pruner.k + 1).configure_model()


def test_maps_by_their_old_name_are_read(dense, data_cache, tmp_path):
    module_of(dense, tmp_path / "1").prune(data_of(data_cache), CPU)
    (tmp_path / "1" / TIERS_FILE).rename(tmp_path / "1/tiers.safetensors")
    (tmp_path / "1/pare.json").unlink()
    module = module_of(tmp_path / "1", tmp_path / "x")
    module.configure_model()
    assert module.pruner.sparsity()["sparsity"] > 0.4


def test_prune_export_verify_and_unpack(dense, data_cache, tmp_path, capsys):
    data = data_of(data_cache)
    pruned, packed, plain = tmp_path / "pruned", tmp_path / "packed", tmp_path / "plain"
    assert module_of(dense, pruned, reconstruction_steps=2).prune(data, CPU, dry_run=True) is None
    assert "packed_ratio" in capsys.readouterr().out and not pruned.exists()
    fields = module_of(dense, pruned, reconstruction_steps=2, scope="band").prune(data, CPU)
    assert fields["tiers"]["iterations"][0]["violations"] == 0 and fields["val_ppl"] > 1
    sizes = module_of(pruned, packed).export(data, CPU)["tiers"]
    assert sizes["packed_bits_per_weight"] == pytest.approx(sizes["planned"]["packed_bits_per_weight"], rel=0.1)
    report = module_of(pruned, packed).verify(data, CPU)["tiers"]["verified"]
    assert report["weights_equal"] and report["violations"] == 0
    assert f"| {fields['val_ppl']:.3f} |" in (pruned / "README.md").read_text()
    assert 'load_packed("' in (packed / "README.md").read_text()
    assert module_of(pruned, tmp_path / "lora", finetune="lora").export(data, CPU)["tiers"] == sizes
    assert module_of(pruned, tmp_path / "lora", finetune="lora").verify(data, CPU)["tiers"]["verified"] == report
    module_of(pruned, tmp_path / "bands", export_bands=True).export(data, CPU)
    assert module_of(pruned, tmp_path / "bands").verify(data, CPU)["tiers"]["verified"]["weights_equal"]
    module_of(packed, plain).export(data, CPU)
    ids, unpacked = batches(1)[0]["input_ids"], AutoModelForCausalLM.from_pretrained(plain)
    assert torch.equal(unpacked(input_ids=ids).logits, load_packed(packed)(input_ids=ids).logits)
    again = module_of(plain, tmp_path / "x")
    again.configure_model()
    assert again.pruner.counts() == fields["tiers"]["matrices"]
    for block in (fields["tiers"], sizes):
        assert set(block) <= set(TIERS) and "object" in {TIERS[name].type for name in block}
    for dtype in ("float16", "int8"):
        module_of(pruned, packed, export_dtype=dtype).export(data, CPU)
        assert module_of(pruned, packed).verify(data, CPU)["tiers"]["verified"]["weights_equal"]
        for name in ("model.layers.1.mlp.up_proj", "lm_head"):
            other = module_of(pruned, packed)
            other.configure_model()
            with torch.no_grad():
                other.plain_model.get_submodule(name).weight[0].mul_(1.05)
            with pytest.raises(ValueError, match="differ"):
                other.verify(data, CPU)


def test_weights_and_masks_are_compared_before_weights_leave_for_the_device(dense, data_cache, tmp_path, monkeypatch):
    """Masks stay where they are: on a GPU they could not be compared with weights any more."""
    data, done = data_of(data_cache), []
    module_of(dense, tmp_path / "pruned").prune(data, CPU)
    module_of(tmp_path / "pruned", tmp_path / "packed").export(data, CPU)

    def note(name):
        call = getattr(verification, name)
        monkeypatch.setattr(verification, name, lambda *args: done.append(name) or call(*args))

    note("read_packed")
    note("violations")
    note("logits")
    module_of(tmp_path / "pruned", tmp_path / "packed").verify(data, CPU)
    assert done == ["read_packed", "violations", *["logits"] * 3]  # a file of gigabytes, read once


@pytest.mark.parametrize(
    "form", [{}, {"export_dtype": "int8"}, {"export_bands": True, "scope": "band"}], ids=["plain", "int8", "bands"]
)
def test_a_target_of_bits_is_what_the_packed_file_takes(form, dense, data_cache, tmp_path):
    data, options = data_of(data_cache), {"target_bits": 8.5, "scope": "global", **form}
    module_of(dense, tmp_path / "pruned", **options).prune(data, CPU)
    sizes = module_of(tmp_path / "pruned", tmp_path / "packed", **options).export(data, CPU)["tiers"]
    layouts = read_packed(tmp_path / "packed").layouts
    tensors = load_file(tmp_path / "packed/packed.safetensors")
    taken = 8 * sum(t.nbytes for name, t in tensors.items() if any(name.startswith(f"{one}.") for one in layouts))
    bits = taken / sum(one.rows * one.columns for one in layouts.values())
    assert sizes["packed_bits_per_weight"] == pytest.approx(bits)
    assert sizes["planned"]["packed_bits_per_weight"] == pytest.approx(bits)
    assert (5.0 if "scope" in form else 8.4) < bits <= 8.5 + 1e-6  # bands of four blocks have few shares to choose from


@pytest.mark.parametrize("options", [{}, {"scope": "global", "target_bits": 9.0}], ids=["shares", "bits"])
def test_a_compiled_model_gets_the_masks_of_one_that_is_not(options, dense, data_cache, tmp_path, monkeypatch):
    data, masks, compiled = data_of(data_cache), [], torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda layer: compiled(layer, backend="eager"))
    for compile in (False, True):
        module = module_of(dense, tmp_path / "out", compile=compile, **options)
        module.configure_model()
        with torch.no_grad():
            module.model(batches(1)[0]["input_ids"])  # as validation did
        module.prune(data, CPU)
        masks.append(module.pruner.keep)
    assert all(torch.equal(keep, masks[1][name]) for name, keep in masks[0].items())


def test_equal_sparsity_without_structure_is_a_baseline(dense, data_cache, tmp_path):
    fields = module_of(dense, tmp_path / "out", pattern="unstructured").prune(data_of(data_cache), CPU)
    assert fields["tiers"]["sparsity"] == pytest.approx(0.2 + 0.3 * (1 - 6 / 64), abs=0.02)
    assert fields["tiers"]["matrices"] == [] and fields["tiers"]["iterations"][0]["dense"] is None
    with pytest.raises(ValueError, match="pattern"):
        module_of(tmp_path / "out", tmp_path / "y").configure_model()


def test_maps_of_another_model_or_block_size_are_refused(fitted, dense, data_cache, tmp_path):
    _, _, folder = fitted
    with pytest.raises(ValueError, match="set block to 8"):
        module_of(folder / "out", tmp_path / "x", block=16).configure_model()
    with pytest.raises(ValueError, match="set topk to 6"):
        module_of(folder / "out", tmp_path / "x", topk=5).configure_model()
    state = fitted[0].pruner.state()
    state["tensors"] = {name.replace("layers.1", "layers.7"): t for name, t in state["tensors"].items()}
    with pytest.raises(ValueError, match="another model"):
        fitted[0].pruner.load_state(state, "the file")
    with pytest.raises(FileNotFoundError, match="tier maps"):
        module_of(dense, tmp_path / "x").export(data_of(data_cache), CPU)


def test_the_ratio_of_a_packed_model_means_one_thing_planned_and_measured(dense, data_cache, tmp_path, capsys):
    data, pruned, packed = data_of(data_cache), tmp_path / "pruned", tmp_path / "packed"
    module_of(dense, pruned).prune(data, CPU)
    printed = dict(line.split(": ") for line in capsys.readouterr().out.splitlines() if ": " in line)
    for dtype in ("float16", "float32", "int8"):
        sizes = module_of(pruned, packed, export_dtype=dtype).export(data, CPU)["tiers"]
        file, tensors = packed / "packed.safetensors", load_file(packed / "packed.safetensors")
        whole = 2 * tiny_llama().num_parameters()
        assert sizes["packed_bytes"] == file.stat().st_size
        assert sizes["packed_ratio"] == pytest.approx(whole / file.stat().st_size)
        expected = whole / sum(t.nbytes for t in tensors.values())  # without the header, which is not planned
        assert sizes["planned"]["packed_ratio"] == pytest.approx(expected, rel=0.01)
        if dtype == "float16":
            assert float(printed["packed_ratio"]) == pytest.approx(sizes["planned"]["packed_ratio"], rel=0.08)


def test_a_16_bit_model_is_pruned_packed_and_unpacked_in_its_own_type(data_cache, tmp_path):
    data = data_of(data_cache)
    tiny_llama().to(torch.bfloat16).save_pretrained(tmp_path / "dense")
    paths = [tmp_path / name for name in ("dense", "pruned", "packed", "plain")]
    module_of(paths[0], paths[1], score=Magnitude()).prune(data, CPU)
    module_of(paths[1], paths[2]).export(data, CPU)
    module_of(paths[2], paths[3]).export(data, CPU)
    dense, pruned, plain = (AutoModelForCausalLM.from_pretrained(paths[i], dtype="auto") for i in (0, 1, 3))
    assert dense.dtype == pruned.dtype == plain.dtype == load_packed(paths[2]).dtype == torch.bfloat16
    assert (paths[2] / "generation_config.json").is_file()
    for name, weight in dense.named_parameters():
        kept = pruned.get_parameter(name) != 0
        assert torch.equal(pruned.get_parameter(name)[kept], weight[kept])  # nothing was rounded twice
        assert torch.equal(plain.get_parameter(name), pruned.get_parameter(name))
    assert load_file(paths[2] / "packed.safetensors")["model.layers.0.mlp.up_proj.dense"].dtype == torch.bfloat16


def test_a_pruned_model_is_there_before_its_perplexity_is_measured(dense, data_cache, tmp_path, monkeypatch):
    def stopped(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "validation_perplexity", stopped)
    with pytest.raises(KeyboardInterrupt):
        module_of(dense, tmp_path / "out").prune(data_of(data_cache), CPU)
    again = module_of(tmp_path / "out", tmp_path / "x")
    again.configure_model()
    assert again.pruner.sparsity()["sparsity"] > 0.4


def test_a_home_folder_is_the_same_folder(dense, data_cache, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    data = data_of(data_cache)
    module_of(dense, "~/pruned").prune(data, CPU)
    module_of("~/pruned", "~/packed").export(data, CPU)
    assert module_of("~/pruned", "~/packed").verify(data, CPU)["tiers"]["verified"]["weights_equal"]
    assert (tmp_path / "packed/packed.safetensors").is_file()


def _thesis(folder):
    folder.mkdir(parents=True)
    (folder / "thesis.txt").write_text("years of work")
    return folder


@pytest.mark.parametrize("command", ["prune", "export", "fit"])
@pytest.mark.parametrize("where", ["foreign", "is an input", "inside an input", "contains an input", "teacher"])
def test_a_folder_that_is_not_pares_or_is_read_is_refused_before_anything_is_loaded(
    where, command, dense, data_cache, tmp_path, monkeypatch
):
    base = save_tiny(tmp_path / "base/model")
    teacher = save_tiny(tmp_path / "teacher")
    outputs = {"foreign": _thesis(tmp_path / "mine"), "is an input": base, "inside an input": base / "out"}
    output = {**outputs, "contains an input": base.parent, "teacher": teacher}[where]
    monkeypatch.setattr(block_module, "load", lambda *_, **__: pytest.fail("something was loaded"))
    before = sorted(path for path in tmp_path.rglob("*") if path.is_file())
    module, data = module_of(base, output, teacher=str(teacher), overwrite=where != "foreign"), data_of(data_cache)
    with pytest.raises(ValueError, match=r"model\.output: "):
        fit(module, data_cache, tmp_path / "fit") if command == "fit" else getattr(module, command)(data, CPU)
    assert sorted(path for path in tmp_path.rglob("*") if path.is_file()) == before


def test_overwrite_replaces_a_folder_only_when_the_new_one_is_complete(dense, data_cache, tmp_path, monkeypatch):
    folder, data = _thesis(tmp_path / "mine"), data_of(data_cache)
    monkeypatch.setattr(Pruner, "save", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        module_of(dense, folder, overwrite=True).prune(data, CPU)
    assert [path.name for path in folder.iterdir()] == ["thesis.txt"]
    monkeypatch.undo()
    module_of(dense, folder, overwrite=True).prune(data, CPU)
    assert (folder / TIERS_FILE).is_file() and not (folder / "thesis.txt").exists()


@pytest.mark.parametrize("name", [TIERS_FILE, "model.safetensors", "config.json", "tokenizer.json"])
def test_a_damaged_file_of_a_pruned_folder_is_named(name, dense, data_cache, tmp_path):
    module_of(dense, tmp_path / "out").prune(data_of(data_cache), CPU)
    path = tmp_path / "out" / name
    content = bytearray(path.read_bytes())
    content[-2] ^= 4
    path.write_bytes(content)
    with pytest.raises((DamagedError, ValueError), match=name):
        module_of(tmp_path / "out", tmp_path / "x").configure_model()


@pytest.fixture(scope="module")
def saved_maps(tmp_path_factory):
    folders = {}
    for pattern in ("tiers", "unstructured"):
        folders[pattern] = tmp_path_factory.mktemp(pattern)
        model = tiny_llama()
        pruner = Pruner(model, block=8, k=6, pattern=pattern)
        prune(model, pruner, LinearSchedule(**SCHEDULE).rows[-1].ratios, Magnitude())
        pruner.save(folders[pattern])
    return folders


@given(st.sampled_from(["tiers", "unstructured"]), st.integers(0), st.integers(1, 255), st.booleans())
def test_damaged_tier_maps_without_a_manifest_are_named_or_still_maps(saved_maps, pattern, place, flip, cut):
    whole = (saved_maps[pattern] / TIERS_FILE).read_bytes()
    content = bytearray(whole)
    content[place % len(whole)] ^= flip
    folder = saved_maps[pattern] / "damaged"
    folder.mkdir(exist_ok=True)
    (folder / TIERS_FILE).write_bytes(content[: place % len(whole)] if cut else content)
    pruner = Pruner(tiny_llama(), block=8, k=6, pattern=pattern)
    try:
        pruner.load(folder)
    except ValueError as error:
        assert str(folder / TIERS_FILE) in str(error)
        return
    assert all(keep.shape == pruner.matrices[name].weight.shape for name, keep in pruner.keep.items())
    for tiers in pruner.tiers.values():
        tiers.check()


def test_calibration_is_spread_evenly_over_the_training_text(data_cache):
    data = data_of(data_cache)
    rows = data.train["input_ids"]
    for count in (1, 5, len(rows)):
        batches = data.calibration(count)
        found = torch.cat([batch["input_ids"] for batch in batches])
        assert torch.equal(found, rows[[i * len(rows) // count for i in range(count)]])
        assert all(len(batch["input_ids"]) <= data.batch_size and "labels" in batch for batch in batches)
    assert len(rows) > 40 and not torch.equal(torch.cat([b["input_ids"] for b in data.calibration(5)]), rows[:5])


def test_what_prunes_has_seen_the_calibration_text(dense, data_cache, tmp_path, monkeypatch):
    data, seen = data_of(data_cache), []
    original = block_module.prune_layers
    monkeypatch.setattr(block_module, "prune_layers", lambda *a: seen.extend(a[4]) or original(*a))
    module_of(dense, tmp_path / "out").prune(data, CPU)
    wanted = torch.cat([batch["input_ids"] for batch in data.calibration(SIZES["calibration_blocks"])])
    assert torch.equal(torch.cat([batch["input_ids"] for batch in seen]), wanted)
