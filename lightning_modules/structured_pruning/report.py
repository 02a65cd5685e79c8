"""What pruning does to a model, as a table for people and as fields for records."""

import itertools
from collections.abc import Sequence
from typing import Any

from rich.table import Table

from lightning_modules import card as cards
from lightning_modules.structured_pruning.layers import LayerShape
from lightning_modules.structured_pruning.model_shape import ModelShape
from lightning_modules.structured_pruning.plan import LayerPlan, PruningPlan


def layer_fields(shapes: Sequence[LayerShape], kept: Sequence[LayerPlan]) -> list[dict[str, int]]:
    """One entry a layer: groups and channels, all and kept."""
    return [
        {
            "layer": i,
            "groups": shape.groups,
            "groups_kept": len(layer.groups),
            "channels": shape.channels,
            "channels_kept": len(layer.channels),
        }
        for i, (shape, layer) in enumerate(zip(shapes, kept, strict=True))
    ]


def structure(
    whole: ModelShape, plan: PruningPlan, block_size: int, perplexity_on: str, measured: dict[str, Any]
) -> dict[str, Any]:
    """The record's block: layers, costs before and after, where the plan comes from, and what was measured.

    ``budget_requested`` and ``budget_obtained`` are parameters removed.
    """
    before, after = whole.footprint(block_size), whole.footprint(block_size, plan.layers)
    return {
        "layers": layer_fields(whole.shapes, plan.layers),
        **before.fields("before"),
        **after.fields("after"),
        "block_size": block_size,
        "perplexity_on": perplexity_on,
        "importance": plan.settings.get("importance", {}).get("name"),
        "shape": plan.settings.get("shape", "free"),
        "allocation": plan.settings.get("allocation", {}).get("name"),
        "compensation": plan.settings.get("compensation", {}).get("name"),
        "budget_requested": plan.settings.get("parameters_requested"),
        "budget_obtained": before.parameters - after.parameters,
        "settings": plan.settings,
        **measured,
    }


def count_biases(fields: dict[str, Any], model: Any) -> None:
    """Count what a compensation has added to what the plan keeps: output biases.

    Args:
        fields: What ``structure`` gave; changed in place.
        model: The pruned model.
    """
    more = model.num_parameters() - fields["parameters_after"]
    for name in ("parameters_after", "decoder_parameters_after"):
        fields[name] += more
    for name in ("weight_bytes_after", "export_bytes_after"):
        fields[name] += more * fields["weight_bytes_before"] // fields["parameters_before"]
    fields["budget_obtained"] -= more


def table(base: str, fields: dict[str, Any]) -> Table:
    """Costs and perplexity before and after; what is not known yet is left out."""
    block = fields["block_size"]
    shown = Table(title=f"{base}: what is kept", title_style="")
    for column in ("what", "before", "after", "kept"):
        shown.add_column(column, justify="left" if column == "what" else "right")
    rows = {
        "parameters": ("parameters of the model", 1, "{:,.0f}"),
        "decoder_parameters": ("parameters of the decoder", 1, "{:,.0f}"),
        "kv_bytes_per_token": ("KV cache per token, bytes", 1, "{:,.0f}"),
        "flops_per_token": (f"MFLOP per token at {block} tokens", 1e6, "{:,.2f}"),
        "weight_bytes": ("weights on disk, MB", 1e6, "{:,.2f}"),
        "export_bytes": (f"{'its' if fields.get('shape') == 'stock' else 'padded'} stock export, MB", 1e6, "{:,.2f}"),
        "ppl": (f"perplexity ({fields['perplexity_on']})", 1, "{:.2f}"),
    }
    for name, (what, unit, form) in rows.items():
        old, new = (fields.get(f"{name}_{when}") for when in ("before", "after"))
        if old is not None and new is not None:
            shown.add_row(what, form.format(old / unit), form.format(new / unit), f"{new / old:.1%}")
    return shown


