"""Peak arithmetic rate of a device, dense (no 2:4 sparsity), from datasheets."""

import re
import warnings

import torch

# Dense FLOP/s by name (a regular expression in lower case; the first match wins), bfloat16 and float16 accumulated in
# float32, from NVIDIA's datasheets and, of GeForce, whitepapers (Ada, GA102). Lightning's table gives H200 and H100 NVL
# their rates with sparsity, twice the dense ones, takes L40 and L40S for L4, and has of the others what they do without
# tensor cores.
_DENSE: dict[str, dict[torch.dtype | str, float]] = {
    "h200 nvl": {torch.bfloat16: 835.5e12, torch.float16: 835.5e12, "tfloat32": 417.5e12, torch.float32: 60e12},
    "h200": {torch.bfloat16: 989.5e12, torch.float16: 989.5e12, "tfloat32": 494.5e12, torch.float32: 67e12},
    "h100 nvl": {torch.bfloat16: 835.5e12, torch.float16: 835.5e12, "tfloat32": 417.5e12, torch.float32: 60e12},
    r"\bl40s$": {torch.bfloat16: 362e12, torch.float16: 362e12, "tfloat32": 183e12, torch.float32: 91.6e12},
    r"\bl40$": {torch.bfloat16: 181e12, torch.float16: 181e12, "tfloat32": 90.5e12, torch.float32: 90.5e12},
    r"\brtx 4090$": {torch.bfloat16: 165.2e12, torch.float16: 165.2e12, "tfloat32": 82.6e12, torch.float32: 82.6e12},
    r"\brtx 3090$": {torch.bfloat16: 71e12, torch.float16: 71e12, "tfloat32": 35.6e12, torch.float32: 35.6e12},
    r"\brtx a6000$": {torch.bfloat16: 154.8e12, torch.float16: 154.8e12, "tfloat32": 77.4e12, torch.float32: 38.7e12},
    r"\ba40$": {torch.bfloat16: 149.7e12, torch.float16: 149.7e12, "tfloat32": 74.8e12, torch.float32: 37.4e12},
}
# Those of Lightning's that are the dense rates of their datasheets.
_TRUSTED = r"\b(h100|a100|v100s?|l4|t4|quadro rtx 5000)\b"
_PART = " mig "  # of a GPU: the name is the whole one's


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Peak dense matrix-multiplication rate in FLOP/s.

    Args:
        device: A device that is present.
        dtype: Element type; float32 means TF32 where `torch.set_float32_matmul_precision` allows it.

    Returns:
        FLOP/s, or None when no datasheet value is known (always so on a CPU, and of parts of a GPU).
    """
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device).lower()
    tf32 = dtype is torch.float32 and torch.get_float32_matmul_precision() != "highest"
    if _PART in name:
        return None
    for chip, rates in _DENSE.items():
        if re.search(chip, name):
            return rates.get("tfloat32" if tf32 else dtype)
    if not re.search(_TRUSTED, name):
        return None
    # Imported here: the rest of the measuring library does not need lightning.
    from lightning.fabric.utilities.throughput import get_available_flops

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns about what the None says
        known = get_available_flops(device, dtype)
    return None if known is None else float(known)
