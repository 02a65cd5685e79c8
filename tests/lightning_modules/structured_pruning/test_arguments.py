"""What cannot succeed is refused from configurations and names of folders alone: no weights, no text, no time."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from common.manifest import DamagedError
from lightning_modules.data.tokenizer import train_bpe
from lightning_modules.structured_pruning import LoraRecovery, StructuredPruning
from lightning_modules.structured_pruning.allocation.inverse import Inverse
from lightning_modules.structured_pruning.allocation.uniform import Uniform
from lightning_modules.structured_pruning.compensation.bias import Bias
from lightning_modules.structured_pruning.plan import FILE, PruningPlan
from lightning_modules.structured_pruning.saving import save
from lightning_modules.structured_pruning.slicing import slice_model
from tests.lightning_modules.structured_pruning.toy import plan_for, tiny


class Data:
    """Has files, and nothing to read."""

    def __init__(self, *files: Path) -> None:
        self.files = list(files)

    def inputs(self) -> list[Path]:
        return self.files


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A configuration without weights."""
    folder = tmp_path_factory.mktemp("config")
    tiny(vocab_size=320).config.save_pretrained(folder)
    return folder


@pytest.fixture
def check(base, tmp_path):
    def check(command: str = "prune", data: Data | None = None, **arguments) -> None:
        given = {"base": str(base), "output": str(tmp_path / "pruned"), "shape": "free"} | arguments
        StructuredPruning(**given).check_arguments(command, data or Data())

    return check


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"budget": 25}, "budget: a share of decoder parameters to remove lies between 0 and 1, got 25"),
        ({"budget": 0.0}, "budget: a share"),
        ({"budget": float("nan")}, "budget: a share"),
        ({"budget": 0.95}, r"allocation\.cap 0\.7; the nearest possible is"),
        ({"budget": 0.8464}, r"allocation\.cap 0\.7; the nearest possible is"),
        ({"budget": 0.1, "allocation": Inverse(floor=0.2)}, r"allocation\.floor 0\.2; the nearest"),
        ({"budget": 0.99, "allocation": Uniform()}, "every layer keeps a group and 4 channels, so at most"),
        ({"budget": 10.0, "budget_unit": "parameters"}, "budget: 10 parameters cannot be met"),
        ({"budget": 1e9, "budget_unit": "bytes"}, "cannot be met"),
        ({"channel_multiple": 64}, "channel_multiple must lie between 1 and the 48 channels"),
        ({"drop_layers": 4}, "drop_layers must lie between 0 and 3"),
        ({"drop_layers": 2, "budget": 0.3}, "dropping 2 layers removes .* parameters too many"),
        ({"drop_layers": 1, "budget": 0.9}, r"allocation\.cap 0\.7"),
        ({"rounds": 3, "budget": 0.94}, r"allocation\.cap 0\.7"),
        (
            {"budget": 1e-4},
            r"too few to remove: the least that goes is 4 channels or a group of a layer",
        ),
        (
            {"budget": 0.01, "shape": "stock"},
            r"few to remove: the least that goes is 4 channels or a group of every",
        ),
        (
            {"budget": 0.05, "shape": "stock", "rounds": 4},
            r"cannot go in 4 rounds, round \d would remove nothing",
        ),
        ({"base": "no/such/folder"}, "no model folder at no/such/folder"),
        ({"plan": "nothing.json"}, "no pruning plan at nothing.json"),
        ({"calibration_blocks": 3}, "4 blocks or more, .* set calibration_blocks to at least 4, or compensation to"),
    ],
    ids=lambda value: "" if isinstance(value, str) else " ".join(map(str, value.items())),
)
def test_an_impossible_request_is_refused_by_its_configuration_alone(check, arguments, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        check(**arguments)


def test_calibration_text_that_leaves_matrices_undetermined_is_refused_before_it_is_read(check, tmp_path):
    """With a quarter of the decoder gone, some matrix keeps at least 24 of its 48 columns, wherever it goes."""
    data = Data()
    data.block_size = 7
    check(data=data, calibration_blocks=5)
    with pytest.raises(ValueError, match=r"with 24 inputs needs 32 tokens .* there are 28 in 4; .* to at least 5"):
        check(data=data, calibration_blocks=4)
    check(data=data, calibration_blocks=4, compensation=Bias())
    tiny("qwen2").config.save_pretrained(tmp_path / "qwen2")
    with pytest.raises(ValueError, match="qwen2 has no bias"):
        check(data=data, base=str(tmp_path / "qwen2"), compensation=Bias())


def test_what_is_possible_passes(check):
    for arguments in (
        {},
        {"budget": 0.68},
        {"budget": 0.8, "allocation": Uniform()},
        {"rounds": 3, "budget": 0.8},
        {"drop_layers": 1, "budget": 0.25},
        {"budget": 40_000, "budget_unit": "parameters"},
    ):
        check(**arguments)


def test_what_the_original_reports_of_llama_3_8b_is_refused_for_what_it_would_leave(tmp_path):
    """8.03 B parameters less 84.64 % are 1.23 B, of which embeddings and head alone are 1.05 B."""
    sizes = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
    config = AutoConfig.for_model("llama", **sizes, num_key_value_heads=8, vocab_size=128256)
    config.save_pretrained(tmp_path / "llama-3-8b")
    left = round((1 - 0.8464) * 8_030_261_248)
    request = {"base": str(tmp_path / "llama-3-8b"), "output": str(tmp_path / "o"), "budget_unit": "parameters"}
    with pytest.raises(ValueError, match=r"\(97\.38% of these layers\) is not possible with allocation\.cap 0\.7"):
        StructuredPruning(budget=left, shape="free", **request).check_arguments("prune", Data())
    with pytest.raises(ValueError, match=r"keeps a group and 64 channels, so at most .* \(97\.2% of these layers\)"):
        StructuredPruning(budget=left, shape="free", allocation=Uniform(), **request).check_arguments("prune", Data())
    layer = left - (2 * 128256 * 4096 + 4096)
    group, channel, norms = 2 * 4096 * 4 * 128 + 2 * 4096 * 128, 3 * 4096, 2 * 4096
    assert (layer / 32 - norms - group) / channel == pytest.approx(37.5, abs=0.1)


def test_a_plan_is_read_before_the_model(check, tmp_path):
    path = tmp_path / "plan.json"
    plan_for(tiny()).save(path)
    check(plan=str(path))
    with pytest.raises(ValueError, match=r"plan: its layers keep unlike .* LlamaForCausalLM cannot express; set"):
        check(plan=str(path), shape="stock")
    with pytest.raises(ValueError, match=r"with \d+ inputs needs \d+ tokens .* calibration_blocks to at least"):
        check(plan=str(path), calibration_blocks=1)
    plan_for(tiny(intermediate_size=64)).save(path)
    with pytest.raises(ValueError, match="other numbers of groups or channels"):
        check(plan=str(path))
    path.write_text(path.read_text()[:200])
    with pytest.raises(ValueError, match=r"plan\.json is not a pruning plan of this version, or is damaged"):
        check(plan=str(path))


def test_a_tilde_is_the_home_folder(base, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "base").symlink_to(base)
    plan_for(tiny(vocab_size=320)).save(tmp_path / "plan.json")
    module = StructuredPruning("~/base", "~/pruned", plan="~/plan.json", portable="~/portable", shape="free")
    assert (module.output, module.portable) == (tmp_path / "pruned", tmp_path / "portable")
    assert StructuredPruning("~/base", "~/pruned").portable == tmp_path / "pruned-portable"
    module.check_arguments("prune", Data())


def test_an_output_that_would_cost_something_is_refused(check, base, tmp_path):
    thesis = tmp_path / "thesis"
    thesis.mkdir()
    (thesis / "thesis.tex").write_text("years of work")
    text = tmp_path / "texts/train.json"
    text.parent.mkdir()
    text.write_text("[]")
    with pytest.raises(ValueError, match=r"model\.output: .* holds what Pare did not write \(thesis\.tex\)"):
        check(output=str(thesis))
    check(output=str(thesis), overwrite=True)
    for output in (base, base / "pruned", base.parent):
        with pytest.raises(ValueError, match=r"model\.output: .* the input"):
            check(output=str(output), overwrite=True)
    with pytest.raises(ValueError, match=r"model\.output: .* contains the input .*train\.json"):
        check(output=str(text.parent), data=Data(text), overwrite=True)
    plan_for(tiny()).save(tmp_path / "pruned" / FILE)
    with pytest.raises(ValueError, match=r"model\.output: .* contains the input .*pruning_plan\.json"):
        check(plan=str(tmp_path / "pruned" / FILE))
    assert (thesis / "thesis.tex").read_text() == "years of work"


@pytest.fixture
def pruned(tmp_path) -> Path:
    """A pruned folder, with its manifest."""
    dense = tiny(vocab_size=320)
    plan = plan_for(dense)
    tokenizer = train_bpe(iter([["the quick brown fox jumps over the lazy dog " * 20]]), 300)
    save(tmp_path / "pruned", slice_model(dense, plan), tokenizer, "# pruned", plan)
    return tmp_path / "pruned"


def test_verify_and_export_look_at_what_was_pruned_first(check, pruned, tmp_path):
    check("verify")
    check("export")
    with pytest.raises(ValueError, match=r"model\.portable: .* is the input"):
        check("export", portable=str(pruned))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("")
    with pytest.raises(ValueError, match=r"model\.portable: .* holds what Pare did not write"):
        check("export", portable=str(tmp_path / "mine"))
    with pytest.raises(FileNotFoundError, match="run prune first"):
        check("verify", output=str(tmp_path / "nothing"))
    with pytest.raises(FileNotFoundError, match="no model folder"):
        check("export", output=str(tmp_path / "nothing"))


@pytest.mark.parametrize("name", ["model.safetensors", FILE, "config.json"])
def test_a_flipped_bit_in_a_pruned_folder_is_named(pruned, base, name):
    content = bytearray((pruned / name).read_bytes())
    content[len(content) // 2] ^= 1
    (pruned / name).write_bytes(content)
    module = StructuredPruning(str(base), str(pruned))
    with pytest.raises(ValueError, match=name) as caught:
        module.verify(Data(), torch.device("cpu"))
    assert isinstance(caught.value, DamagedError) or name == FILE  # a plan may say itself what is wrong with it


@pytest.mark.parametrize(
    "damage",
    [
        {"layers": "abcd"},
        {"layers": [{"groups": [0.5], "channels": [1]}] * 4},
        {"layers": [{"groups": [True], "channels": [1]}] * 4},
        {"layers": [{"groups": ["0"], "channels": [1]}] * 4},
        {"layers": [{"groups": [0], "channels": {"0": 1}}] * 4},
        {"layers": [{"groups": [0], "channels": [1], "query_heads": [-1]}] * 4},
        {"layers": [None] * 4},
        {"shapes": [[4, 48, 1]] * 4},
        {"shapes": [4, 48, 4, 48]},
        {"shapes": 7},
        {"base": None},
        {"base_hash": 3},
        {"settings": []},
        {"format": "1"},
        {"unknown": 1},
    ],
    ids=str,
)
def test_a_plan_of_wrong_types_is_refused_by_name(damage, tmp_path):
    path = tmp_path / "plan.json"
    plan_for(tiny()).save(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | damage))
    with pytest.raises(ValueError, match=r"plan\.json is not a pruning plan of this version, or is damaged"):
        PruningPlan.load(path)


def test_recovery_looks_at_its_models_first(base, tmp_path):
    def check(command="fit", **arguments):
        LoraRecovery(str(base), **arguments).check_arguments(command, Data())

    check()
    with pytest.raises(FileNotFoundError, match=r"has no adapter_model\.safetensors"):
        check(adapter=str(base))
    with pytest.raises(FileNotFoundError, match="no model folder"):
        check(teacher=str(tmp_path / "nothing"))
    AutoConfig.from_pretrained(base, vocab_size=319).save_pretrained(tmp_path / "teacher")
    with pytest.raises(ValueError, match="teacher: its vocabulary has 319 tokens, the base's has 320"):
        check(teacher=str(tmp_path / "teacher"))
    with pytest.raises(ValueError, match="export needs the adapter to merge"):
        check("export")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_model.safetensors").touch()
    (adapter / "base.json").write_text("{")
    with pytest.raises(ValueError, match=r"base\.json is damaged"):
        check(adapter=str(adapter))
    (adapter / "base.json").write_text('{"base": "x", "hash": "y"}')
    with pytest.raises(ValueError, match=r"model\.merged: .* is the input"):
        check("export", adapter=str(adapter), merged=str(adapter))
    check("export", adapter=str(adapter), merged=str(tmp_path / "merged"))
