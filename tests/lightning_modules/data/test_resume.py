"""A preparation that was killed, refused or wanted little goes on where it stopped, and damage is noticed by name."""

import json
import os
import signal
from pathlib import Path

import pytest

from common import files
from lightning_modules.data import blocks, rows, samples, shards
from lightning_modules.data.cache import cache_root
from lightning_modules.data.instruct import InstructData
from lightning_modules.data.tokenizer import train_bpe
from tests.lightning_modules.data.toy import Toy, sentences


def small_pieces(setting) -> None:
    """Many chunks and shards of little text."""
    setting(rows, "CHUNK", 1000)
    setting(shards, "SHARD", 3)


@pytest.fixture(autouse=True)
def pieces(monkeypatch):
    small_pieces(monkeypatch.setattr)


def make(kind, cache, **arguments):
    if kind == "blocks":
        return Toy(cache_dir=str(cache), documents=60, num_proc=1, **arguments)
    folder = Path(cache).parent / "source"
    return InstructData(str(folder / "data.jsonl"), str(folder), cache_dir=str(cache), val_percent=20, **arguments)


@pytest.fixture(scope="module")
def parent(tmp_path_factory):
    """A folder whose sub-folders are caches, with the source of the instructions beside them."""
    parent = tmp_path_factory.mktemp("resume")
    (parent / "source").mkdir()
    train_bpe(sentences(0, 20), 300).save_pretrained(str(parent / "source"))
    lines = [json.dumps({"question": text[:30], "answer": text}) for text in sentences(3, 60)]
    (parent / "source" / "data.jsonl").write_text("\n".join(lines))
    return parent


def content(cache):
    """Every file of the cache but locks."""
    root = cache_root(str(cache))
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in root.rglob("*")
        if path.is_file() and not path.name.endswith(".lock")
    }


def run(kind, cache, target):
    """Prepare in a forked process that kills itself at the ``target``-th step; its exit code and steps."""
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:
        code = 1
        try:
            os.write(writer, str(_prepare_and_die(kind, cache, target)).encode())
            code = 0
        finally:
            os._exit(code)
    os.close(writer)
    _, status = os.waitpid(child, 0)
    with os.fdopen(reader) as file:
        return os.waitstatus_to_exitcode(status), file.read()


def _prepare_and_die(kind, cache, target) -> int:
    done = 0

    def step(work):
        def working(*arguments, **options):
            nonlocal done
            done += 1
            if done == target:
                os.kill(os.getpid(), signal.SIGKILL)
            return work(*arguments, **options)

        return working

    # every file and folder gets its name by one of the first two, and reaches the disk by the third
    for owner, name in ((Path, "replace"), (Path, "rename"), (files, "sync")):
        setattr(owner, name, step(getattr(owner, name)))
    for recipe in (blocks.BlockRecipe, samples.SampleRecipe):
        recipe.encode, recipe.pack = step(recipe.encode), step(recipe.pack)
    make(kind, cache).prepare_data()
    return done


