"""What tests of Triton kernels share: an interpreter in a process of its own, and what kernels compile to."""

import multiprocessing
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

ARCHITECTURES = (80, 90, 100)  # A100, H100 and H200, B200


@contextmanager
def interpreting() -> Iterator[Callable[..., Any]]:
    """Calls functions in a process that interprets kernels: triton settles that when it is first imported."""
    with pytest.MonkeyPatch.context() as patch, ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        patch.setenv("TRITON_INTERPRET", "1")  # not by an initializer: to unpickle one is to import its module
        assert pool.submit(os.getenv, "TRITON_INTERPRET").result() == "1"  # the process has started
        patch.undo()
        yield lambda function, *args: pool.submit(function, *args).result()


class Launches:
    """In place of a kernel: the devices that it would have been launched on, None where nobody chose one."""

    def __init__(self) -> None:
        self.current: Any = None
        self.launched_on: list[Any] = []

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return lambda *args, **options: self.launched_on.append(self.current)

    @contextmanager
    def device_of(self, tensor: Any) -> Iterator[None]:
        """In place of ``torch.cuda.device_of``."""
        self.current = tensor.device
        yield
        self.current = None


def compiled(
    kernel: Any, types: Mapping[str, str], constants: Mapping[str, Any], options: Mapping[str, Any], sm: int = 90
) -> tuple[list[str], int]:
    """Instructions of a kernel for an architecture, but for padding, and the registers of a thread.

    Pointers, and whole numbers called "…stride", "inputs" or "outputs" that the kernel is specialised on, are taken to
    be multiples of 16. Raises if it spills registers.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {arg: "constexpr" if arg in constants else types[arg] for arg in kernel.arg_names}
    aligned = [
        i
        for i, arg in enumerate(kernel.arg_names)
        if (signature[arg].startswith("*") or "stride" in arg or arg in ("inputs", "outputs"))
        and not kernel.params[i].do_not_specialize
    ]
    attributes = {(i,): [["tt.divisibility", 16]] for i in aligned}
    source = ASTSource(fn=kernel, signature=signature, constexprs=dict(constants), attrs=attributes)
    built = triton.compile(source, target=GPUTarget("cuda", sm, 32), options=dict(options))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        usage, code = (
            subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout
            for option in ("-res-usage", "-sass")
        )
    registers, stack = (int(value) for value in re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    operations = re.findall(r"/\*[0-9a-f]{4,5}\*/\s+(?:@!?U?P\d+ )?([A-Z][\w.]*)", code)
    useful = [operation for operation in operations if operation != "NOP"]
    assert stack == 0 and not [operation for operation in useful if operation.startswith(("LDL", "STL"))]  # no spills
    return useful, registers
