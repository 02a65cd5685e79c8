"""Cells of the comparison with published ways, on a model of four layers, and what is made of them."""

import json
import math
import sys
from types import SimpleNamespace

import pytest
import torch

from bench.experiments import structured_peers as peers
from common.records import record
from lightning_modules.perplexity import mean_nll, perplexity
from lightning_modules.structured_pruning.compensation.least_squares import LeastSquares
from lightning_modules.structured_pruning.importance.magnitude import Magnitude
from tests.lightning_modules.structured_pruning import toy


@pytest.fixture
def data(monkeypatch):
    monkeypatch.setattr(peers, "CALIBRATION_BLOCKS", 8)
    monkeypatch.setattr(peers, "RECOVERY_STEPS", 2)
    text = toy.batches(4)
    one = SimpleNamespace(calibration=lambda count, seed: text, val_dataloader=lambda: toy.batches(1), block_size=20)
    return {"a": one, "b": SimpleNamespace(**(vars(one) | {"val_dataloader": lambda: toy.batches(2)[1:]}))}


# peft 0.21 still asks transformers by the old name
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_cells_leave_the_model_alone_and_remove_what_they_say(data, tmp_path):
    model = toy.tiny()
    before = {name: w.clone() for name, w in model.state_dict().items()}

    def cell(arm, budget=0.25, seed=1, when="before"):
        return peers.cell(model, "toy", data, arm, budget, seed, tmp_path, when)

    dense = cell(None, 0.0)
    text = toy.batches(2)
    wanted = {"a": perplexity(mean_nll(model, text[:1])), "b": perplexity(mean_nll(model, text[1:]))}
    assert dense["removed"] == 0 and dense["ppl"] == pytest.approx(wanted)
    tuned = cell(None, 0.0, when="after")["ppl"]
    assert tuned.keys() == wanted.keys() and tuned != dense["ppl"]
    layer, recovered = (cell(peers.PEERS["shortgpt"], when=when) for when in peers.WHEN)
    assert layer["removed"] == recovered["removed"] == 0.25 and layer["ppl"] != recovered["ppl"]
    for arm in (peers.ARMS["pare"], peers.Arm("", lambda seed: Magnitude(), LeastSquares(), seeds=1)):
        found = cell(arm, seed=2)
        assert found["removed"] == pytest.approx(0.25, abs=0.03)
    assert all(torch.equal(w, before[name]) for name, w in model.state_dict().items())


def test_what_is_there_is_not_measured_again_and_each_cell_becomes_figures(tmp_path, monkeypatch):
    """The process is stood in for; what it is asked, and what is made of its lines, is real."""
    for name in ("one", "two"):
        (tmp_path / f"{name}.json").write_text(json.dumps([{"text": "x"}] * 4))
    (tmp_path / "model").mkdir()
    asked, appended = [], []

    def lines(module, *given, log):
        seed, wanted_budget = (float(given[given.index(name) + 1]) for name in ("--seed", "--budget"))
        asked.append((wanted_budget, seed))
        there = {peers._key(one) for one in peers._known(tmp_path / f"work/seed-{seed:g}.jsonl")}
        for arm, budget, when in peers._wanted(seed, wanted_budget):
            if (arm, budget, when) in there:
                continue
            if len(asked) == 1 and arm == "flap":
                raise RuntimeError("killed")
            ppl = 10.0 if arm == peers.DENSE else {"pare": 11.0, "flap": 12.0 + seed / 100}.get(arm, 13.0)
            ppl = math.inf if arm == "random" else ppl
            found = {"one": ppl / 2 if when == "after" else ppl, "two": ppl}
            yield {"arm": arm, "budget": budget, "when": when, "seed": seed, "removed": budget, "ppl": found}

    monkeypatch.setattr(peers, "json_lines", lines)
    monkeypatch.setattr(peers.figures, "append", lambda path, **figure: appended.append(figure))
    texts = {name: tmp_path / f"{name}.json" for name in ("one", "two")}
    with pytest.raises(RuntimeError, match="killed"):
        peers.run(tmp_path / "r.jsonl", tmp_path / "work", tmp_path / "model", texts)
    assert not appended
    kept = tmp_path / "work/seed-1.jsonl"
    kept.write_bytes(kept.read_bytes()[:-20])  # torn, as a kill while writing leaves it: that cell is measured again
    assert len(peers._known(kept)) == peers._wanted(1, 0.25).index(("flap", 0.25, "before")) - 1
    peers.run(tmp_path / "r.jsonl", tmp_path / "work", tmp_path / "model", texts)
    assert asked == [(0.25, 1), *((budget, seed) for budget in peers.BUDGETS for seed in peers.SEEDS)]
    found = {figure["figure"]: figure for figure in appended}
    assert len(appended) == len(peers.SEEDS) * len(found), "after every seed"
    pare = found["pare-25-one-before"]
    assert pare["value"] == pytest.approx(1.1) and pare["reached"] and pare["target"] == "≤ 1.3 ×"
    assert found["pare-25-one-after"]["value"] == pytest.approx(1.1) and found["pare-25-one-after"]["reached"] is None
    assert "pare-learned-25-one-after" not in found and len(found["flap-50-two-before"]["details"]["ratios"]) == 3
    margin = found["margin-50-two"]
    assert margin["details"]["best"] == "flap" and margin["reached"] and margin["value"] == pytest.approx(12.02 / 11)
    chance = found["random-25-one-before"]
    assert chance["value"] == math.inf and chance["spread"] is None  # it comes back from the file as a number
    there = [peers._key(one) for one in peers._known(kept)]
    assert set(there) == {cell for budget in peers.BUDGETS for cell in peers._wanted(1, budget)}
    recovered = sum(arm.recovered for arm in peers.ARMS.values())
    assert len(set(there)) == len(there) == 2 + 3 * (len(peers.ARMS) + recovered)
    assert len(peers._wanted(1, 0.1)) > len(peers._wanted(2, 0.1))


def test_the_process_of_a_seed_passes_over_a_torn_line(tmp_path, monkeypatch, capsys):
    kept, wanted = tmp_path / "seed-2.jsonl", peers._wanted(2, 0.25)
    for arm, budget, when in wanted[:-1]:
        record.append(kept, {"arm": arm, "budget": budget, "when": when, "ppl": {"a": math.nan}})
    kept.write_bytes(kept.read_bytes()[:-9])
    monkeypatch.setattr(peers, "load", lambda *_, **__: None)
    monkeypatch.setattr(peers, "_data", lambda *_: None)
    monkeypatch.setattr(peers, "cell", lambda *_: {"ppl": {"a": math.inf}})
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    monkeypatch.setattr(peers.os, "environ", dict(peers.os.environ))
    given = {"model": "m", "train": "t", "texts": "a=b", "cache": "c", "kept": str(kept), "seed": "2", "budget": "0.25"}
    monkeypatch.setattr(sys, "argv", ["main", *(part for k, v in given.items() for part in (f"--{k}", v))])
    peers.main()
    said = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [peers._key(one) for one in said] == wanted[-2:]
    for one in said:
        record.append(kept, one)
    assert [peers._key(one) for one in peers._known(kept)] == wanted
    assert peers._known(kept)[-1]["ppl"]["a"] == math.inf and math.isnan(peers._known(kept)[0]["ppl"]["a"])


def test_no_two_arms_are_one():
    made = [
        (arm.importance(1).describe(), arm.compensation.describe(), arm.drop_by, arm.uniform, arm.text)
        for arm in peers.ARMS.values()
    ]
    assert all(one not in made[:i] for i, one in enumerate(made))