@pytest.mark.parametrize("kind", ["blocks", "samples"])
def test_killed_anywhere_and_started_again_it_is_the_same_byte_for_byte(parent, kind):
    code, steps = run(kind, parent / f"{kind}-whole", 0)
    assert code == 0
    expected = content(parent / f"{kind}-whole")
    assert len([name for name in expected if name.endswith(".arrow")]) >= 5
    cache, finished, kills = parent / f"{kind}-killed", 0, 0
    for target in (int(steps) // 4, 13, 21, 8, 17, 11, 1, 2, 3, 5):
        code, _ = run(kind, cache, target)
        if code == 0:
            break
        assert code == -signal.SIGKILL
        kills += 1
        now = len([name for name in content(cache) if name.endswith(".json") and name[-10:-5].isdigit()])
        assert now >= finished, "a finished shard was lost"
        finished = now
    assert kills >= 4 and finished >= 3
    make(kind, cache).prepare_data()
    assert content(cache) == expected


@pytest.mark.parametrize("kind", ["blocks", "samples"])
def test_finished_shards_are_not_tokenised_again(parent, kind, monkeypatch):
    recipe = {"blocks": blocks.BlockRecipe, "samples": samples.SampleRecipe}[kind]
    original, seen = recipe.encode, []

    def fails(self, found):
        seen.append(found)
        if len(seen) == 9:
            raise OSError("something breaks")
        return original(self, found)

    monkeypatch.setattr(recipe, "encode", fails)
    cache = parent / f"{kind}-again"
    with pytest.raises(OSError, match="something breaks"):
        make(kind, cache).prepare_data()
    kept = {name: data for name, data in content(cache).items() if "/rows/" not in name}
    assert [name for name in kept if name.endswith(".arrow")], "an exception deletes nothing that is finished"
    before, seen[:] = list(seen), [None] * 100
    make(kind, cache).prepare_data()
    again = seen[100:]
    assert kept.items() <= content(cache).items()
    done = sum(1 for found in before if found not in again)
    assert done >= 3, "at least a shard of three chunks"
    make(kind, parent / f"{kind}-fresh").prepare_data()
    assert content(cache) == content(parent / f"{kind}-fresh")


def test_only_what_is_wanted_is_tokenised_and_more_later(tmp_path, monkeypatch):
    original, seen = blocks.BlockRecipe.encode, []

    def counted(self, found):
        seen.append(found)
        return original(self, found)

    monkeypatch.setattr(blocks.BlockRecipe, "encode", counted)

    def ready(cache, **arguments):
        data = Toy(cache_dir=str(tmp_path / cache), documents=400, num_proc=1, **arguments)
        data.prepare_data()
        data.setup("fit")
        return data

    limits = {"max_train_blocks": 40, "max_val_blocks": 5}
    few = ready("grown", **limits)
    little = len(seen)
    assert little <= 8
    everything = ready("whole")
    assert len(seen) > 10 * little
    assert len(few.train) == 40 and len(few.val) == 5
    assert few.train[:]["input_ids"].tolist() == everything.train[:40]["input_ids"].tolist()

    seen.clear()
    grown = ready("grown")
    assert len(seen) > 5 * little
    for split in ("train", "val"):
        one, other = (getattr(data, split)[:]["input_ids"].tolist() for data in (grown, everything))
        assert one == other
    assert grown.describe() == everything.describe()

    seen.clear()
    again = ready("grown", **limits)
    assert not seen
    assert again.describe() == few.describe() and again.describe()["hash"] == everything.describe()["hash"]
    assert few.describe()["tokens"] == {"train": 640, "val": 80}


def test_a_source_that_changed_under_its_name_is_tokenised_anew(tmp_path):
    limits = {"max_train_blocks": 40, "max_val_blocks": 5}
    data = Toy(cache_dir=str(tmp_path), **limits)
    data.prepare_data()
    changed = Toy(cache_dir=str(tmp_path))
    changed.documents = lambda: [("train" if i % 10 else "val", t) for i, t in enumerate(sentences(7, 200))]
    changed.prepare_data()
    changed.setup("fit")
    text = changed.tokenizer.decode(changed.train[:]["input_ids"].flatten())
    assert sentences(7, 200)[1] in text and sentences(0, 200)[1] not in text


@pytest.fixture(scope="module")
def sound(parent):
    with pytest.MonkeyPatch.context() as patch:
        small_pieces(patch.setattr)
        make("blocks", parent / "sound").prepare_data()
    return parent / "sound"


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("harm", [flip, lambda path: os.truncate(path, path.stat().st_size // 2), Path.unlink])
@pytest.mark.parametrize(
    "name", ["train/00001.arrow", "val/00000.arrow", "train/00000.json", "tokenizer/tokenizer.json"]
)
def test_damage_is_noticed_before_training_and_named(sound, name, harm):
    (folder,) = (path for path in cache_root(str(sound)).iterdir() if path.is_dir())
    before = (folder / name).read_bytes()
    try:
        harm(folder / name)
        with pytest.raises(ValueError, match=rf"{name} .*; delete {folder}, and the data are prepared again"):
            make("blocks", sound).prepare_data()
        if harm is not flip:  # what costs nothing to see is seen by every rank
            with pytest.raises(ValueError, match=rf"{name} .*; delete {folder}"):
                make("blocks", sound).setup("fit")
    finally:
        (folder / name).write_bytes(before)
    make("blocks", sound).prepare_data()


def test_a_damaged_manifest_is_named(sound):
    (folder,) = (path for path in cache_root(str(sound)).iterdir() if path.is_dir())
    before = (folder / "pare.json").read_bytes()
    try:
        for harm in (flip, lambda path: os.truncate(path, 20)):
            harm(folder / "pare.json")
            with pytest.raises(ValueError, match=r"pare.json is damaged; delete"):
                make("blocks", sound).prepare_data()
            (folder / "pare.json").write_bytes(before)
    finally:
        (folder / "pare.json").write_bytes(before)
