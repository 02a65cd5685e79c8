"""Records for tests of the report: a recorded run with its numbers varied. No one measured them."""

import json
import random
from pathlib import Path
from typing import Any

from tests.conftest import ROOT

METHODS = [
    ("none", {}),
    ("int8", {"block": 256}),
    ("bf16", {}),
    ("topk", {"density": 0.01, "values": {"method": "int8"}}),
    ("topk", {"density": 0.1, "values": {"method": "int8"}}),
    ("error_feedback(onebit)", {"storage": "float32"}),
    ("powersgd", {"rank": 4}),
    ("randomk", {"density": 0.1}),
    ("int4", {}),
    ("sketch", {"columns": 1000}),
    ("qsgd", {"levels": 15}),
]
BYTES_KEPT = (2.0, 0.25, 0.5, 0.025, 0.2, 0.04, 0.08, 0.1, 0.13, 0.3, 0.22)
STRUCTURE = {
    "layers": [
        {"layer": i, "groups": 4, "groups_kept": 1 + i % 4, "channels": 1024, "channels_kept": 256 + 64 * i}
        for i in range(6)
    ],
    "parameters_before": 8_000_000,
    "parameters_after": 6_000_000,
    "ppl_before": 30.5,
    "ppl_after": 41.25,
}
TIERS = {
    "iterations": [
        {"iteration": i, "dense": 1 - 0.2 * i, "mid_2_4": 0.15 * i, "topk": 0.05 * i, "sparsity": 0.1 * i,
         "ppl": 30 + i, "violations": 0}
        for i in range(1, 5)
    ],
    "matrices": [
        {"name": f"layers.{i}.mlp.down_proj", "rows": 16, "columns": 43,
         "map": "".join(str((r * c * (i + 3)) % 3) for r in range(16) for c in range(43))}
        for i in range(3)
    ] + [{"name": "layers.3.mlp.down_proj", "rows": 16, "columns": 43, "dense": 200, "mid_2_4": 300, "topk": 188}],
    "quantiles": {"dense": [0.5, 1, 2, 4, 9], "2:4": [0.2, 0.4, 0.6, 0.8, 1.1], "topk": [0.01, 0.05, 0.1, 0.2, 0.3]},
}  # fmt: skip
WORDS = ["The", "old", "<b>house", "&", "the", "sea", ":", "nobody", "knew", "who", "had", "lived", "there"]
SURVIVAL = {
    "tokens": [f"{word} " for word in WORDS],
    "dropped_at": [0 if i % 5 == 1 else 1 if i % 5 == 2 else 2 if i % 5 == 4 else None for i in range(len(WORDS))],
    "layers": [2, 4, 6],
}
CALIBRATION = {
    "needed": [
        {"layer": n, "heads": [n % 4] if n % 2 else None, "share": 1 / (n + 1), "all_heads": 0.9 / n**0.5}
        for n in range(1, 12)
    ],
    "layers": [4, 8],
    "keep": [0.3, 0.1],
    "window": 16,
    "pool": 17,
    "tried": [
        {"scorer": "last_window", "layers": [4, 8], "keep": [0.3, 0.1], "bound": 2.5, "right": 11, "unpruned": 12},
        {"scorer": "random", "layers": [4, 8], "keep": [0.3, 0.1], "bound": 2.5, "right": 2, "unpruned": 12},
    ],
}
PREFILL = {
    "arms": [
        {
            "length": n,
            "arm": arm,
            "ms_median": n / up,
            "ms_iqr": n / 50,
            "speedup": up,
            "speedup_spread": up / 50,
            "bound": b,
            "peak_bytes": n * 1e5,
        }
        for n in (1024, 2048, 4096, 8192)
        for arm, up, b in (("baseline", 1.0, 1.0), ("pruned", 2.3, 2.46), ("keep-1.0", 0.8, None))
    ],
    "placement": {"devices": ["cuda:0"], "offloaded": ["model.layers.3"]},
    "skipped": {"16384": "the model has only 8192 positions"},
}
TOKEN_QUALITY = [
    {"task": "suffix", "scorer": "unpruned", "keep": None, "nll_rise": 0.0, "accuracy": 0.5, "kept": 1.0},
    {"task": "suffix", "scorer": "random", "keep": 0.7, "nll_rise": 0.25, "nll_rise_low": 0.2, "nll_rise_high": 0.31,
     "accuracy": 0.4, "kept": 0.34, "prefill_ms": 6.0, "prefill_ms_unpruned": 10.0},
    {"task": "suffix", "scorer": "random", "keep": 0.5, "nll_rise": 0.5, "nll_rise_low": 0.4, "nll_rise_high": 0.6,
     "accuracy": 0.3, "kept": 0.13, "prefill_ms": 4.0, "prefill_ms_unpruned": 10.0},
    {"task": "suffix", "scorer": "oracle_gate_gradient", "keep": 0.7, "oracle": True, "nll_rise": 0.1,
     "nll_rise_low": 0.1, "nll_rise_high": 0.1, "accuracy": 0.5, "kept": 0.34, "prefill_ms": 6.0,
     "prefill_ms_unpruned": 10.0},
]  # fmt: skip
INFERENCE = {
    "rows": [{"phase": "prefill", "batch": 1, "dense_ms": 30.0, "pruned_ms": 20.0, "speedup": 1.5, "flop_bound": 1.6,
              "byte_bound": 1.4, "suspicious": False}],
}  # fmt: skip
LADDER = {
    "rungs": [
        {"rung": "dense", "nll_rise": 0.0, "right": 0.9, "prefill_speedup": 1.0, "prefill_bound": 1.0},
        {"rung": "tokens", "nll_rise": 0.31, "right": 0.6, "prefill_speedup": 1.75, "prefill_bound": 1.9},
    ]
}
PREFILL_MEMORY = {
    "limit_bytes": 8_000_000_000,
    "arms": [{"arm": "baseline", "longest": 12_288, "probes": []}, {"arm": "pruned", "longest": 20_480, "probes": []}],
}


