"""Fault injection in short: a kill in training by two ranks, and flipped bits in what it left."""

import json
import random

import pytest

from bench.experiments.fault_injection import counted, killed, run
from bench.faults import flips, kills
from bench.faults.scenarios import SCENARIOS, digest

CHAINS = {"CompressedFSDP2": 1}  # killed preparations are tests of their own
KILLS = 1  # a chain of more is three starts of Python a kill


@pytest.fixture(scope="module")
def chains(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults")
    return folder, list(killed(folder, folder / "inputs", CHAINS, KILLS, undisturbed=1))


@pytest.mark.timeout(900)
def test_killed_commands_lose_nothing(chains):
    _, found = chains
    assert [one["scenario"] for one in found] == list(CHAINS)
    assert not [fault for one in found for fault in one["faults"]]
    assert sum(len(one["kills"]) for one in found) >= KILLS


def test_finished_chains_are_not_run_again(chains):
    folder, found = chains
    assert list(killed(folder, folder / "nowhere", CHAINS, KILLS)) == found


def test_a_flipped_bit_is_noticed_and_its_file_named(chains):
    folder, _ = chains
    runs = folder / "CompressedFSDP2/runs"
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
