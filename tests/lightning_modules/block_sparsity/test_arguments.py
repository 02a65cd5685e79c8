"""What is refused, and that it is before any work."""

import lightning.pytorch as L
import pytest
import torch

from tests.lightning_modules.block_sparsity.runs import data_of, fit, module_of
from tests.lightning_modules.block_sparsity.toy import batches

CPU = torch.device("cpu")


def test_data_without_calibration_text_are_refused_before_the_first_step(dense, tmp_path):
    class Other(L.LightningDataModule):
        def train_dataloader(self):
            return batches(2)

    with pytest.raises(ValueError, match="calibration text, such as TextCorpus, not Other"):
        fit(module_of(dense, tmp_path / "out"), "", tmp_path, data=Other())


@pytest.mark.parametrize(
    ("limits", "names"),
    [
        ({"max_epochs": 7}, "max_epochs is 7, but the schedule has 3 epochs"),
        ({"max_steps": 6}, "max_steps 6 ends before iteration 3 begins, after step 6"),
    ],
)
def test_limits_that_contradict_the_schedule_are_refused(limits, names, dense, data_cache, tmp_path):
    with pytest.raises(ValueError, match=names):
        fit(module_of(dense, tmp_path / "out"), data_cache, tmp_path, **limits)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ({"block": 64, "topk": 10}, "smaller than a block"),
        ({"calibration_blocks": 10_000}, "calibration_blocks"),
    ],
)
def test_what_is_wrong_is_named(arguments, names, dense, data_cache, tmp_path):
    with pytest.raises(ValueError, match=names):
        module_of(dense, tmp_path / "x", **arguments).prune(data_of(data_cache), CPU)


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ({"iteration": 4}, "1 to 3"),
        ({"iteration": 0}, "1 to 3"),
        ({"topk": 25}, "between 1 and 24 of the 64 weights"),
        ({"topk": "auto"}, "topk auto needs target_bits"),
        ({"target_bits": 1.0}, "target_bits must be between"),
        ({"target_bits": 17.0}, "target_bits must be between"),
        ({"target_bits": 12.0, "export_dtype": "int8"}, r"target_bits must be between .* and 10\.031"),
        ({"target_bits": 9.0, "export_bands": True}, "needs scope band"),
        ({"target_bits": 9.0, "pattern": "2:4"}, "pattern 2:4 has none"),
        ({"block": 6}, "multiple of 4"),
        ({"distill_weight": 2}, "distill_weight"),
        ({"row_relative": True, "matrix_relative": True}, "cannot both be true"),
        ({"calibration_blocks": 0}, "calibration_blocks must be at least 1"),
        ({"lora_rank": 0}, "lora_rank must be at least 1"),
        ({"reconstruction_steps": -1}, "reconstruction_steps must be at least 0"),
        ({"reconstruction_lr": 0.0}, "reconstruction_lr must be above 0"),
        ({"iteration_lr_factor": float("nan")}, "iteration_lr_factor must be above 0"),
        ({"budget": "band"}, r"now called model\.scope"),
    ],
)
def test_arguments_are_refused_before_anything_is_read(arguments, names, tmp_path):
    with pytest.raises(ValueError, match=names):
        module_of(tmp_path / "no model here", tmp_path / "x", **arguments)


def test_nothing_to_export_or_verify_is_said_before_anything_is_loaded(fitted, dense, tmp_path):
    pruned = fitted[2] / "out"
    with pytest.raises(FileNotFoundError, match="tier maps"):
        module_of(dense, tmp_path / "x").check_arguments("export", None)
    with pytest.raises(FileNotFoundError, match="no packed model"):
        module_of(pruned, tmp_path / "x").check_arguments("verify", None)
    module_of(pruned, tmp_path / "x").check_arguments("validate", None)
    with pytest.raises(FileNotFoundError, match="no teacher here"):
        module_of(dense, tmp_path / "x", teacher=str(tmp_path / "no teacher here")).check_arguments("fit", None)
    with pytest.raises(FileNotFoundError, match="no model here"):
        module_of(tmp_path / "no model here", tmp_path / "x").check_arguments("prune", None)


def test_tier_maps_that_are_none_are_refused_though_others_lie_beside_the_model(dense, tmp_path):
    (tmp_path / "pruned").mkdir()
    for name in ("config.json", "tiers.map"):
        (tmp_path / "pruned" / name).write_bytes((dense / name).read_bytes() if (dense / name).exists() else b"maps")
    with pytest.raises(FileNotFoundError, match="is or has no tier maps"):
        module_of(tmp_path / "pruned", tmp_path / "x", tier_maps=str(tmp_path / "wrong")).check_arguments("prune", None)