def trials_table(trials: Sequence[dict[str, Any]], part: str = "") -> Table:
    """Shapes that were tried, and their losses; the best is marked: after a refit, where any was tried so.

    Args:
        trials: Those of a plan's settings.
        part: Which of several rounds they are of, for the title.
    """
    shown = Table(title=f"shapes that remove the budget, nats a token, tried by masks{part}", title_style="")
    for column in ("groups", "channels", "layers dropped", "by masks", "refitted", ""):
        shown.add_column(column, justify="left" if column in ("layers dropped", "") else "right")
    by = "refitted" if any(trial.get("refitted") is not None for trial in trials) else "loss"
    least = min(trial[by] for trial in trials if trial[by] is not None)
    for trial in trials:
        dropped = ", ".join(map(str, trial["dropped"])) or "none"
        again = trial.get("refitted")
        cells = (f"{trial['loss']:.4f}", "" if again is None else f"{again:.4f}", "best" * (trial[by] == least))
        shown.add_row(str(trial["groups"]), str(trial["channels"]), dropped, *cells)
    return shown


def layer_table(layers: Sequence[dict[str, int]]) -> Table:
    """Kept groups and channels of each layer, with bars; one row for layers that follow each other and are alike."""
    shown = Table(title="layer by layer", title_style="")
    for column in ("layer", "groups", "", "channels", " "):
        shown.add_column(column, justify="right" if column in ("layer", "groups", "channels") else "left")
    for _, alike in itertools.groupby(layers, key=lambda entry: [n for name, n in entry.items() if name != "layer"]):
        first, *others = alike
        cells = [f"{first['layer']} – {others[-1]['layer']}" if others else str(first["layer"])]
        for kind in ("groups", "channels"):
            kept, of = first[f"{kind}_kept"], first[kind]
            bar = round(12 * kept / of)
            cells += [f"{kept}/{of}", "█" * bar + "░" * (12 - bar)]
        shown.add_row(*cells)
    return shown


def refit_table(compensation: dict[str, Any], part: str = "") -> Table:
    """How much of what each matrix should give was lost by slicing, and is lost once it is refitted.

    Args:
        compensation: That of a plan's settings, see ``refitting.compensate``.
        part: See ``trials_table``.
    """
    shown = Table(title=f"error by {compensation['name']}, share of what should be given{part}", title_style="")
    for column in ("layer", "matrix", "sliced", "refitted", "setting"):
        shown.add_column(column, justify="left" if column == "matrix" else "right")
    for fit in compensation["fits"]:
        setting = "" if fit["setting"] is None else f"{fit['setting']:g}"
        shown.add_row(str(fit["layer"]), fit["matrix"], f"{fit['left']:.2%}", f"{fit['refitted']:.2%}", setting)
    return shown


def memory_table(peaks: dict[str, int]) -> Table:
    """Most memory that each step takes, by arithmetic.

    Args:
        peaks: Bytes by step, see ``memory.peaks``.
    """
    shown = Table(title="memory at the peak of each step, by arithmetic", title_style="")
    shown.add_column("step")
    shown.add_column("GB", justify="right")
    for step, size in peaks.items():
        shown.add_row(step, f"{size / 1e9:,.3g}")
    return shown


def card(base: str, dataset: str | None, fields: dict[str, Any], config: Any) -> str:
    """Model card of the pruned folder.

    Args:
        base: The model that was pruned.
        dataset: Name of the text that perplexity was measured on.
        fields: The record's ``structure``.
        config: The pruned model's configuration.
    """
    after = fields.get("ppl_after")
    rows = {
        "perplexity before": f"{fields['ppl_before']:.3f}",
        "perplexity after, not recovered": "not measured" if after is None else f"{after:.3f}",
        "parameters": f"{fields['parameters_after']:,} of {fields['parameters_before']:,}",
        "decoder parameters": f"{fields['decoder_parameters_after']:,} of {fields['decoder_parameters_before']:,}",
        "KV bytes per token": f"{fields['kv_bytes_per_token_after']:,} of {fields['kv_bytes_per_token_before']:,}",
        "importance, allocation": f"{fields['importance']}, {fields['allocation'] or 'one width for all layers'}",
        "compensation": fields["compensation"],
        "perplexity measured on": f"{dataset}, {fields['perplexity_on']}",
    }
    plain = not str(fields.get("model_class", "PerLayer")).startswith("PerLayer")
    what = f"Kept layers are alike, so this is a plain {fields['model_class']}" if plain else "Layers differ in shape"
    text = (
        f"Whole groups of heads, MLP channels or layers are gone. {what}. `pruning_plan.json` says what is left.\n\n"
        f"{cards.usage(config)}\n{cards.table(rows)}"
    )
    return cards.card(f"{cards.short(base)}, structurally pruned", text, base, ["pruned"])
