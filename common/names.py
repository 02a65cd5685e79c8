"""Names of modules and parameters."""

_WRAPPERS = {"_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod", "_forward_module"}


def clean_name(name: str) -> str:
    """Drop the path components that wrappers (FSDP, checkpointing, compile) add to a module or parameter name."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)
