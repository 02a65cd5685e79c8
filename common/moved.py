"""Old names of commands and configurations: whoever still uses one is told the new one."""

import sys
from typing import NoReturn

MODULES = {
    "strategies.side_by_side": "bench.side_by_side",
    "strategies.codec_speed": "bench.experiments.codec_speed",
    "callbacks.block_timing": "bench.experiments.block_speed",
    "lightning_modules.structured_pruning.ablation": "bench.experiments.structured_ablation",
    "lightning_modules.token_pruning.bound": "bench.experiments.prefill_claims",
}
ARGUMENTS = {
    "configs/pretraining/profile_1_rank.yaml": "configs/pretraining/profile.yaml",
    "configs/pretraining/profile_2_ranks.yaml": "configs/pretraining/profile.yaml --trainer.devices 2",
    **{
        f"configs/structured_pruning/{old}.yaml": f"configs/structured_pruning/{new}.yaml --model.output FOLDER"
        for old, new in {"export": "prune", "original_export": "original", "llama3_8b_export": "llama3_8b"}.items()
    },
    "--into": "a comment in the document that says how the table is made, and `python -m bench table`",
}


def hint(arguments: list[str]) -> str:
    """A line for every argument that is an old name; "" without any."""
    old = [(name, new) for name, new in ARGUMENTS.items() if any(word.endswith(name) for word in arguments)]
    return "".join(f"\n{name} is now: {new}" for name, new in old)


def stop(module: str) -> NoReturn:
    """End the program that was started by an old name."""
    sys.exit(f"python -m {module} is now: python -m {MODULES[module]}")
