"""Fault injection in short: a kill in training by two ranks, and flipped bits in what it left."""

import json
import random

import pytest

from bench.experiments.fault_injection import counted, killed, run
from bench.faults import flips, kills
from bench.faults.scenarios import SCENARIOS, digest
from common.records import record
from tests.command_line import Commands

TRAINING = SCENARIOS["CompressedFSDP2"]  # killed preparations are tests of their own
WHILE_SAVING = 28  # the seed of: SIGKILL to the command while it saves its second checkpoint
LONG_S = 60.0  # more than it takes


@pytest.fixture(scope="module")
def broken_off(tmp_path_factory):
    """A training that was killed and went on: its folder, and the chain of a single kill.

    What it would have left is found by ranks that are up already.
    """
    folder = tmp_path_factory.mktemp("faults")
    _, _, *arguments = TRAINING.command(folder)
    ranks = Commands()
    (folder / "undisturbed").mkdir()
    ranks.run(folder / "undisturbed", *arguments, base=())
    ranks.close()
    wanted = TRAINING.outcome(folder / "undisturbed")
    return folder / "run", kills.chain(TRAINING, 1, WHILE_SAVING, folder, folder / "run", wanted, LONG_S)


@pytest.mark.timeout(900)
def test_killed_commands_lose_nothing(broken_off):
    _, found = broken_off
    (kill,) = found.kills
    assert kill.startswith("SIGKILL to the command") and kill.endswith("saving")
    assert not found.faults


def test_finished_chains_are_not_run_again(tmp_path, monkeypatch):
    chains = [kills.Chain(TRAINING.name, seed, ["SIGKILL"]) for seed in range(2)]
    undisturbed, given = [({"losses": "[]"}, 7.0)], iter(chains)
    monkeypatch.setattr(kills, "reference", lambda *_: undisturbed.pop())
    monkeypatch.setattr(kills, "chain", lambda *told: told[-2:] == ({"losses": "[]"}, 7.0) and next(given))
    for _ in range(2):
        found = list(killed(tmp_path, tmp_path / "nowhere", {TRAINING.name: 2}, 1))
        assert found == [chain.line() for chain in chains] == record.read(tmp_path / "chains.jsonl")[0]


def test_a_flipped_bit_is_noticed_and_its_file_named(broken_off):
    folder, _ = broken_off
    runs = folder / "runs"
    artifacts = [
        flips.Artifact("sharded checkpoint", runs / "faults/checkpoints/last.ckpt", flips.check_sharded),
        flips.Artifact("model", runs / "model", flips.check_model),
        flips.Artifact("records", runs / "results.jsonl", flips.check_records),
    ]
    for artifact in artifacts:
        artifact.load(artifact.path)
    assert [one for one in flips.all_flips(artifacts, 12, seed=1) if not one.noticed] == []


def test_chains_of_another_state_of_the_code_are_not_taken(tmp_path):
    (tmp_path / "chains.jsonl").touch()
    with pytest.raises(ValueError, match="nothing says what its runs are of"):
        run(tmp_path / "records.jsonl", tmp_path)


def test_what_differs_is_a_fault(tmp_path):
    """The comparison itself can fail: a command that leaves something else than it would undisturbed."""
    scenario = SCENARIOS["prepare"]
    lost = kills.compare(scenario, tmp_path, {"cache": "of another text"})
    assert lost == ["cache differs from that of the undisturbed command"]
    (tmp_path / ".cache.partial").mkdir()
    assert "left behind: .cache.partial" in kills.compare(scenario, tmp_path, scenario.outcome(tmp_path))


def test_an_unnoticed_flip_is_told_from_a_noticed_one(tmp_path):
    (tmp_path / "a.txt").write_text("a")

    def named(path):
        raise ValueError(f"{path} is damaged")

    def unnamed(path):
        raise ValueError("something is damaged")

    for load, noticed in ((named, True), (unnamed, False), (lambda path: None, False)):
        assert flips.flip(flips.Artifact("text", tmp_path / "a.txt", load), random.Random(0)).noticed is noticed


def test_models_that_differ_in_the_order_of_their_metadata_are_the_same(tmp_path):
    found = set()
    for number, names in enumerate(("ab", "ba")):
        header = json.dumps({"__metadata__": dict.fromkeys(names, "x"), "w": {"dtype": "U8"}}).encode()
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"12")
        found.add(digest(folder, "*.safetensors"))
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"13")
    assert len(found) == 1 and digest(folder, "*.safetensors") not in found


def test_inputs_are_counted_as_hypothesis_prints_them():
    said = "  - during generate phase (0.12 seconds):\n    - 30 passing, 0 failing, and 2 invalid test cases\n"
    assert counted(said * 2 + "FAILED tests/a.py::b - E\n") == (60, 1)
