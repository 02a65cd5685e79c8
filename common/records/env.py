"""Environment check: what is installed, what the machine can do, and what really runs when tried."""

import configparser
import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from importlib import metadata
from pathlib import Path
from types import MappingProxyType
from typing import Any
from unittest import mock

import psutil
import torch
import torch.distributed as dist
from packaging.requirements import Requirement
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.benchmark import Timer

from common.measure.peaks import peak_flops
from common.records import machine
from common.tables import Table

_SETUP = Path(__file__).resolve().parents[2] / "setup.cfg"
_MEASURE_S = 0.5
_ATTENTION = {
    "math": SDPBackend.MATH,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}


def devices() -> list[torch.device]:
    """The CPU and every visible GPU."""
    return [torch.device("cpu"), *(torch.device("cuda", i) for i in range(torch.cuda.device_count()))]


def requirements(setup: Path = _SETUP) -> dict[str, list[str]]:
    """Unmet requirements by extra, "" for what Pare always needs; extras with nothing missing have an empty list.

    Args:
        setup: The setup.cfg that declares them.

    Raises:
        FileNotFoundError: There is no such file (Pare runs from a checkout).
    """
    parser = configparser.ConfigParser()
    parser.read_string(setup.read_text())
    declared = {"": parser.get("options", "install_requires", fallback="")}
    if parser.has_section("options.extras_require"):
        declared.update(parser.items("options.extras_require"))
    own = parser.get("metadata", "name", fallback="")
    return {extra: [r for r in text.split("\n") if r.strip() and not _met(r, own)] for extra, text in declared.items()}


def _met(line: str, own: str) -> bool:
    requirement = Requirement(line)
    if requirement.name == own:  # an extra that includes another extra, which is listed itself
        return True
    try:
        installed = metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        return False
    return requirement.specifier.contains(installed, prereleases=True)


