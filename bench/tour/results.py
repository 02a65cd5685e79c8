"""The tour's table: what each method costs and saves, read off the records that its steps left."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.network import bounds
from common.records import record
from common.tables import Table, percent

Record = Mapping[str, Any]
Row = list[str | None]
HEADERS = ("method", "quality", "saving", "measured speed", "bound")
_TOKENS = "token pruning"
_INT8 = "export_dtype: int8"  # of a pack that is not the model whose perplexity was measured


def table(folder: Path) -> Table:
    """A row for every method that left what it takes.

    Args:
        folder: With the records, .jsonl.
    """
    records = [one for path in sorted(folder.glob("*.jsonl")) for one in record.read(path)[0]]
    runs = [one for one in records if one.get("kind", "run") == "run"]
    runs.sort(key=lambda one: str(one.get("date", "")))
    rows = [row for part in _PARTS for row in part(runs)]
    return Table(HEADERS, rows, "what each method costs and saves")


def _newest(runs: Sequence[Record], field: str, name: str | None = None) -> Any:
    """A field of the last record that has it; they stand by date."""
    found = [one[field] for one in runs if one.get(field) and name in (None, one.get("run_name"))]
    return found[-1] if found else None


# ---- one function a feature ------------------------------------------------------------------------------------------


def _gradients(runs: Sequence[Record]) -> list[Row]:
    by_method = {one["axes"]["method"]: one for one in runs if one.get("axes", {}).get("method")}
    plain = by_method.pop("none", None)
    if plain is None:
        return []
    limit = bounds.bounds(plain, runs).best_speedup
    before, where = _step_ms(plain), plain.get("link_rate")
    rows: list[Row] = []
    for method, one in by_method.items():
        after, sent, ideal = _step_ms(one), bounds.sent_per_step(one), bounds.sent_per_step(plain)
        how = "" if one.get("link_emulated") else ", modelled"
        rows.append(
            [
                f"{method} gradients and parameters, {where}",
                _change("perplexity", plain.get("val_ppl"), one.get("val_ppl")),
                None if not sent or not ideal else f"{ideal / sent:.1f} × fewer bytes sent",
                None if not before or not after else f"step {before / after:.2f} ×{how}",
                _times(limit),
            ]
        )
    return rows


def _step_ms(one: Record) -> float | None:
    return one.get("step_time_ms_modelled") if one.get("link_emulated") is False else one.get("step_time_ms_p50")


def _tokens(runs: Sequence[Record]) -> list[Row]:
    """The trained or calibrated pruner, and chance at the same budget."""
    rows = _newest(runs, "token_quality") or []
    arms = [arm for arm in (_newest(runs, "prefill") or {}).get("arms", []) if arm["arm"] == "pruned"]
    longest: Record = max(arms, key=lambda arm: arm["length"], default={})
    speed = None if not longest else f"prefill of {longest['length']:,} tokens {longest['speedup']:.2f} ×"
    bound = _times(longest.get("bound"))
    asked = [row for row in rows if row["scorer"].startswith("calibrated")]
    if asked:
        row = asked[0]
        return [
            [
                f"{_TOKENS}, calibrated",
                _kept(row["kept_right"], row["whole_right"], _chance(runs)),
                f"cache {_share(row['kv_share'])} of the unpruned",
                speed,
                bound,
            ]
        ]
    learned = [row for row in rows if row["keep"] is not None and row["scorer"] == "mlp"]
    if not learned:
        return []
    row = min(learned, key=lambda one: one["keep"])
    whole = next(one["accuracy"] for one in rows if one["keep"] is None)
    chance = next((o["accuracy"] for o in rows if o["scorer"] == "random" and o["keep"] == row["keep"]), None)
    said = f"{_share(row['accuracy'])} of answers right ({_share(whole)} unpruned, {_share(chance)} by chance)"
    return [[f"{_TOKENS}, trained scorer", said, f"{_share(row['kept'])} of the tokens kept", speed, bound]]


def _chance(runs: Sequence[Record]) -> float | None:
    """Answers kept by random scores and the chosen schedule, where that was tried."""
    tried = (_newest(runs, "calibration") or {}).get("tried", [])
    return next((row.get("kept") for row in tried if row.get("scorer") == "random"), None)


def _kept(share: float | None, of: int, chance: float | None) -> str:
    beside = "" if chance is None else f", by chance {_share(chance)}"
    return f"{_share(share)} of {of} right answers stay{beside}"


def _structure(runs: Sequence[Record]) -> list[Row]:
    pruned = _newest([one for one in runs if (one.get("structure") or {}).get("ppl_before")], "structure")
    if pruned is None:
        return []
    recovered = _newest(runs, "val_ppl", "recover")
    saving = f"{_share(1 - pruned['parameters_after'] / pruned['parameters_before'])} fewer parameters"
    timed = (_newest(runs, "inference") or {}).get("rows", [])
    rows: list[Row] = []
    before = pruned["ppl_before"]
    cut = _change("perplexity", before, pruned["ppl_after"])
    for what, quality in (("cut and refitted", cut), ("recovered", _change("perplexity", before, recovered))):
        if quality is not None:
            rows.append([f"structured pruning, {what}", quality, saving, None, None])
    for row in timed[:2]:
        limit = max(row["flop_bound"], row["byte_bound"])
        said = f"{row['phase']} {row['speedup']:.2f} ×"
        rows[-1][3] = said if rows[-1][3] is None else f"{rows[-1][3]}, {said}"
        rows[-1][4] = _times(limit) if rows[-1][4] is None else f"{rows[-1][4]}, {_times(limit)}"
    return rows


def _tiers(runs: Sequence[Record]) -> list[Row]:
    fits = [one for one in runs if (one.get("tiers") or {}).get("iterations")]
    packed = [one for one in runs if (one.get("tiers") or {}).get("packed_bytes")]
    packs = [one["tiers"] for one in packed if _INT8 not in str(one.get("config"))]
    if not fits:
        return []
    last = fits[-1]
    before = _newest(runs, "val_ppl", "recover")
    zeros = f"{_share(last['tiers']['sparsity'])} of the weights are zero"
    saving = f"{zeros}; files {packs[-1]['packed_ratio']:.2f} × smaller than 16 bits" if packs else zeros
    quality = _change("perplexity", before, last.get("val_ppl"))
    return [["block sparsity, on the recovered model", quality, saving, None, None]]


def _together(runs: Sequence[Record]) -> list[Row]:
    rungs = (_newest(runs, "ladder") or {}).get("rungs", [])
    if not rungs:
        return []
    dense = rungs[0]
    rows: list[Row] = []
    for number, rung in enumerate(rungs[1:], 1):
        quality = f"loss {rung['nll_rise']:+.3f} nats"
        if "right" in rung:
            quality += f", {_share(rung['right'])} of facts ({_share(dense['right'])})"
        phases = [phase for phase in ("prefill", "decode") if f"{phase}_speedup" in rung]
        saving = [f"files {_bits(rung, dense)} bits a weight of dense ({_bits(dense, dense)})"]
        if "kv_bytes" in rung:
            saving.append(f"cache {dense['kv_bytes'] / rung['kv_bytes']:.2f} × smaller")
        rows.append(
            [
                f"together, {'+ ' if number > 1 else ''}{rung['rung']}",
                quality,
                ", ".join(saving),
                ", ".join(f"{phase} {rung[f'{phase}_speedup']:.2f} ×" for phase in phases) or None,
                ", ".join(f"{rung[f'{phase}_bound']:.2f} ×" for phase in phases) or None,
            ]
        )
    return rows


_PARTS: tuple[Callable[[Sequence[Record]], list[Row]], ...] = (_gradients, _tokens, _structure, _tiers, _together)


# ---- words -----------------------------------------------------------------------------------------------------------


def _change(what: str, before: float | None, after: float | None) -> str | None:
    if before is None or after is None:
        return None
    return f"{what} {after:.4g} (before {before:.4g}, {100 * (after / before - 1):+.1f} %)"


def _times(ratio: float | None) -> str | None:
    return None if ratio is None else f"{ratio:.2f} ×"


def _share(share: float | None) -> str:
    return percent(share) or "not recorded"


def _bits(rung: Record, dense: Record) -> str:
    """Bits of files for each weight that the dense model has: types of different width compare."""
    size = rung.get("file_bytes")
    return "not recorded" if size is None else f"{8 * size / dense['parameters']:.1f}"
