"""What a configuration needs on so many ranks, before any of them is there: memory of a rank, bytes of a step."""

import contextlib
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.network import link as links
from bench.planning.absent import Backend, Planned, planned
from callbacks.command_line import PareCLI, started
from callbacks.graceful_stop import stoppable
from common.output import quiet, steady
from common.tables import Table

_LAUNCHED = {"world_size": ("WORLD_SIZE", "SLURM_NTASKS"), "node_size": ("LOCAL_WORLD_SIZE", "SLURM_NTASKS_PER_NODE")}


class _Planned(PareCLI):
    """Reads a configuration of `fit` for other ranks than there are here."""

    world_size = node_size = 1
    accelerator: Any = "auto"

    def instantiate_classes(self) -> None:
        trainer = self.config[self.subcommand].trainer
        type(self).accelerator = trainer.accelerator
        trainer.accelerator, trainer.devices = "cpu", self.node_size
        trainer.num_nodes = self.world_size // self.node_size
        trainer.callbacks, trainer.logger, trainer.enable_checkpointing = None, False, False
        super().instantiate_classes()


class _Vocabulary:
    """Stands for a tokenizer that is made from text: of the size that it will have."""

    bos_token_id = eos_token_id = 0

    def __init__(self, size: int) -> None:
        self._size = size

    def __len__(self) -> int:
        return self._size


def check_shape(world_size: int, node_size: int) -> None:
    """Refuse ranks that fill no nodes, and others than a launcher around this process has started.

    Raises:
        ValueError: They do.
    """
    if world_size < 1 or node_size < 1:
        raise ValueError(f"world_size and node_size must be at least 1, got {world_size} and {node_size}")
    if world_size % node_size:
        raise ValueError(f"world_size={world_size} ranks do not fill nodes of node_size={node_size}")
    given = {"world_size": world_size, "node_size": node_size}
    for name, variables in _LAUNCHED.items():
        for variable in variables:
            told = os.environ.get(variable, "")
            if told.isdigit() and int(told) != given[name]:
                raise ValueError(
                    f"{name}={given[name]}, but the launcher of this process says {variable}={told}: give the same, or "
                    "plan outside of it"
                )


def plan(
    config: Path, world_size: int, node_size: int, backend: Backend | None, step: int, command: Sequence[str] = ()
) -> "Plan":
    """What a configuration of `main.py fit` needs; see `python -m bench plan`.

    Raises:
        FileNotFoundError: There is no such configuration.
        ValueError: It cannot have so many ranks, or its strategy cannot be planned.
    """
    node_size = min(node_size, world_size)
    check_shape(world_size, node_size)
    if not config.is_file():
        raise FileNotFoundError(f"config: there is no file {config}")
    shape = {"world_size": world_size, "node_size": node_size}
    reading = type("Planning", (_Planned,), shape)  # the command line makes the object itself
    with contextlib.redirect_stdout(io.StringIO()):
        quiet()
        with steady(), stoppable():
            cli = started(reading, ["check", "--config", str(config), *command])
    trainer, module, data = cli.trainer, cli.model, cli.datamodule
    trainer.datamodule = data
    if data is not None and getattr(module, "pretrained", None) is None:
        named = getattr(data, "named_tokenizer", None)
        data.tokenizer = named if named is not None else _Vocabulary(getattr(data, "_vocab_size", 0))
    chosen: Backend = backend or ("gloo" if reading.accelerator == "cpu" else "nccl")
    return Plan(config.name, world_size, node_size, chosen, planned(trainer, module, node_size, chosen, step))


@dataclass(frozen=True)
class Plan:
    """What was planned for, and what came of it."""

    name: str
    world_size: int
    node_size: int
    backend: Backend
    found: Planned

    def as_dict(self) -> dict[str, Any]:
        """Bytes: held by a rank; sent by a rank in a step, inside and between nodes; and between nodes by a node."""
        found = self.found
        sent, inter = sum(found.sent.values()), sum(found.inter.values())
        return {
            "parameters": found.parameters,
            "trained": found.trained,
            "units": found.units,
            "held": {**found.held, "total": sum(found.held.values())},
            "sent": {**found.sent, "total": sent},
            "intra": sent - inter,
            "inter": inter,
            "inter_of_a_node": inter * self.node_size,
        }

    def table(self, rate: str | None = None) -> Table:
        """The same for readers; with the time that bytes between nodes take at ``rate``."""
        found, told = self.found, self.as_dict()
        rows: list[list[Any]] = [[f"memory of a rank: {name}", _size(value)] for name, value in told["held"].items()]
        counted = f"{self.name}: {found.parameters / 1e6:,.1f} M parameters, {found.trained / 1e6:,.1f} M trained"
        if self.world_size == 1:
            return Table(["what", "size"], rows, f"{counted}; one rank, which sends nothing")
        for name in ("gradients", "parameters"):
            if found.sent.get(name):
                rows.append([f"sent by a rank in a step: {name}", _size(found.sent[name])])
        rows += [["… of it inside a node", _size(told["intra"])], ["… of it between nodes", _size(told["inter"])]]
        rows.append(["sent by a node to others in a step", _size(told["inter_of_a_node"])])
        if rate is not None:
            seconds = told["inter_of_a_node"] * 8 / links.rate_bits_per_s(rate)
            rows.append([f"… which takes at {rate}", f"{seconds:.3g} s"])
        ranks = f"{self.world_size} ranks on {self.world_size // self.node_size} nodes, {self.backend}"
        return Table(["what", "size"], rows, f"{counted}, {found.units} units; {ranks}")


def _size(count: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:,.2f} {unit}"
    return f"{count:,.0f} B"
