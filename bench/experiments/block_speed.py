"""Block sparsity: time and memory of scoring and demotion, of a layer as large as a 7 B model's, and speed of products.

`run` judges; `python -m bench.experiments.block_speed SIZE REPEATS` measures in a process of its own, so that its peak
memory is its own, and prints JSON lines.
"""

import gc
import json
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.experiments.runs import json_lines, say
from bench.tables import figures
from common.measure.memory import resident_now, resident_peak
from common.measure.timing import interleaved, percentiles, ratio_with_spread
from lightning_modules.block_sparsity.bands import to_bands
from lightning_modules.block_sparsity.demotion import Ratios, demote
from lightning_modules.block_sparsity.inputs import Inputs
from lightning_modules.block_sparsity.packed_model import PackedLinear
from lightning_modules.block_sparsity.packing import Layout, pack
from lightning_modules.block_sparsity.scored import Scored
from lightning_modules.block_sparsity.scores.magnitude import Magnitude
from lightning_modules.block_sparsity.scores.wanda import Wanda
from lightning_modules.block_sparsity.tiers import TierMap
from lightning_modules.block_sparsity.updates.obs import Obs

RECORDS = "block_sparsity.jsonl"
SIZE, REPEATS = 4096, 9
COMMAND = "python -m bench experiment block_speed"
WHAT = {1: "decode, batch 1", 512: "prefill, 512 tokens"}
SEVEN_B = {"hidden": 4096, "mlp": 11008, "layers": 32, "tokens": 128 * 2048}  # Llama-2-7B, the papers' calibration
MEASURED_TOKENS = 2048  # of which time is taken to grow with the tokens
BLOCK, K = 16, 10
BEFORE, AFTER = Ratios(0.9, 0.1, 0.0), Ratios(0.8, 0.1, 0.1)  # the second iteration moves blocks in both steps
END = Ratios(0.35, 0.45, 0.2)


def run(records: Path, folder: Path) -> None:
    """Measure and append the figures."""
    say(f"timing one iteration and products of {SIZE}×{SIZE}")
    first, *products = json_lines(__name__, str(SIZE), str(REPEATS), log=folder / "block_speed.log")
    _append_demotion(records, first["demotion"])
    _append_iteration(records, first["iteration"], first["device"])
    for product in products:
        _append_products(records, product)


def _append_demotion(records: Path, demotion: dict[str, Any]) -> None:
    matrix = f"scoring and demotion of a {SIZE}×{SIZE} matrix (second iteration of the schedule)"
    rows: list[tuple[str, str, float, str, bool | None]] = [
        (
            "demotion-loop",
            f"{matrix}, faster than a loop over blocks that uses tensor operations in each",
            demotion["over_loop"],
            "≥ 100×",
            demotion["over_loop"] >= 100,
        ),
        ("demotion-floor", f"{matrix}, time over reading the matrix once", demotion["over_read"], "report", None),
        (
            "demotion-memory",
            f"{matrix}, peak extra memory over the matrix",
            demotion["extra_memory"],
            "≤ 2×",
            demotion["extra_memory"] <= 2,
        ),
    ]
    for name, what, value, target, reached in rows:
        figures.append(
            records,
            figure=name,
            what=what,
            value=value,
            unit="×",
            target=target,
            reached=reached,
            command=COMMAND,
            details=demotion,
        )


def _append_iteration(records: Path, iteration: dict[str, Any], device: str) -> None:
    seconds = iteration["layer_s"] * SEVEN_B["layers"]
    figures.append(
        records,
        figure=f"iteration-7b-{device}",
        what=f"one iteration of a 7 B model on this {device}: 32 times a measured layer of its size (statistics of "
        f"{SEVEN_B['tokens']:,} tokens, scores, demotion, OBS update; without running the layer)",
        value=seconds / 60,
        unit="min",
        target="report",
        reached=None,
        command=COMMAND,
        details=iteration,
    )


def _append_products(records: Path, product: dict[str, Any]) -> None:
    """Two figures: the fastest of all packed forms, and 8-bit weights by torch's own kernel."""
    packed = max(
        (name for name in product["speed"] if name != "int8"), key=lambda name: product["speed"][name]["ratio"]
    )
    arms = {"packed": (packed, f"weights in the fastest packed form ({packed}), 41.7 % zeros,")}
    arms["int8"] = ("int8", "int8 weights, torch's packed kernel,")
    for name, (arm, what) in arms.items():
        if arm not in product["speed"]:
            continue
        bound = product["bound"][arm]
        figures.append(
            records,
            figure=f"product-{name}-{product['rows']}",
            what=f"{WHAT[product['rows']]}: {what} over dense (bound by bytes {bound:.2f}×)",
            value=product["speed"][arm]["ratio"],
            spread=product["speed"][arm]["spread"],
            unit="×",
            target="report",
            reached=None,
            command=COMMAND,
            details={n: product[n] for n in ("device", "dense_ms", "speed")} | {"arm": arm, "bound": bound},
        )


