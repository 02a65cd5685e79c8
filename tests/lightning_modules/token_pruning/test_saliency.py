"""Stage 1 as a user runs it, and what its files refuse."""

import json

import lightning.pytorch as L
import pytest
import torch
from safetensors.torch import load_file

from common.files import check_output
from common.manifest import DamagedError, write_manifest
from lightning_modules.token_pruning.saliency import TokenSaliency
from lightning_modules.token_pruning.samples import split_batch
from lightning_modules.token_pruning.schedule import Schedule
from lightning_modules.token_pruning.store import Saliency, SaliencyStore
from lightning_modules.token_pruning.targets.base import Reading, Target
from lightning_modules.token_pruning.targets.gate_gradient import GateGradient
from tests.lightning_modules.data.toy import Toy
from tests.lightning_modules.token_pruning.models import build

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")  # Lightning 2.6 with torch 2.13

SCHEDULE = Schedule(layers=[1, 3], keep=0.6, sinks=1, tail=0.0, min_tail=2)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    build("llama", vocab_size=320).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    few = {"documents": 60, "block_size": 32, "max_train_blocks": 48, "max_val_blocks": 12, "num_proc": 1}
    made = Toy(**few, cache_dir=str(tmp_path_factory.mktemp("cache")))
    made.prepare_data()
    return made


def _predict(base, data, folder, target=None, **options):
    module = TokenSaliency(
        base, str(folder), SCHEDULE, target or GateGradient(), **{"num_samples": 20, "response": 8, **options}
    )
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
    trainer.predict(module, data)
    return module


def _read(folder, **expect):
    return Saliency(folder, expect)


def test_values_lie_beside_the_samples_that_they_were_computed_on(base, data, tmp_path):
    module = _predict(base, data, tmp_path / "s")
    found = _read(tmp_path / "s")
    assert len(found) == 20 and found.index["layers"] == [1, 3]
    rows = data.train.select([3, 17])
    samples = split_batch({"input_ids": rows[:]["input_ids"], "labels": rows[:]["input_ids"]}, 8)
    expected = GateGradient().values(module.model, samples, [1, 3])
    for row, key in enumerate(samples.keys()):
        for layer in (1, 3):
            torch.testing.assert_close(found.get(key)[layer], expected[layer][row, :24], rtol=1e-3, atol=1e-6)
    assert found.get("0" * 16) is None


class _Dies(GateGradient):
    """Is killed in the fourth batch."""

    def __init__(self) -> None:
        super().__init__()
        self._calls = 0

    def values(self, model, samples, layers):
        self._calls += 1
        if self._calls == 4:
            raise RuntimeError("killed")
        return super().values(model, samples, layers)


_Dies.__name__ = "GateGradient"  # the store must take it for the target that it is


def test_a_killed_collection_goes_on_where_it_was(base, data, tmp_path, monkeypatch):
    monkeypatch.setattr(SaliencyStore, "samples_per_part", 4)
    _predict(base, data, tmp_path / "whole")
    with pytest.raises(RuntimeError, match="killed"):
        _predict(base, data, tmp_path / "parts", _Dies())
    with pytest.raises(ValueError, match="interrupted after 12 samples"):
        _read(tmp_path / "parts")
    (tmp_path / "parts/.rank0-x.partial.safetensors").write_bytes(b"half")  # what a power cut leaves
    resumed = _predict(base, data, tmp_path / "parts", target := _Dies())
    assert target._calls == 2 and len(resumed.store.done) == 20  # 8 samples were left
    whole, parts = _read(tmp_path / "whole"), _read(tmp_path / "parts")
    for key in whole._values:
        assert torch.equal(whole.get(key)[3], parts.get(key)[3])


class _Overflows(Target):
    def reading(self, model, samples, layers):
        found = {layer: torch.ones(samples.real.shape) for layer in layers}
        found[layers[0]][0, 5] = torch.inf
        found[layers[1]][1] = 0
        return Reading(lambda _: found)


def test_overflow_and_underflow_are_counted_and_left_out(base, data, tmp_path):
    _predict(base, data, tmp_path / "s", _Overflows())
    found = _read(tmp_path / "s")
    assert len(found) == 10
    assert found.index["skipped"] == {
        "not finite (half precision overflowed)": 5,
        "all zero (half precision underflowed)": 5,
    }


def test_half_precision_overflow_is_noticed(base, data, tmp_path, monkeypatch):
    monkeypatch.setattr("lightning_modules.token_pruning.targets.base._HALF_SCALE", 1e8)
    with pytest.raises(ValueError, match=r"no sample could be used.*overflowed"):
        _predict(base, data, tmp_path / "s", dtype="float16", num_samples=4)


