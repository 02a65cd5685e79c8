"""What this process runs on, without measuring anything: processor, memory, GPUs, versions, git state.

No host name, user name or path is collected: records are meant to be published.
"""

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

PACKAGES = ("torch", "lightning", "transformers", "datasets", "tokenizers", "peft", "triton", "numpy")
# Instruction sets that decide which CPU kernels torch picks; the rest of /proc/cpuinfo is noise here.
ISA_FLAGS = (
    *("avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16"),
    *("amx_tile", "amx_bf16", "amx_fp16", "amx_int8", "asimd", "sve"),
)


def version(package: str) -> str | None:
    """Installed version of a distribution, or None when it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def versions() -> dict[str, str | None]:
    """Python and package versions; None for what is not installed."""
    return {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}


def _cpuinfo() -> dict[str, str]:
    """First processor's block of /proc/cpuinfo; empty where there is none."""
    try:
        first = Path("/proc/cpuinfo").read_text().split("\n\n", 1)[0]
    except OSError:
        return {}
    pairs = (line.partition(":") for line in first.splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def cpu_name() -> str | None:
    """Marketing name of the CPU, or None when the system does not say."""
    return _cpuinfo().get("model name") or platform.processor() or None


def isa_flags() -> list[str]:
    """The instruction sets of `ISA_FLAGS` that this CPU has."""
    info = _cpuinfo()
    present = set((info.get("flags") or info.get("Features") or "").split())
    return [flag for flag in ISA_FLAGS if flag in present]


def usable_cores() -> int | None:
    """Logical cores this process may run on (its affinity mask, which containers and schedulers narrow)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def gpus() -> list[dict[str, Any]]:
    """Name, memory (GB, 1e9 bytes) and compute capability of each visible CUDA device."""
    import torch  # takes seconds, which those who only read records need not wait

    if not torch.cuda.is_available():
        return []
    properties = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return [
        {"name": p.name, "memory_gb": round(p.total_memory / 1e9, 2), "capability": f"{p.major}.{p.minor}"}
        for p in properties
    ]


def identity() -> dict[str, Any]:
    """The machine as a run record embeds it. Costs milliseconds.

    Returns:
        cpu, isa, cores_logical, cores_physical, cores_usable, torch_threads, ram_gb (1e9 bytes), gpus, cuda
        (version torch was built for), os. Values the system does not reveal are None.
    """
    import torch

    return {
        "cpu": cpu_name(),
        "isa": isa_flags(),
        "cores_logical": psutil.cpu_count(logical=True),
        "cores_physical": psutil.cpu_count(logical=False),
        "cores_usable": usable_cores(),
        "torch_threads": torch.get_num_threads(),
        "ram_gb": round(psutil.virtual_memory().total / 1e9, 2),
        "gpus": gpus(),
        "cuda": torch.version.cuda,
        "os": f"{platform.system()} {platform.release()}",
    }


def _git(root: Path, *args: str) -> str | None:
    """Output of a git command in `root`, or None when git is absent or refuses."""
    # Optional locks off: `git status` would otherwise take index.lock and make a commit elsewhere fail.
    env = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *args], capture_output=True, text=True, env=env, timeout=30, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def git_state(file: Path = Path(__file__)) -> dict[str, str | bool | None]:
    """Commit and dirty flag of the checkout that holds `file`.

    Dirty means: a tracked file differs from the commit, or a Python or YAML file is untracked (a new method is picked
    up by being there). Documents and records, which do not run, and result files lying about do not count.

    Args:
        file: A source file of the code that ran. When git does not track it (an installed copy inside some other
            checkout, say) both values are None.
    """
    file = file.resolve()
    if _git(file.parent, "ls-files", "--error-unmatch", "--", file.name) is None:
        return {"git_commit": None, "git_dirty": None}
    commit = _git(file.parent, "rev-parse", "HEAD")
    top = _git(file.parent, "rev-parse", "--show-toplevel")
    if commit is None or top is None:
        return {"git_commit": commit, "git_dirty": None}
    changed = _git(
        Path(top), "status", "--porcelain", "--untracked-files=no", "--", ".", ":(exclude)docs", ":(exclude)*.md"
    )
    untracked = _git(Path(top), "ls-files", "--others", "--exclude-standard", "--", "*.py", "*.yaml")
    dirty = None if changed is None or untracked is None else bool(changed or untracked)
    return {"git_commit": commit, "git_dirty": dirty}