# ---- measuring ------------------------------------------------------------------------------------------------


def demotion(size: int, repeats: int, device: torch.device) -> dict[str, Any]:
    """Time one iteration on a square matrix against a loop over its blocks, and against reading the matrix once.

    Returns:
        Milliseconds (medians), the loop's time over ours, ours over the read, and the peak extra memory over the matrix
        (host memory; None on a GPU without its allocator's figure).
    """
    weight, norms = torch.randn(size, size, device=device), torch.rand(size, device=device)
    scores = Scored(weight, Wanda().score, norms)
    start = _tiers(weight)
    demote({"m": scores}, {"m": start}, BEFORE)
    extra = _extra_memory(weight, scores, start)

    fresh = [_copy(start, weight) for _ in range(repeats + 1)]  # one a round and one to warm up

    def fast() -> None:
        demote({"m": scores}, {"m": fresh.pop()}, AFTER)

    times = interleaved({"fast": fast, "read": lambda: weight.sum()}, repeats)
    loop = interleaved({"loop": partial(_loop, weight, norms, _copy(start, weight))}, 1, warmup=0)["loop"]
    fast_ms, read_ms = (percentiles(times[name])["p50"] for name in ("fast", "read"))
    return {
        "size": size,
        "fast_ms": fast_ms,
        "loop_ms": loop[0],
        "read_ms": read_ms,
        "over_loop": loop[0] / fast_ms,
        "over_read": fast_ms / read_ms,
        "extra_memory": extra,
    }


def iteration(device: torch.device, hidden: int, mlp: int, tokens: int) -> dict[str, Any]:
    """Time all that an iteration does to a decoder layer of these sizes besides running it.

    Returns:
        Seconds by step: ``moments_s`` for ``MEASURED_TOKENS``, ``demotion_s``, ``update_s``; and ``layer_s`` in all,
        with the moments' time multiplied up to ``tokens``.
    """
    found = dict.fromkeys(("moments_s", "demotion_s", "update_s"), 0.0)

    def timed(step: str, work: Callable[[], Any]) -> Any:
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        result = work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        found[step] += time.perf_counter() - start
        return result

    # queries, keys and values; the attention's output; gate and up; down: what sees the same inputs shares their sums
    for matrices, rows, columns in ((3, hidden, hidden), (1, hidden, hidden), (2, mlp, hidden), (1, hidden, mlp)):
        x = torch.randn(MEASURED_TOKENS, columns, device=device)
        inputs = Inputs(columns, device, moments=True)
        timed("moments_s", partial(inputs.add, x))
        for _ in range(matrices):
            weight = torch.randn(rows, columns, device=device)
            tiers = _tiers(weight)
            scores = Scored(weight, Wanda().score, inputs.squares.sqrt())
            timed("demotion_s", partial(demote, {"m": scores}, {"m": tiers}, END))
            timed("update_s", partial(Obs().apply, weight, tiers.keep_RC, inputs.moments))
    return {**found, "layer_s": found["moments_s"] * tokens / MEASURED_TOKENS + found["demotion_s"] + found["update_s"]}