def test_saliency_of_another_tokenizer_or_model_or_cut_short_is_refused(base, data, tmp_path):
    folder = tmp_path / "s"
    _predict(base, data, folder)
    with pytest.raises(ValueError, match="another tokenizer"):
        _read(folder, tokenizer="f" * 64)
    with pytest.raises(ValueError, match="another layers"):
        _read(folder, layers=[2])
    with pytest.raises(ValueError, match="another target"):
        _predict(base, data, folder, GateGradient(signed=False))
    (part,) = folder.glob("rank0-*.safetensors")
    content = part.read_bytes()
    part.write_bytes(content[:-100])
    with pytest.raises(ValueError, match=r"rank0-.*bytes instead of"):
        _read(folder)
    part.unlink()
    with pytest.raises(ValueError, match=r"rank0-.*is missing"):
        _read(folder)
    (folder / "saliency.json").write_text(json.dumps({"format": "other"}))
    with pytest.raises(ValueError, match="not the index"):
        _read(folder)
    with pytest.raises(FileNotFoundError, match="collect saliency first"):
        _read(tmp_path / "nothing")


def test_two_ranks_write_parts_that_do_not_collide(tmp_path):
    for rank in (0, 1):
        store = SaliencyStore(tmp_path, {"layers": [1]}, rank)
        if rank == 0:
            store.begin()
        store.add(f"key{rank}", {1: torch.arange(3 + rank).float()})
        store.flush()
    assert store.finish({}) == 2
    assert len(load_file(next(tmp_path.glob("rank1-*.safetensors")))["1"]) == 4
    assert Saliency(tmp_path, {}).get("key1")[1].tolist() == [0, 1, 2, 3]


def _collected(folder):
    store = SaliencyStore(folder, {"layers": [1]}, 0)
    store.begin()
    store.add("key", {1: torch.arange(3).float()})
    store.flush()
    assert store.finish({}) == 1


def test_a_file_of_the_users_never_becomes_pares(tmp_path):
    for name in ("thesis.tex", "model.safetensors", "chapters"):
        folder = tmp_path / f"of {name}"
        (folder / name).mkdir(parents=True)
        with pytest.raises(ValueError, match=f"holds {name} but no saliency.json"):
            SaliencyStore(folder, {"layers": [1]}, 0)
        assert [path.name for path in folder.iterdir()] == [name]
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is no folder"):
        SaliencyStore(tmp_path / "file", {"layers": [1]}, 0)
    _collected(tmp_path / "s")
    (tmp_path / "s/thesis.tex").write_text("added between two runs")
    _collected(tmp_path / "s")
    with pytest.raises(ValueError, match=r"what Pare did not write \(thesis\.tex\)"):
        check_output(tmp_path / "s", "output")
    Saliency(tmp_path / "s", {})


def test_what_a_kill_before_the_index_leaves_is_no_hindrance(tmp_path):
    write_manifest(tmp_path, "saliency", None)
    (tmp_path / ".saliency.json.lock").touch()
    _collected(tmp_path)
    assert len(Saliency(tmp_path, {})) == 1


def test_the_folder_is_checked_before_weights_are_read(base, data, tmp_path):
    def check(folder):
        TokenSaliency(base, str(folder), SCHEDULE, GateGradient()).check_arguments("predict", data)

    check(tmp_path / "new")
    for folder, names in ((base, "is the input"), (f"{base}/saliency", "lies inside the input"), (tmp_path, "thesis")):
        (tmp_path / "thesis").touch()
        with pytest.raises(ValueError, match=names):
            check(folder)


def test_a_tilde_is_the_home_folder(base, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    _collected(tmp_path / "s")
    assert TokenSaliency(base, "~/s", SCHEDULE, GateGradient()).folder == tmp_path / "s"
    assert len(Saliency("~/s", {})) == 1


def test_a_flipped_bit_is_noticed_and_collecting_again_mends_it(tmp_path):
    _collected(tmp_path)
    part = next(tmp_path.glob("rank0-*.safetensors"))
    content = bytearray(part.read_bytes())
    content[-1] ^= 1
    part.write_bytes(content)
    with pytest.raises(DamagedError, match=part.name):
        Saliency(tmp_path, {})
    part.unlink()
    again = SaliencyStore(tmp_path, {"layers": [1]}, 0)
    assert again.done == set()
    again.begin()
    with pytest.raises(ValueError, match="interrupted"):
        Saliency(tmp_path, {})


def test_what_is_prompt_and_what_is_response():
    ids = torch.arange(1, 11).repeat(4, 1)
    labels = ids.clone()
    labels[0, :6] = -100  # an instruction: the response begins at 6
    labels[1] = -100  # cut off: nothing to predict
    labels[2, 0] = -100  # plain text after a start token
    mask = torch.ones_like(ids)
    mask[0, 8:] = 0
    mask[3, 4:] = 0  # a text of 4 tokens
    samples = split_batch({"input_ids": ids, "labels": labels, "attention_mask": mask}, 3)
    assert samples.prompt.sum(1).tolist() == [6, 7]
    assert (samples.labels != -100).sum(1).tolist() == [2, 3]
    assert not (samples.labels[~samples.real] != -100).any()
    assert len(set(samples.keys())) == 2
    blocks = split_batch({"input_ids": ids, "labels": ids}, 3)
    assert blocks.prompt.sum(1).tolist() == [7] * 4 and len(set(blocks.keys())) == 1


def test_what_is_wrong_is_named():
    with pytest.raises(ValueError, match="num_samples"):
        TokenSaliency("b", "f", SCHEDULE, GateGradient(), num_samples=0)
