"""What a BlockSparsity module does besides training: save, prune once, pack and unpack, compare."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_info

from common.files import inputs_of, replacing, write_text
from common.manifest import CARD
from common.tables import cell
from lightning_modules.block_sparsity.layer_files import layer_folder, remove_layers
from lightning_modules.block_sparsity.lora import plain_state
from lightning_modules.block_sparsity.packed_model import PACKED_FILE, write_model, write_packed
from lightning_modules.block_sparsity.verification import compare
from lightning_modules.card import card, code, short, table, usage, write_card
from lightning_modules.loading import check_vocabulary
from lightning_modules.perplexity import validation_perplexity

if TYPE_CHECKING:
    from lightning_modules.block_sparsity.module import BlockSparsity


def save(module: "BlockSparsity", data: Any) -> None:
    """Write the pruned model, its tokenizer and its tier maps to ``output``, complete or not at all.

    Weights are written as what ``pretrained`` is stored as, and are rounded to it here: what is measured afterwards is
    what was saved. All ranks of a training run call it; the first one writes.
    """
    module.merge()
    with torch.no_grad():
        for weight in module.plain_model.parameters():
            weight.copy_(weight.to(module.stored))
    module.check_masks("before saving")
    with module.whole_model() as model:
        if model is None or module.global_rank:
            return
        with replacing(module.output, "model", inputs_of(module, data), module.overwrite) as folder:
            write_model(folder, model, module.stored)
            data.tokenizer.save_pretrained(folder)
            module.pruner.save(folder)
            write_card(folder, _card(module))
    remove_layers(layer_folder(module.output))
    rank_zero_info(f"saved {module.output}")


def prune(module: "BlockSparsity", data: Any, device: torch.device, dry_run: bool = False) -> dict[str, Any] | None:
    """One iteration without training.

    Args:
        module: The model and how it is pruned.
        data: DataModule with calibration and validation text.
        device: Where to compute.
        dry_run: Only say what would be left.

    Returns:
        What goes into the run record.
    """
    module.check_arguments("prune", data)
    row = module.rows[-1]
    if not dry_run:
        module.calibration(data)  # refuses too few blocks before the weights are read
    module.configure_model()
    check_vocabulary(module.plain_model, data.tokenizer)
    if module.target_bits is None:
        module.pruner.check_target(row.ratios)
        plan = module.pruner.plan(row.ratios, module.export_values, module.export_bands)
    else:
        plan = {"packed_bits_per_weight": module.target_bits}
    print("\n".join(f"{name}: {cell(value)}" for name, value in plan.items()))
    if dry_run:
        return None
    module.start_iteration(row, data, device)
    save(module, data)  # first: whoever stops the measurement has the model
    ppl = validation_perplexity(module.plain_model, data, device=device)
    print(f"validation perplexity: {ppl:.3f}")
    write_text(module.output / CARD, _card(module, {f"perplexity, {data.name}, {data.perplexity_on}": f"{ppl:.3f}"}))
    entry = module.pruner.iteration_result(row.iteration, ppl, module.check_masks("after saving"))
    return {"val_ppl": ppl, **module.pruner.result([entry])}


def export(module: "BlockSparsity", data: Any) -> dict[str, Any]:
    """Pack ``pretrained`` into ``output``; or unpack it into a plain folder, which any engine serves, if it is packed.

    Args:
        module: The pruned model.
        data: DataModule with its tokenizer.

    Returns:
        What goes into the run record.
    """
    module.check_arguments("export", data)
    module.configure_model()
    pruner = module.pruner
    if (module.folder / PACKED_FILE).is_file():
        save(module, data)
        return pruner.result([])
    _need_tiers(module)
    model = module.plain_model
    values = module.export_values
    model.config.dtype = module.stored
    with replacing(module.output, "packed model", inputs_of(module, data), module.overwrite) as folder:
        form = (values, module.export_bands, pruner.iteration)
        sizes = write_packed(folder, model, plain_state(model), pruner.tiers, *form)
        data.tokenizer.save_pretrained(folder)
        write_card(folder, _card(module, sizes=sizes))
    print("\n".join(f"{name}: {cell(value)}" for name, value in sizes.items()))
    planned = pruner.plan(pruner.ratios(), values, module.export_bands)
    return {"tiers": {**pruner.result([])["tiers"], **sizes, "planned": planned}}


def verify(module: "BlockSparsity", data: Any, device: torch.device) -> dict[str, Any]:
    """Prove that the packed ``output`` is the pruned ``pretrained``.

    Args:
        module: The pruned model.
        data: DataModule with validation text.
        device: Where to compute.

    Returns:
        What goes into the run record.

    Raises:
        ValueError: They differ.
    """
    module.check_arguments("verify", data)
    module.configure_model()
    _need_tiers(module)
    report = compare(module.plain_model, module.pruner, module.output, data, device)
    print("\n".join(f"{name}: {value}" for name, value in report.items()))
    return {"tiers": {**module.pruner.result([])["tiers"], "verified": report}}


def _card(
    module: "BlockSparsity", measured: Mapping[str, str] | None = None, sizes: Mapping[str, float] | None = None
) -> str:
    """The folder's model card.

    Args:
        module: The pruned model.
        measured: What is known of its quality.
        sizes: What ``write_packed`` said, where the folder is packed.
    """
    zeros = module.pruner.sparsity()
    rows: dict[str, Any] = {
        "zeros in the decoder's matrices": f"{zeros['sparsity']:.2%}",
        "zeros in the whole model": f"{zeros['model_sparsity']:.2%}",
    }
    if module.pruner.tiers:
        shares = zip(("dense", "2:4", "top-k"), vars(module.pruner.ratios()).values(), strict=True)
        rows["blocks"] = ", ".join(f"{share:.1%} {name}" for name, share in shares)
    if sizes is not None:
        rows["bits per weight of these matrices"] = f"{sizes['packed_bits_per_weight']:.2f}"
        what, load = (
            f"`{PACKED_FILE}` holds the weights that are left.",
            code("from lightning_modules.block_sparsity import load_packed", 'model = load_packed("{here}")'),
        )
    else:
        what, load = "Pruned weights are zeros in a plain model.", usage(module.plain_model.config)
    text = f"Weights are pruned in blocks. {what}\n\n{load}\n{table({**rows, **(measured or {})})}"
    return card(f"{short(module.pretrained)}, block-sparse", text, module.pretrained, ["sparse"])


def _need_tiers(module: "BlockSparsity") -> None:
    if not module.pruner.tiers:
        raise ValueError(f"model.pattern: {module.pruner.pattern} masks have no tiers and cannot be packed")