def products(size: int, rows: list[int], repeats: int, device: torch.device) -> Iterator[dict[str, Any]]:
    """Time x·Wᵀ of a pruned square matrix in bf16: dense, packed plainly and in bands, with 16-bit and int8 values, and
    8-bit weights (all of them) by torch's own kernel, where it has one for the device.

    Args:
        size: Side of the matrix.
        rows: Tokens in a product: the batch for decoding, batch × length for prefill.
        repeats: Timed rounds.
        device: Where.

    Yields:
        For every number of rows: speed of each arm over masked dense with its spread, and the bound that its weight
        bytes set where reading weights is all that counts.
    """
    weight = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    tiers = _tiers(weight)
    demote({"m": Scored(weight, Magnitude().score)}, {"m": tiers}, END, "band")
    weight.masked_fill_(~tiers.keep_RC, 0.0)
    layout = Layout(size, size, BLOCK, K)
    parts = {"packed": pack(weight, tiers, weight.dtype), "packed int8": pack(weight, tiers, torch.int8)}
    parts |= {name.replace("packed", "bands"): to_bands(part, layout, "m") for name, part in parts.items()}
    layers = {name: PackedLinear(part, layout, None) for name, part in parts.items()}
    scale = weight.abs().amax(1) / 127
    codes = (weight / scale[:, None]).round().to(torch.int8)
    bound = {name: weight.nbytes / sum(t.nbytes for t in part.values()) for name, part in parts.items()}
    for count in rows:
        x = torch.randn(count, size, device=device, dtype=weight.dtype)
        arms: dict[str, Any] = {"dense": partial(F.linear, x, weight)}
        arms |= {name: partial(layer, x) for name, layer in layers.items()}
        try:
            torch._weight_int8pack_mm(x, codes, scale)
            arms["int8"] = partial(torch._weight_int8pack_mm, x, codes, scale)
            bound["int8"] = weight.nbytes / (codes.nbytes + scale.nbytes)
        except (RuntimeError, NotImplementedError) as error:
            say(f"no int8 kernel of torch's here: {error}")
        with torch.no_grad():
            times = interleaved(arms, repeats)
        speed = {name: ratio_with_spread(times["dense"], times[name]) for name in bound}
        yield {"rows": count, "dense_ms": percentiles(times["dense"])["p50"], "speed": speed, "bound": dict(bound)}


def _tiers(weight: Tensor) -> TierMap:
    rows, columns = weight.shape
    return TierMap("m", (rows, columns), BLOCK, K, weight.device)


def _copy(tiers: TierMap, weight: Tensor) -> TierMap:
    copied = _tiers(weight)
    copied.map_rc.copy_(tiers.map_rc)
    copied.keep_RC.copy_(tiers.keep_RC)
    return copied


def _extra_memory(weight: Tensor, scores: Scored, start: TierMap) -> float:
    """Peak memory beyond the matrix and the masks it began with, over the matrix's bytes."""
    gc.collect()
    tiers = _copy(start, weight)
    if weight.is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        demote({"m": scores}, {"m": tiers}, AFTER)
        return (torch.cuda.max_memory_allocated() - before) / weight.nbytes
    before = resident_now()
    demote({"m": scores}, {"m": tiers}, AFTER)
    return (resident_peak() - before) / weight.nbytes


def _loop(weight: Tensor, norms: Tensor, tiers: TierMap) -> None:
    """The same iteration, one block after the other; inside a block it uses tensor operations too."""
    scored: dict[int, list[tuple[float, int, int]]] = {0: [], 1: []}
    rows, columns = tiers.map_rc.shape
    dense, _, topk = AFTER.counts(rows * columns)
    old = tiers.map_rc.tolist()

    def cut(i: int, j: int) -> tuple[Tensor, Tensor]:
        down, across = slice(i * BLOCK, (i + 1) * BLOCK), slice(j * BLOCK, (j + 1) * BLOCK)
        return weight[down, across].abs() * norms[across], tiers.keep_RC[down, across]

    def score(i: int, j: int) -> tuple[float, int, int]:
        values, keep = cut(i, j)
        return values[keep].mean().item(), i, j

    for i in range(rows):
        for j in range(columns):
            if old[i][j] < 2:
                scored[old[i][j]].append(score(i, j))
    for _, i, j in sorted(scored[0])[: len(scored[0]) - dense]:
        values, keep = cut(i, j)
        best = values.view(-1, 4).topk(2).indices
        keep.copy_(torch.zeros(BLOCK * BLOCK // 4, 4, dtype=torch.bool).scatter_(1, best, True).view(BLOCK, BLOCK))
        scored[1].append(score(i, j))
    for _, i, j in sorted(scored[1])[:topk]:
        values, keep = cut(i, j)
        best = values.masked_fill(~keep, -1).flatten().topk(K).indices
        keep.copy_(torch.zeros(BLOCK * BLOCK, dtype=torch.bool).scatter_(0, best, True).view(BLOCK, BLOCK))


def main() -> None:
    """Measure on the GPU if there is one, else on the CPU, and print JSON lines: demotion, then every product."""
    size, repeats = int(sys.argv[1]), int(sys.argv[2])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sizes = {name: SEVEN_B[name] * size // SIZE for name in ("hidden", "mlp")}  # smaller for a trial
    layer = iteration(device, sizes["hidden"] // BLOCK * BLOCK, sizes["mlp"] // BLOCK * BLOCK, SEVEN_B["tokens"])
    first = {"demotion": demotion(size, repeats, device), "iteration": layer}
    print(json.dumps({"device": device.type, **first}), flush=True)
    for product in products(size, list(WHAT), repeats, device):
        print(json.dumps({"device": device.type, **product}), flush=True)


if __name__ == "__main__":
    main()
