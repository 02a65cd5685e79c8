"""Is anything lost, or wrong without a word, when Pare is killed, its files are damaged, and its input is nonsense?

Kills: every scenario of `bench.faults.scenarios` is run undisturbed once, then in chains of kills that must end with
the same outcome and leave no process. Flips: a bit in a random place of whatever Pare reads back must be noticed, and
the file named. Inputs: the property tests of every parser, in their long form. What is finished in a `--folder` is not
done again.
"""

import json
import os
import re
import statistics
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.experiments.runs import ROOT, claim, say
from bench.faults import flips, kills
from bench.faults.scenarios import SCENARIOS, make_inputs, make_sparse
from bench.tables import figures
from common.files import write_text
from common.records import record

RECORDS = "fault_injection.jsonl"
COMMAND = "python -m bench experiment fault_injection"
CHAIN = 4
# Chains of CHAIN kills; training has the most states to lose.
CHAINS = {"CompressedFSDP": 7, "CompressedFSDP2": 7, "CompressedDDP": 7, "sweep": 2}
FLIPS = 100


def run(records: Path, folder: Path) -> None:
    """Do what is missing and append the figures."""
    commit = claim(folder)
    inputs = prepare(folder)
    chains = list(killed(folder, inputs))
    _kills(records, commit, chains)
    _flips(records, commit, flips.all_flips(flips.artifacts(folder), FLIPS, seed=1))
    _inputs(records, commit, *property_tests())


def prepare(folder: Path) -> Path:
    """The small models that other commands read, and the cache of their text; made once.

    Raises:
        RuntimeError: They could not be made.
    """
    inputs = folder / "inputs"
    if not (inputs / "model").exists():
        say("training the small model of the other commands")
        kills.undisturbed(make_inputs(), inputs / "training", inputs / "cache")
        (inputs / "training/runs/model").rename(inputs / "model")
    if not (inputs / "sparse").exists():
        kills.undisturbed(make_sparse(inputs), inputs / "pruning", inputs / "cache")
    return inputs


def killed(
    folder: Path, inputs: Path, chains: dict[str, int] | None = None, length: int = CHAIN, undisturbed: int = 2
) -> Iterator[dict[str, Any]]:
    """Chains of kills of every scenario, those of before first.

    Args:
        folder: Working folder; finished chains are kept in its ``chains.jsonl``.
        inputs: What ``prepare`` made.
        chains: Number of chains by scenario; by default ``CHAINS``, and 3 of what it does not name.
        length: Kills in a chain.
        undisturbed: Runs that are not killed, see ``kills.reference``.
    """
    counts = {name: CHAINS.get(name, 3) for name in SCENARIOS} if chains is None else chains
    path = folder / "chains.jsonl"
    done, _ = record.read(path) if path.exists() else ([], [])
    known = {(one["scenario"], one["seed"]) for one in done}
    yield from done
    for name, count in counts.items():
        scenario = SCENARIOS[name]
        where = folder / name.replace(" ", "_")
        expected = where.with_suffix(".json")
        if not expected.exists():
            say(f"{name}, undisturbed")
            write_text(expected, json.dumps(kills.reference(scenario, inputs, where, undisturbed)))
        wanted, typical_s = json.loads(expected.read_text())
        for seed in range(count):
            if (name, seed) in known:
                continue
            found = kills.chain(
                scenario, length, seed, inputs, where.with_name(f"{where.name}-{seed}"), wanted, typical_s
            )
            record.append(path, found.line())
            done_in = f"{len(found.kills)} kills in {found.wall_s:.0f} s"
            say(f"{name}, chain {seed + 1} of {count}: {done_in}; {'; '.join(found.faults) or 'no fault'}")
            yield found.line()


def _kills(records: Path, commit: str | None, chains: list[dict[str, Any]]) -> None:
    total = sum(len(one["kills"]) for one in chains)
    faults = [f"{one['scenario']}, seed {one['seed']}: {fault}" for one in chains for fault in one["faults"]]
    all_kills = [kill for one in chains for kill in one["kills"]]
    by_signal = Counter(kill.split()[0] for kill in all_kills)
    saving = sum("saving" in kill for kill in all_kills)
    _figure(
        records,
        commit,
        figure="fault-kills",
        what=f"results lost, wrong, or processes left after {total} random kills ({_counts(by_signal)}; "
        f"{saving} while saving) of {len(SCENARIOS)} commands",
        value=len(faults),
        reached=not faults and total >= 100,
        target="0 of at least 100",
        details={"faults": faults, "chains": chains},
    )
    for name in SCENARIOS:
        mine = [one for one in chains if one["scenario"] == name]
        if mine:
            _figure(
                records,
                commit,
                figure=f"fault-kills-{name.replace(' ', '-')}",
                what=f"the same, `{name}`: {sum(len(one['kills']) for one in mine)} kills in {len(mine)} chains",
                value=sum(len(one["faults"]) for one in mine),
                reached=not any(one["faults"] for one in mine),
                target="0",
                details={"chain_s": statistics.median(one["wall_s"] for one in mine)},
            )


def _flips(records: Path, commit: str | None, found: list[flips.Flip]) -> None:
    missed = [one for one in found if not one.noticed]
    kinds = Counter(one.kind for one in found)
    _figure(
        records,
        commit,
        figure="fault-flips",
        what=f"flipped bits in {len(found)} random places ({_counts(kinds)}) not noticed, or not with the file's name",
        value=len(missed),
        reached=not missed and len(found) >= 100,
        target="0 of at least 100",
        details={"missed": [one.line() for one in missed]},
    )


def property_tests() -> tuple[int, int]:
    """Run the parsers' property tests in their long form; inputs tried, and tests that failed.

    Raises:
        RuntimeError: They could not be run.
    """
    say("property tests of every parser, long form")
    command = [sys.executable, "-m", "pytest", "-q", "-m", "hypothesis", "--hypothesis-show-statistics", "tests"]
    environment = {**os.environ, "HYPOTHESIS_PROFILE": "long"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode not in (0, 1):
        raise RuntimeError(f"{' '.join(command)} failed:\n{(done.stdout + done.stderr)[-3000:]}")
    return counted(done.stdout)


def counted(output: str) -> tuple[int, int]:
    """Inputs that pytest's output with Hypothesis' statistics says were tried, and tests that failed."""
    tried = sum(map(int, re.findall(r"- (\d+) passing, \d+ failing", output)))
    return tried, len(re.findall(r"^FAILED ", output, re.MULTILINE))


def _inputs(records: Path, commit: str | None, tried: int, failed: int) -> None:
    _figure(
        records,
        commit,
        figure="fault-inputs",
        what=f"property tests that fail on {tried:,} generated inputs to every parser",
        value=failed,
        reached=not failed and tried >= 10_000,
        target="0 on at least 10,000",
        details={"inputs": tried},
    )


def _counts(counts: Counter[str]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.most_common())


def _figure(records: Path, commit: str | None, details: dict[str, Any], **fields: Any) -> None:
    details = {"measured_at": commit, **details}
    figures.append(records, unit="", command=COMMAND, details=details, **fields)