COLLECTIVES = {
    "kind": "collectives", "backend": "gloo", "device": "cpu", "world_size": 2, "link_rate": "1gbit",
    "link_emulated": True, "peer_bandwidth": None,
    "points": [
        {"operation": name, "message_bytes": 8**n, "sent_bytes": 8**n, "repeats": 9, "time_ms": 0.1 + 8**n * cost,
         "time_ms_p90": 0.2 + 8**n * cost, "bandwidth": 8**n / (1e-4 + 8**n * cost / 1e3)}
        for name, cost in (("all_gather", 1e-5), ("all_reduce", 2e-5))
        for n in range(2, 9)
    ],
}  # fmt: skip


def template() -> dict[str, Any]:
    """A recorded run of two ranks."""
    with open(Path(ROOT) / "docs/results/records/profile.jsonl") as file:
        runs = [json.loads(line) for line in file]
    return next(run for run in runs if run["run_name"] == "profile_2_ranks")


def varied(number: int, seed: int = 0) -> list[dict[str, Any]]:
    """That many runs: methods × link rates × ranks × seeds × batch sizes, until there are enough."""
    random_, base, made = random.Random(seed), template(), []
    base.pop("trace")
    for batch in (4, 8, 16, 32, 64, 128):
        for ranks, link in ((1, None), (2, "100mbit"), (2, "1gbit"), (2, "10gbit"), (4, "1gbit")):
            for (method, config), kept in zip(METHODS, BYTES_KEPT, strict=True):
                for run_seed in (1, 2, 3):
                    made.append(_run(base, random_, batch, ranks, link, method, config, kept, run_seed))
                    if len(made) == number:
                        return made
    raise ValueError(f"only {len(made)} runs can be made")


def _run(base, random_, batch, ranks, link, method, config, kept, seed) -> dict[str, Any]:
    steps, ideal = 12, 127_253_504 if ranks > 1 else 0
    sent = int(ideal * kept)
    parameters = 202_910_720 if ranks > 1 else 0
    rate = {None: 1e10, "100mbit": 1e8, "1gbit": 1e9, "10gbit": 1e10}[link]
    wire = (sent + parameters) * 8e3 / rate
    encode = 0.0 if method == "none" or ranks == 1 else 180 * random_.uniform(0.9, 1.1)
    step = 1400 * random_.uniform(0.95, 1.05) + wire + encode * 1.5
    ppl = 150 * (1 + 0.02 / (kept + 0.1)) * random_.uniform(0.99, 1.01)
    name = f"{method}/{ranks}/{link}/{batch}/{seed}"
    return {
        **base,
        "run_name": name, "compress_method": method, "compress_config": config, "world_size": ranks, "seed": seed,
        "batch_size": batch, "step_time_ms_mean": step, "step_time_ms_p50": step * 0.99, "step_time_ms_p90": step * 1.1,
        "step_time_ms_p95": step * 1.2, "tokens_per_s": ranks * batch * 128 / step * 1e3,
        "comm_time_ms_total": wire * steps, "comm_ratio": wire / step,
        "comm_time_ms_by_op": {"all_gather": wire * steps * 0.4, "reduce_scatter": wire * steps * 0.6},
        "bytes_raw_total": ideal * steps, "bytes_compressed_total": sent * steps,
        "bytes_by_role": {"values": int(sent * steps * 0.8), "indices": int(sent * steps * 0.2)} if ranks > 1 else {},
        "bytes_parameters_total": parameters * steps, "compression_ratio": 1 / kept if ranks > 1 else None,
        "compress_time_ms": encode * steps, "decompress_time_ms": encode * steps / 2, "train_loss": 5.0,
        "val_ppl": ppl, "val_loss": None, "target_ppl": 160.0, "time_to_target_ppl_s": 9 * step if ppl < 160 else None,
        "val_curve": [
            {"train_s": step * s / 1e3, "step": s, "val_ppl": ppl * (1 + 3 / s)} for s in (2, 4, 8, 12)
        ],
        "link_rate": link, "link_delay": None, "link_emulated": True if link else None, "wall_s": step / 50,
        "command": f"python -m bench link --rate {link} --hosts {ranks} -- python main.py fit --config c.yaml",
        "date": f"2026-11-21T15:{seed:02d}:00+00:00", "effective_bandwidth": sent / max(wire, 1) * 1e3,
    }  # fmt: skip


def write(path: Path, records: list[dict[str, Any]], *lines: str) -> Path:
    """Write records, and lines as they are, to a results file."""
    path.write_text("".join(json.dumps(r) + "\n" for r in records) + "".join(line + "\n" for line in lines))
    return path
