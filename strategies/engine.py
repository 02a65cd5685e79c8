"""What the engines have in common: reducing a unit's gradient under the counters, and checkpoints that are whole."""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.plugins.precision import MixedPrecision, Precision
from lightning.pytorch.strategies import ParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from common.files import partial_of
from common.processes import end_with
from common.randomness import run_seed
from strategies import residuals, transport
from strategies.checkpoints import (
    agreed,
    at_fault,
    check_together,
    lost,
    peer_lost,
    reason,
    replacing_together,
    sealing,
)
from strategies.compressors import Compressor
from strategies.frozen_adam import FrozenVariance, check_adam
from strategies.kernels import Choice, Job, choose
from strategies.precision import UnscaledPrecision
from strategies.sharded_start import ShardedStart
from strategies.traffic import Traffic
from strategies.units import Unit

Start = Literal["auto", "sharded", "whole"]
_FIRST = "PARE_FIRST_RANK"  # process id of the rank that started the others


class CompressedEngine(ParallelStrategy):
    """Mixed in before one of Lightning's strategies.

    Attributes:
        compressor: How gradients are reduced; none leaves torch's own path untouched and uncounted.
        traffic: This rank's counters.
        units: What is reduced on its own: an FSDP unit or a DDP bucket. Empty while nothing is installed.
        keepers: What besides ``units`` has a state that checkpoints hold.
        kernels: How the arithmetic of codecs is asked to run.
        replicas: Groups of ranks, in rank order, that each reduce among themselves before they reduce between them.
        replica_compressor: How they do so between them; None is torch's own way.
        start: What a sharding engine's ranks have of the model while it is built.
        codec_backend: How it does run; None before it is settled, or where no codec has a choice.
    """

    compressor: Compressor | None
    traffic: Traffic
    units: list[Unit]
    keepers: list[Unit] = []  # noqa: RUF012 - replaced, never changed
    kernels: Choice = "auto"
    replicas: int = 1
    replica_compressor: Compressor | None = None
    start: Start = "whole"
    codec_backend: str | None = None
    _built: ShardedStart | None = None  # what a sharded start has kept
    _hosts: dist.ProcessGroup | None = None  # gloo, where gradients go another way
    _seed: int | None = None  # the first rank's, once training has begun
    loaded_from: Path | None = None  # the checkpoint that is being restored, for messages
    owed: list[dict[str, Any]] = []  # noqa: RUF012 - replaced, never changed; every rank's state in that checkpoint
    _served: Any = None  # the module whose units these are

    def describe(self) -> dict[str, Any]:
        """What ran, for the run record."""
        method, between = self.compressor, self.replica_compressor
        return {
            "strategy": type(self).__name__,
            "compress_method": "native" if method is None else method.name,
            "compress_config": {} if method is None else method.config(),
            **({"replicas": self.replicas} if self.replicas > 1 else {}),
            **({} if between is None else {"replica_compress_method": between.name}),
            **({} if between is None else {"replica_compress_config": between.config()}),
            **({"compress_choices": chosen} if (chosen := self._chosen()) else {}),
            **({} if self.codec_backend is None else {"codec_backend": self.codec_backend}),
        }

    def _chosen(self) -> dict[str, str]:
        """What methods that choose have chosen, by unit."""
        methods = [one for one in (self.compressor, self.replica_compressor) if isinstance(one, Compressor)]
        return {unit: name for one in methods for part in one.within() for unit, name in part.chosen().items()}

    @property
    def saves_one_file(self) -> bool:
        """Whether a checkpoint is one file that rank 0 writes, not a folder that all ranks write to."""
        return True

    @property
    def precision_plugin(self) -> Any:
        """The precision in use."""
        return super().precision_plugin

    @precision_plugin.setter
    def precision_plugin(self, plugin: Precision | None) -> None:
        if isinstance(plugin, MixedPrecision) and plugin.precision == "bf16-mixed":
            plugin = UnscaledPrecision(plugin.device)
        ParallelStrategy.precision_plugin.fset(self, plugin)

    # Starting together or not at all.

    @contextmanager
    def _building(self, rank: int, ranks: int) -> Iterator[None]:
        """Build a model, of which this is the ``rank``-th of ``ranks`` that share it."""
        asked = self.start == "auto" and getattr(self.lightning_module, "starts_sharded", False)
        if ranks == 1 or not (asked or self.start == "sharded"):
            yield
            return
        self._built = ShardedStart(rank, ranks)
        with self._built.building():
            yield

    def _configure_launcher(self) -> None:
        """Lightning starts the other ranks of this machine from the first one: they end when it does."""
        super()._configure_launcher()
        environment = self.cluster_environment
        if not isinstance(environment, LightningEnvironment):
            return  # torchrun and SLURM see to it
        if not environment.creates_processes_externally:
            os.environ[_FIRST] = str(os.getpid())
        elif environment.local_rank() > 0 and _FIRST in os.environ:
            end_with(int(os.environ[_FIRST]), f"rank {environment.local_rank()} of this machine")

    def setup_environment(self) -> None:
        """Join the other ranks.

        Raises:
            OSError: The port at which ranks meet is taken.
        """
        try:
            super().setup_environment()
        except dist.DistNetworkError as error:
            if "EADDRINUSE" not in str(error):
                raise
            raise OSError(
                f"MASTER_PORT {self.cluster_environment.main_port} is taken on this machine: ranks cannot meet there. "
                "Another run may be using it: choose another port (MASTER_PORT=…), or leave it unset for a free one"
            ) from error

    def _take_units(self, units: list[Unit]) -> None:
        """Reduce ``units`` from now on. What the same module's units owed in an earlier stage stays owed."""
        before = {unit.name: unit for unit in self.units} if self._served is self.lightning_module else {}
        for unit in units:
            earlier = before.get(unit.name)
            if earlier is not None and (earlier.parameters, earlier.numel) == (unit.parameters, unit.numel):
                unit.state = earlier.state
        self.units, self._served = units, self.lightning_module
        for method, level in ((self.compressor, ("", "intra")), (self.replica_compressor, ("inter",))):
            for part in method.within() if isinstance(method, Compressor) else []:
                part.meet([unit for unit in units if unit.level in level])

    def _reduce_sharded(self, unit: Unit, grad: Tensor, output: Tensor) -> None:
        """``grad [N]`` of this rank → mean shard ``output [N/n]``."""
        ideal = transport.ring_bytes(4 * grad.numel(), unit.world_size)
        factor = transport.reduce_scatter_factor(unit.group) * grad.element_size() / 4
        self.traffic.baseline(unit.name, ideal, factor * ideal)
        self._tell_time(unit)
        self.compressor.reduce_scatter(grad, output, unit)

    def _reduce_replicated(self, unit: Unit, grad: Tensor) -> None:
        """``grad [N]`` becomes the mean in place."""
        self._all_reduce(self.compressor, unit, grad)

    def _reduce_between(self, unit: Unit, grad: Tensor) -> None:
        """The same, between replicas."""
        self._all_reduce(self.replica_compressor, unit, grad)

    def _all_reduce(self, method: Compressor | None, unit: Unit, grad: Tensor) -> None:
        ideal = 2 * transport.ring_bytes(4 * grad.numel(), unit.world_size)
        self.traffic.baseline(unit.name, ideal, ideal * grad.element_size() / 4)
        self._tell_time(unit)
        assert method is not None
        method.all_reduce(grad, unit)

    def _reduce_on_two_levels(self, unit: Unit, between: Unit, grad: Tensor) -> None:
        """``grad [N]`` becomes the mean of all ranks in place: inside a group, each shard between groups, and back.

        A shard crosses the link between groups once for each of them, however many ranks a group has.
        """
        padded = torch.nn.functional.pad(grad, (0, -grad.numel() % unit.world_size))
        shard = padded
        if unit.world_size > 1:
            shard = torch.empty_like(padded[: padded.numel() // unit.world_size])
            self._reduce_sharded(unit, padded, shard)
        self._reduce_between(between, shard)
        if unit.world_size > 1:
            ideal = transport.ring_bytes(4 * padded.numel(), unit.world_size)
            self.traffic.baseline(unit.name, ideal, ideal * grad.element_size() / 4)
            transport.all_gather(shard, padded, unit)
        grad.copy_(padded[: grad.numel()])

    def _warm_up(self, ranks: int, dtype: torch.dtype | None = None) -> None:
        """Compile and check the codecs' arithmetic now, since inside the first backward pass all ranks would wait.

        One rank of each machine goes first; the others find its results in the compiler's cache.

        Args:
            ranks: How many share a gradient.
            dtype: What gradients come in; by default that of the precision.
        """
        if self.lightning_module.trainer.state.fn != TrainerFn.FITTING:
            return
        backend, found = choose(self.kernels, self.root_device), set()
        whole = {"bf16-true": torch.bfloat16, "16-true": torch.float16}
        own = whole.get(str(self.precision_plugin.precision), torch.float32)
        job = Job(backend, self.root_device, ranks, dtype or own)
        parameters: Compressor | None = getattr(self, "parameter_compressor", None)
        between = self.replica_compressor
        first = self.cluster_environment.local_rank() == 0
        for turn in (True, False):
            if turn == first and self.compressor is not None:
                found |= self.compressor.warm_up(job)
            if turn == first and between is not None:
                found |= between.warm_up(replace(job, ranks=self.replicas))
            if turn == first and parameters is not None:
                found |= parameters.warm_up(replace(job, dtype=own), "apart")
            if backend in ("compiled", "triton"):
                self.barrier()
        self.codec_backend = ", ".join(sorted(found)) or None

    def setup_optimizers(self, trainer: Any) -> None:
        """See ``Strategy.setup_optimizers``.

        Raises:
            ValueError: The compressor freezes a variance that the optimizers do not have, or where it cannot; or it
                keeps gradients from step to step whose scale changes.
        """
        super().setup_optimizers(trainer)
        method, between = self.compressor, self.replica_compressor
        inner = method.within()[1:] if isinstance(method, Compressor) else []
        inner += [] if between is None else between.within()
        if misplaced := [one for one in inner if one.frozen_from is not None]:
            raise ValueError(f"{misplaced[0]!r} must be the strategy's compressor itself, not inside or beside another")
        methods = [*([method, *inner] if isinstance(method, Compressor) else inner)]
        kept = [one for one in methods if one.owes or one.frozen_from is not None]
        if kept and self.world_size > 1 and str(self.precision_plugin.precision) == "16-mixed":
            raise ValueError(
                f"{type(kept[0]).__name__} keeps gradients from step to step, and precision=16-mixed scales them by a "
                "factor that changes: use bf16-mixed"
            )
        if self._frozen_from() is not None:
            check_adam(self.optimizers, method.arguments()["beta1"])

    def _frozen_from(self) -> int | None:
        """See ``Compressor.frozen_from``."""
        return None if self.world_size == 1 else getattr(self.compressor, "frozen_from", None)

    def optimizer_step(self, optimizer: Any, closure: Any, model: Any = None, **kwargs: Any) -> Any:
        """See ``Strategy.optimizer_step``; along momenta once the compressor sends those."""
        step, frozen = self.lightning_module.trainer.global_step, self._frozen_from()
        if frozen is not None and step >= frozen:
            optimizer = FrozenVariance(optimizer, step)
        return super().optimizer_step(optimizer, closure, model, **kwargs)

    @property
    def seed(self) -> int:
        """What random methods draw by: alike on all ranks in training, whatever seeds they have themselves."""
        return run_seed() if self._seed is None else self._seed

    def _tell_time(self, unit: Unit) -> None:
        """What random methods and schedules go by."""
        unit.seed = self.seed
        unit.step = self.lightning_module.trainer.global_step

    def on_train_start(self) -> None:
        """Make sure that all ranks go on from the same checkpoint.

        Every rank reads it by itself. Where a rank that was left over from an earlier run replaces it meanwhile, or
        nodes see different folders, they would train on: equal weights under DDP, but other data and optimizer states.

        Raises:
            RuntimeError: Ranks stand at different steps.
        """
        super().on_train_start()
        if self.world_size == 1:
            return
        own: tuple[dict[str, int], int] = (_position(self.lightning_module.trainer), run_seed())
        ranks = [own] * self.world_size
        dist.all_gather_object(ranks, own)
        first, self._seed = ranks[0]
        for rank, (other, _) in enumerate(ranks):
            if other != first:
                raise RuntimeError(
                    f"ranks have not read the same checkpoint: rank 0 goes on at {first}, rank {rank} at {other}. "
                    "Is another run still writing there, or do nodes not share the folder? Then start again"
                )

    # Checkpoints. Written beside and renamed, so that a kill while saving leaves the previous one whole.

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Save a checkpoint folder or file that appears under ``filepath`` only when it is complete."""
        path = Path(self.broadcast(filepath))
        keeping = [*self.units, *self.keepers]
        stateful = any(unit.state for unit in keeping)
        owed = residuals.collect(keeping, self._methods()) if stateful else None
        if self.saves_one_file:
            if owed is not None:
                checkpoint["compressor"] = self._told_first(owed)
            with ExitStack() as held:  # three steps: where rank 0 fails, the others must not wait in the next one
                with agreed(path, self._gather):
                    if self.global_rank == 0:
                        held.enter_context(sealing(path))
                with agreed(path, self._gather):
                    super().save_checkpoint(checkpoint, partial_of(path), storage_options)
                with agreed(path, self._gather):
                    held.close()
            return
        with replacing_together(path, self._gather, self.global_rank) as beside:
            super().save_checkpoint(checkpoint, beside, storage_options)
            if owed is not None:
                torch.save(owed, residuals.rank_file(beside, self.global_rank))

    def _told_first(self, told: Any) -> list[Any] | None:
        """What every rank told, on the first one, through host memory: NCCL would gather it in the first rank's GPU."""
        if self._hosts is None and dist.get_backend() != "gloo":
            self._hosts = dist.new_group(backend="gloo")
        every: list[Any] | None = [None] * self.world_size if self.global_rank == 0 else None
        dist.gather_object(told, every, group=self._hosts)
        return every

    def _gather(self, told: Any) -> list[Any]:
        """What every rank told, on every rank."""
        if self.world_size == 1:
            return [told]
        every: list[Any] = [None] * self.world_size
        dist.all_gather_object(every, told)
        return every

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Load a checkpoint; one that does not fit this model is refused by name.

        Raises:
            FileNotFoundError: No such checkpoint.
            DamagedError: A file of it is missing, cut short or changed.
            OSError: A rank cannot read it.
            ValueError: The checkpoint holds other parameters than the model, or another compressor's residuals.
        """
        path = Path(checkpoint_path)
        check_together(path, self._gather, self.global_rank)
        self.loaded_from = path
        weights_only = True if weights_only is None else weights_only  # a checkpoint is data: refuse one with code
        with fitting(path):
            self._look_at(path, weights_only)
            loaded = super().load_checkpoint(checkpoint_path, weights_only)
        self._restore_residuals(path, loaded.pop("compressor", []))
        return loaded

    def _look_at(self, path: Path, weights_only: bool) -> None:
        """Refuse a whole checkpoint that does not fit, on every rank: before any waits for another in loading it."""

    def _restore_residuals(self, path: Path, ranks: list[dict[str, Any]]) -> None:
        """Take up what compression still owed; ``ranks`` comes from a checkpoint of one file."""
        if self.lightning_module.trainer.state.fn != TrainerFn.FITTING:
            return
        self.owed = residuals.saved_ranks(path) if path.is_dir() else ranks
        for unit in (*self.units, *self.keepers):  # of an earlier stage
            unit.state.clear()
        if self.restore_checkpoint_after_setup:  # else there are no units yet: setting up asks for it
            self._take_up_owed()

    def _take_up_owed(self) -> None:
        """Hand what the checkpoint still owed to the units, once there are units."""
        ranks, self.owed = self.owed, []
        keeping = [*self.units, *self.keepers]
        if ranks and not keeping:
            rank_zero_warn("nothing is compressed here: the residuals in the checkpoint are dropped")
        elif ranks:
            residuals.restore(ranks, keeping, self._methods(), self.root_device)

    def _methods(self) -> str:
        """What says whose residuals are whose."""
        between = "" if self.replica_compressor is None else f", between replicas {self.replica_compressor!r}"
        return f"{self.compressor!r}{between}"

    def check_ranks(self, ranks: int) -> None:
        """Refuse a number of ranks that cannot be cut into ``replicas`` groups.

        Raises:
            ValueError: ``replicas`` does not divide it, its groups would not be those of the nodes, nodes have another
                number of ranks than their launcher has started, or than a compressor says.
        """
        started, asked = os.environ.get("LOCAL_WORLD_SIZE", ""), getattr(self, "num_processes", 0)
        if started.isdigit() and asked and int(started) != asked:
            raise ValueError(
                f"trainer.devices={asked}, but the launcher has started {started} ranks on this node "
                "(LOCAL_WORLD_SIZE): give the same"
            )
        size, rest = divmod(ranks, self.replicas)
        if rest or size == 0:
            raise ValueError(
                f"replicas={self.replicas} leaves no equal groups of {ranks} ranks; give a divisor, usually the number "
                "of nodes"
            )
        nodes, node = getattr(self, "num_nodes", 1), getattr(self, "num_processes", ranks)
        if self.replicas > 1 and nodes > 1 and node and node % size:
            raise ValueError(
                f"replicas={self.replicas} makes groups of {size} ranks, which would lie across nodes of {node}: give "
                f"the number of nodes, {nodes}"
            )
        for codec in self.compressor.within() if self.compressor is not None else ():
            inside, name = getattr(codec, "node_size", size), f"{type(codec).__name__}.node_size"
            if inside < size:
                if size % inside:
                    raise ValueError(f"{name}={inside} does not divide the {size} ranks that reduce together")
                self.refuse_across_nodes(name, inside)

    def refuse_across_nodes(self, name: str, inside: int) -> None:
        """Refuse a number of ranks said to be a node's, or a part of one, that would lie across nodes.

        Raises:
            ValueError: They would.
        """
        nodes, node = getattr(self, "num_nodes", 1), getattr(self, "num_processes", inside)
        if nodes > 1 and node and node % inside:
            raise ValueError(f"{name}={inside} would put ranks of other nodes into one: a node has {node} here")


def _position(trainer: Any) -> dict[str, int]:
    """Where training stands: what a checkpoint restores on every rank by itself."""
    batches = trainer.fit_loop.epoch_loop.batch_progress.total
    return {"step": trainer.global_step, "epoch": trainer.current_epoch, "batch": batches.ready}


@contextmanager
def fitting(path: Path | None) -> Iterator[None]:
    """Say what torch's errors in loading a checkpoint, often very long, mean.

    Raises:
        ValueError: The checkpoint does not fit the model.
        RuntimeError: Another rank is gone.
    """
    try:
        yield
    except (RuntimeError, KeyError, CheckpointException) as error:
        cause = at_fault(error)
        if peer_lost(cause):
            raise lost(path, cause, "load") from error
        if isinstance(cause, RuntimeError | KeyError | ValueError | TypeError) and not _out_of_memory(cause):
            raise misfit(path, reason(cause)) from error
        if cause is error:
            raise
        raise cause from error


def _out_of_memory(error: BaseException) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)  # on CUDA; on the CPU


def misfit(path: Path | None, reason: str) -> ValueError:
    """What to raise when a checkpoint does not fit the model."""
    return ValueError(
        f"checkpoint {path} does not fit this model ({reason}). Resume with the config that the run saved "
        "beside its logs, or start without --ckpt_path."
    )
