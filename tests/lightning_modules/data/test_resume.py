"""A preparation that was killed, refused or wanted little goes on where it stopped, and damage is noticed by name."""

import json
import os
import re
import shutil
import signal
from pathlib import Path

import pytest

from common import files, manifest
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


def run(kind, cache, target, **change):
    """Prepare in a forked process that kills itself at the ``target``-th step; its exit code and steps."""
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:
        code = 1
        try:
            os.write(writer, str(_prepare_and_die(kind, cache, target, **change)).encode())
            code = 0
        finally:
            os._exit(code)
    os.close(writer)
    _, status = os.waitpid(child, 0)
    with os.fdopen(reader) as file:
        return os.waitstatus_to_exitcode(status), file.read()


def _prepare_and_die(kind, cache, target, documents=None) -> int:
    done = 0

    def step(work):
        def working(*arguments, **options):
            nonlocal done
            done += 1
            if done == target:
                os.kill(os.getpid(), signal.SIGKILL)
            return work(*arguments, **options)

        return working

    # every file and folder gets its name by one of the first two, and reaches the disk by the others
    for owner, name in ((Path, "replace"), (Path, "rename"), (files, "sync"), (manifest, "sync")):
        setattr(owner, name, step(getattr(owner, name)))
    for recipe in (blocks.BlockRecipe, samples.SampleRecipe):
        recipe.encode, recipe.pack = step(recipe.encode), step(recipe.pack)
    data = make(kind, cache)
    if documents is not None:
        data.documents = documents
    data.prepare_data()
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
    kept = {name: data for name, data in content(cache).items() if re.search(r"/(train|val|tokenizer)/", name)}
    assert [name for name in kept if name.endswith(".arrow")], "an exception deletes nothing that is finished"
    before, seen[:] = list(seen), [None] * 100
    make(kind, cache).prepare_data()
    again = seen[100:]
    assert kept.items() <= content(cache).items()
    done = sum(1 for found in before if found not in again)
    assert done >= 3, "at least a shard of three chunks"
    make(kind, parent / f"{kind}-fresh").prepare_data()
    assert content(cache) == content(parent / f"{kind}-fresh")


@pytest.mark.parametrize("kind", ["blocks", "samples"])
def test_what_a_killed_run_left_half_written_is_no_part_of_the_cache(parent, kind):
    _, steps = run(kind, parent / f"{kind}-straight", 0)
    few = {"max_train_blocks": 1, "max_val_blocks": 1}
    if kind == "samples":
        few = {name.replace("blocks", "samples"): count for name, count in few.items()}
    orphans = 0
    for back in range(8, 24, 3):  # within the shards of the training split
        cache = parent / f"{kind}-left-{back}"
        code, _ = run(kind, cache, int(steps) - back)
        assert code == -signal.SIGKILL
        (folder,) = (path for path in cache_root(str(cache)).iterdir() if path.is_dir())
        shards = {path.stem for path in (folder / "train").glob("0*.json")}
        left = [p for p in folder.rglob("*") if "partial" in p.name or (p.suffix == ".arrow" and p.stem not in shards)]
        orphans += any("train" in path.parts for path in left)
        make(kind, cache, **few).prepare_data()
        named = json.loads((folder / "pare.json").read_text())["files"]
        assert all(re.fullmatch(r"(train|val)/\d+\.(arrow|json)|tokenizer/\w+\.json", name) for name in named)
        assert all(name.replace(".arrow", ".json") in named for name in named)
        assert not list(folder.rglob(".*")), "nothing half-written stays"
        make(kind, cache).prepare_data()
        assert content(cache) == content(parent / f"{kind}-straight")
    assert orphans >= 2, "these kills prove nothing"


def test_a_manifest_that_does_not_name_all_is_not_finished(tmp_path, monkeypatch):
    """Killed after the last shard, before the manifest that says so."""
    few = make("blocks", tmp_path, max_train_blocks=1, max_val_blocks=1)
    few.prepare_data()
    (folder,) = (path for path in cache_root(str(tmp_path)).iterdir() if path.is_dir())
    before = (folder / "pare.json").read_bytes()
    make("blocks", tmp_path).prepare_data()
    (folder / "pare.json").write_bytes(before)
    with pytest.raises(FileNotFoundError, match="no prepared data"):
        make("blocks", tmp_path).setup("fit")
    few.setup("fit")
    flip(folder / "train/00001.arrow")
    with pytest.raises(ValueError, match=r"train/00001\.arrow is not what was written .*; delete"):
        make("blocks", tmp_path).prepare_data()