def _attempt(trial: Callable[[], object]) -> str:
    """ "ok", or why the trial failed: the error, and the warnings in which torch gives its reasons."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            trial()
        except Exception as error:  # whatever goes wrong here is the finding
            reasons = [str(error).strip().split("\n")[0], *(str(w.message).split(" (Triggered")[0] for w in caught)]
            return f"{type(error).__name__}: " + "; ".join(dict.fromkeys(reasons))
    return "ok"


def attention() -> list[dict[str, str]]:
    """Each attention kernel tried on each device, causal, [1, 4, 64, 64], against float32 arithmetic.

    Returns:
        device, kernel, dtype, and result: "ok" or the reason it does not run.
    """
    rows = []
    for device in devices():
        for dtype in (torch.float32, torch.bfloat16):
            for name, backend in _ATTENTION.items():
                result = _attempt(partial(_attend, device, dtype, backend))
                rows.append({"device": str(device), "kernel": name, "dtype": str(dtype)[6:], "result": result})
    return rows


def _attend(device: torch.device, dtype: torch.dtype, backend: SDPBackend) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 4, 64, 64, generator=generator).to(device, dtype) for _ in range(3))
    with sdpa_kernel([backend]):
        result = scaled_dot_product_attention(query, key, value, is_causal=True).float()
    scores = query.double() @ key.double().transpose(-1, -2) / 8
    hidden = torch.ones(64, 64, device=device, dtype=torch.bool).triu(1)
    exact = scores.masked_fill(hidden, -torch.inf).softmax(-1) @ value.double()
    torch.testing.assert_close(result.double(), exact, rtol=0.03, atol=0.03)


def speeds() -> list[dict[str, Any]]:
    """Measured matrix multiplication and copy rates of each device, each over about half a second.

    Returns:
        device, cpu_threads, matmul_gflops_fp32, matmul_gflops_bf16 (square matrices), copy_gb_per_s (bytes read plus
        bytes written, buffers beyond the caches), peak_tflops_fp32 and peak_tflops_bf16 (dense, datasheet, or None).
    """
    rows = []
    for device in devices():
        # a timer waits for the current device alone
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            rows.append(_speeds_of(device))
    return rows


def _speeds_of(device: torch.device) -> dict[str, Any]:
    """A row of ``speeds``."""
    on_cpu = device.type == "cpu"
    row: dict[str, Any] = {"device": str(device), "cpu_threads": torch.get_num_threads()}
    size = 1024 if on_cpu else 8192
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        row[f"matmul_gflops_{name}"] = 2 * size**3 / _seconds(torch.mm, a, b) / 1e9
        peak = peak_flops(device, dtype)
        row[f"peak_tflops_{name}"] = None if peak is None else peak / 1e12
    source = torch.ones(2**26 if on_cpu else 2**28, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    row["copy_gb_per_s"] = 2 * source.nbytes / _seconds(target.copy_, source) / 1e9
    return row


def _seconds(function: Callable, *arguments: torch.Tensor) -> float:
    """Median seconds of a call, warmed up, with the device synchronised."""
    function(*arguments)
    names = {f"x{i}": argument for i, argument in enumerate(arguments)}
    timer = Timer(f"f({', '.join(names)})", globals={"f": function, **names}, num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=_MEASURE_S).median


def distributed() -> dict[str, bool]:
    """Which torch.distributed backends this build of torch has."""
    if not dist.is_available():
        return dict.fromkeys(("gloo", "nccl", "mpi"), False)
    return {"gloo": dist.is_gloo_available(), "nccl": dist.is_nccl_available(), "mpi": dist.is_mpi_available()}


def compilers(full: bool) -> dict[str, str | None]:
    """The C++ compiler torch.compile would use on the CPU, Triton's version, and with `full` whether compiling works.

    Returns:
        cxx: path or None; triton: version or None; with `full` also compile DEVICE: "ok" with seconds, or the error.
    """
    found: dict[str, str | None] = {"cxx": shutil.which(os.environ.get("CXX", "g++"))}
    found["triton"] = machine.version("triton")
    if full:
        for device in devices():
            begin = time.monotonic()
            result = _attempt(partial(_compile, device))
            seconds = f" ({time.monotonic() - begin:.0f} s)" if result == "ok" else ""
            found[f"compile {device}"] = result + seconds
    return found


def _compile(device: torch.device) -> None:
    """Compile for real: with an empty cache, as on a new machine."""
    torch.compiler.reset()
    x = torch.linspace(-1, 1, 1000, device=device)
    with tempfile.TemporaryDirectory() as cache, mock.patch.dict(os.environ, TORCHINDUCTOR_CACHE_DIR=cache):
        result = torch.compile(lambda x: (x.sin() + 1).relu().sum())(x)
    torch.testing.assert_close(result, (x.sin() + 1).relu().sum())


def check(full: bool = False, trials: Mapping[str, Callable[[], str | None]] = MappingProxyType({})) -> dict[str, Any]:
    """Everything the environment check reports.

    Args:
        full: Also compile a function for each device, which takes 10 s and more.
        trials: What else to try, by name; each returns what is in the way, or None.
    """
    missing = requirements()
    return {
        "versions": machine.versions(),
        "missing": missing.pop(""),
        "missing_extras": {extra: names for extra, names in missing.items() if names},
        "machine": machine.identity(),
        "ram_available_gb": psutil.virtual_memory().available / 1e9,
        "disk_free_gb": shutil.disk_usage(Path.cwd()).free / 1e9,
        "speeds": speeds(),
        "attention": attention(),
        "distributed": distributed(),
        "compilers": compilers(full),
        "trials": {name: trial() or "ok" for name, trial in trials.items()},
    }


def tables(report: Mapping[str, Any]) -> list[Table]:
    """The report of `check` for people."""
    facts = {key: "none" if value is None else value for key, value in report["machine"].items()}
    facts["gpus"] = [f"{gpu['name']} ({gpu['memory_gb']} GB)" for gpu in report["machine"]["gpus"]]
    facts |= {"ram_available_gb": report["ram_available_gb"], "disk_free_gb": report["disk_free_gb"]}
    versions = {name: version or "not installed" for name, version in report["versions"].items()}
    runs = {f"backend {name}": "available" if ok else "not in this build" for name, ok in report["distributed"].items()}
    runs |= {name: value or "not found" for name, value in report["compilers"].items()}
    runs |= report["trials"]
    needs = {"required": ", ".join(report["missing"]) or "all installed"}
    for extra, names in report["missing_extras"].items():
        needs[f"optional: {extra}"] = f"missing {', '.join(names)}: pip install -e '.[{extra}]'"
    rates = [["unknown" if value is None else value for value in row.values()] for row in report["speeds"]]
    kernels = [list(row.values()) for row in report["attention"]]
    return [
        Table(["package", "version"], list(versions.items()), "versions"),
        Table(["requirement", "state"], list(needs.items()), "requirements"),
        Table(["", "value"], list(facts.items()), "machine"),
        Table(list(report["speeds"][0]), rates, "measured speed").transposed(),
        Table(list(report["attention"][0]), kernels, "attention kernels, really run"),
        Table(["", "state"], list(runs.items()), "runs here"),
    ]
