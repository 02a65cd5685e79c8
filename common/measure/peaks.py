"""Peak arithmetic rate of a device, dense (no 2:4 sparsity), from datasheets."""

import warnings

import torch

# Lightning's table gives these GPUs their rates *with* sparsity, twice the dense ones, and does not recognise the name
# "NVIDIA H200". Dense FLOP/s from NVIDIA's H200 and H100 NVL datasheets; first match wins.
_DENSE = {
    "h200 nvl": {torch.bfloat16: 835.5e12, torch.float16: 835.5e12, "tfloat32": 417.5e12, torch.float32: 60e12},
    "h200": {torch.bfloat16: 989.5e12, torch.float16: 989.5e12, "tfloat32": 494.5e12, torch.float32: 67e12},
    "h100 nvl": {torch.bfloat16: 835.5e12, torch.float16: 835.5e12, "tfloat32": 417.5e12, torch.float32: 60e12},
}


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Peak dense matrix-multiplication rate in FLOP/s.

    Args:
        device: A device that is present.
        dtype: Element type; float32 means TF32 where `torch.set_float32_matmul_precision` allows it.

    Returns:
        FLOP/s, or None when no datasheet value is known (always so on a CPU).
    """
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device).lower()
    tf32 = dtype is torch.float32 and torch.get_float32_matmul_precision() != "highest"
    for chip, rates in _DENSE.items():
        if chip in name:
            return rates.get("tfloat32" if tf32 else dtype)
    # Imported here: the rest of the measuring library does not need lightning.
    from lightning.fabric.utilities.throughput import get_available_flops

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns about what the None says
        known = get_available_flops(device, dtype)
    return None if known is None else float(known)