def test_every_file_is_read_once_at_a_start(tmp_path, monkeypatch):
    read = []
    monkeypatch.setattr(manifest, "_sha256", lambda path, real=manifest._sha256: read.append(path) or real(path))
    make("blocks", tmp_path, max_train_blocks=50).prepare_data()
    for arguments in ({"max_train_blocks": 50}, {}, {}):
        read.clear()
        named = [path for path in cache_root(str(tmp_path)).rglob("*") if path.suffix == ".arrow"]
        make("blocks", tmp_path, **arguments).prepare_data()
        assert sorted(path for path in read if path.suffix == ".arrow") == sorted(named)


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


def test_a_source_that_changed_under_its_name_leaves_nothing_of_the_old_wherever_it_is_killed(parent):
    def documents():
        # Validation is as before; training has other words, of which another tokenizer is made.
        for i, text in enumerate(sentences(0, 60)):
            yield "train" if i % 10 else "val", text.replace("stone", "pebbles") if i % 10 else text

    code, _ = run("blocks", parent / "changed", 0, documents=documents)
    assert code == 0
    make("blocks", parent / "small", max_train_blocks=5, max_val_blocks=5).prepare_data()
    _, steps = run("blocks", shutil.copytree(parent / "small", parent / "counted"), 0, documents=documents)
    for target in range(1, int(steps), 9):
        cache = shutil.copytree(parent / "small", parent / f"changed-{target}")
        code, _ = run("blocks", cache, target, documents=documents)
        assert code == -signal.SIGKILL
        code, _ = run("blocks", cache, 0, documents=documents)
        assert code == 0
        assert content(cache) == content(parent / "changed")


@pytest.mark.parametrize("known", [False, True])
def test_text_that_cannot_be_used_leaves_nothing_but_what_is_in_use(tmp_path, monkeypatch, known):
    if known:
        make("blocks", tmp_path, max_train_blocks=5, max_val_blocks=5).prepare_data()
    before = content(tmp_path)
    encode = blocks.BlockRecipe.encode

    def refuses(self, rows):
        if any(text.startswith("51 ") for (text,) in rows):
            raise ValueError("this text cannot be used")
        return encode(self, rows)

    monkeypatch.setattr(blocks.BlockRecipe, "encode", refuses)
    with pytest.raises(ValueError, match="this text cannot be used"):
        make("blocks", tmp_path).prepare_data()
    after = content(tmp_path)
    assert before.items() <= after.items() and not [name for name in after if "/rows/" in name]
    if not known:
        assert not list(cache_root(str(tmp_path)).iterdir())
    else:
        make("blocks", tmp_path, max_train_blocks=5, max_val_blocks=5).setup("fit")


@pytest.fixture(scope="module")
def unfinished(parent):
    """What an error amid the training split left."""
    with pytest.MonkeyPatch.context() as patch:
        small_pieces(patch.setattr)
        pack, packed = blocks.BlockRecipe.pack, []

        def fails(self, *arguments):
            packed.append(arguments)
            if len(packed) == 10:
                raise OSError("something breaks")
            return pack(self, *arguments)

        patch.setattr(blocks.BlockRecipe, "pack", fails)
        with pytest.raises(OSError, match="something breaks"):
            make("blocks", parent / "unfinished").prepare_data()
    return parent / "unfinished"


@pytest.mark.parametrize(
    "name", ["rows/train.arrow", "tokenizer/tokenizer.json", "val/00000.arrow", "train/00000.arrow", "train/00000.json"]
)
def test_damage_to_what_a_broken_off_preparation_left_is_named(unfinished, tmp_path, name):
    cache = shutil.copytree(unfinished, tmp_path / "cache")
    (folder,) = (path for path in cache_root(str(cache)).iterdir() if path.is_dir())
    if name.startswith("train/") and name.endswith(".json"):  # still JSON, of other numbers
        (folder / name).write_text((folder / name).read_text().replace('"rows": ', '"rows": 1', 1))
    else:
        flip(folder / name)
    before = content(cache)
    with pytest.raises(ValueError, match=rf"{name} .*; delete {folder}, and the data are prepared again"):
        make("blocks", cache).prepare_data()
    assert content(cache) == before


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
