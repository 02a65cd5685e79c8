"""Local training of replicas that are groups of ranks: each shards its model, and each rank meets its counterparts."""

from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from lightning.pytorch.trainer.states import TrainerFn
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn

from common.names import clean_name
from strategies.compressed_fsdp2 import CompressedFSDP2
from strategies.compressors import Codec, Compressor, uncompressed
from strategies.engine import Start
from strategies.kernels import Choice
from strategies.local_training import LocalTraining, check_method
from strategies.outer import Meetings, Outer
from strategies.units import Unit

_KEPT = "local training"


class ShardedDiLoCo(LocalTraining, CompressedFSDP2):
    """``CompressedDiLoCo`` whose replicas are groups of ranks, usually nodes, that shard a model by FSDP2.

    Inside a replica every step is one of ``CompressedFSDP2``. Every ``sync_every`` steps each rank reduces its shard's
    pseudo-gradient with the ranks that have the same shard in other replicas. Gradient norms and clipping are a
    replica's own. Checkpoints are as those of FSDP2, with the weights that all replicas agree on; beside them each rank
    saves its own weights, optimizer state and outer state. They resume on as many ranks alone.

    Args:
        replicas: Groups of ranks in rank order, usually the number of nodes.
        replica_compressor: How pseudo-gradients are reduced, e.g. ``Bidirectional`` of ``Int8``; by default in fp32.
        compressor: How gradients are reduced inside a replica; see ``CompressedFSDP2``.
        parameter_compressor: The same of parameters.
        sync_every: See ``CompressedDiLoCo``, as the next five.
        outer_lr: Learning rate of the outer step.
        outer_momentum: Its Nesterov momentum.
        num_fragments: Parts of the model that meet in turn.
        fragment_sync_delay: Local steps between sending a part and taking up the result.
        fragment_update_alpha: Share of a replica's own weights in what it goes on with.
        bucket_cap_mb: Size of what is reduced at once in MiB, at most, where no shard of a parameter is larger.
        sharding_strategy: See ``CompressedFSDP2``, as the next five.
        state_dict_type: Checkpoint as one folder ("sharded") or one file ("full").
        auto_wrap_policy: Module classes that are sharded on their own.
        start: What each rank has while the model is built.
        kernels: How codecs compute.
        process_group_backend: "gloo" or "nccl".
        timeout: How long a rank waits for the others in a collective.

    Raises:
        ValueError: As for both; ``replicas`` is less than 2; before training, if the module's optimization is manual.
    """

    strategy_name = "sharded_diloco"
    reduces_between = False

    def __init__(
        self,
        replicas: int,
        replica_compressor: Compressor | None = None,
        compressor: Compressor | None = None,
        parameter_compressor: Codec | None = None,
        sync_every: int = 64,
        outer_lr: float = 0.7,
        outer_momentum: float = 0.9,
        num_fragments: int = 1,
        fragment_sync_delay: int = 0,
        fragment_update_alpha: float = 0.0,
        bucket_cap_mb: int = 25,
        sharding_strategy: Literal["FULL_SHARD", "SHARD_GRAD_OP"] = "FULL_SHARD",
        state_dict_type: Literal["full", "sharded"] = "sharded",
        auto_wrap_policy: set[type[nn.Module]] | None = None,
        start: Start = "auto",
        kernels: Choice = "auto",
        process_group_backend: str | None = None,
        timeout: timedelta = timedelta(minutes=30),
    ) -> None:
        if replicas < 2:
            raise ValueError(f"replicas must be at least 2, got {replicas}: one has nobody to meet")
        method = uncompressed() if replica_compressor is None else replica_compressor
        super().__init__(
            compressor=compressor,
            parameter_compressor=parameter_compressor,
            sharding_strategy=sharding_strategy,
            replicas=replicas,
            replica_compressor=method,
            state_dict_type=state_dict_type,
            auto_wrap_policy=auto_wrap_policy,
            start=start,
            kernels=kernels,
            process_group_backend=process_group_backend,
            timeout=timeout,
        )
        if bucket_cap_mb < 1:
            raise ValueError(f"bucket_cap_mb must be at least 1, got {bucket_cap_mb}")
        self.bucket_cap_mb = bucket_cap_mb
        self.meetings = Meetings(
            sync_every, num_fragments, fragment_sync_delay, fragment_update_alpha, outer_lr, outer_momentum
        )
        check_method(method, sync_every)
        self._kept: Unit | None = None

    def _between_replicas(self) -> Compressor | None:
        return self.replica_compressor

    def setup(self, trainer: Any) -> None:
        """See ``LocalTraining.setup``.

        Raises:
            ValueError: The module steps by itself: it would go on, in the same training step, with parameters that
                were gathered before the meeting.
        """
        module: Any = self.lightning_module
        if trainer.state.fn == TrainerFn.FITTING and not module.automatic_optimization:
            raise ValueError(
                f"{type(module).__name__} has automatic_optimization=False, and ShardedDiLoCo meets between training "
                "steps alone: use CompressedFSDP2, or CompressedDiLoCo, or let Lightning optimize"
            )
        super().setup(trainer)

    def _install(self, model: nn.Module) -> None:
        """As ``CompressedFSDP2``; and what replicas agree on at their meetings."""
        super()._install(model)
        own = {clean_name(name): _local(p) for name, p in model.named_parameters() if p.requires_grad}
        own = {name: part for name, part in own.items() if part.numel()}
        group = self._between
        if self.meetings.delay:  # used from another thread
            group = dist.new_group(dist.get_process_group_ranks(group), use_local_synchronization=True)
        cap = self.bucket_cap_mb << 18
        self.outer = Outer(own, self.meetings, self._reduce_progress, self.traffic, group, cap)
        shards = self.world_size // self.replicas
        for unit in self.outer.units:
            unit.level, unit.shard = "inter", (self.global_rank % shards, shards)
        self._kept = Unit(_KEPT, [], 0, None, self.traffic)
        self.keepers = [*self.keepers, self._kept]
        self._take_units([*self.units, *self.outer.units])

    # Checkpoints: the common weights as the model's, and beside them what is each rank's own.

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The weights that all replicas agree on."""
        if self.outer is None or not self.outer.show():  # in a validation they stand there already
            return super().lightning_module_state_dict()
        try:
            return apply_to_collection(super().lightning_module_state_dict(), Tensor, Tensor.clone)
        finally:
            self.outer.hide()

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """See ``CompressedEngine.save_checkpoint``."""
        if self.outer is not None and self._kept is not None:
            self._kept.state = {**_flat(self.outer.state_dict()), **self._own_state(self.outer)}
        try:
            super().save_checkpoint(checkpoint, filepath, storage_options)
        finally:
            if self._kept is not None:
                self._kept.state = {}

    def _own_state(self, outer: Outer) -> dict[str, Tensor]:
        """This rank's weights, and its part of the optimizer's state."""
        state = {f"own.{name}": part for name, part in outer.own_weights().items()}
        for name, part in self._moments():
            state[name] = part
        return {name: part.clone() for name, part in state.items()}

    def _moments(self) -> list[tuple[str, Tensor]]:
        found = []
        for optimizer in self.optimizers:
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            for place, parameter in enumerate(parameters):
                state = optimizer.state.get(parameter, {})
                found += [
                    (f"moment.{place}.{key}", _local(part)) for key, part in state.items() if isinstance(part, Tensor)
                ]
        return found

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """See ``CompressedEngine.load_checkpoint``; of this rank. One of another strategy begins a round.

        Raises:
            ValueError: It was saved by another number of ranks, or does not fit.
        """
        loaded = super().load_checkpoint(checkpoint_path, weights_only)
        if self.outer is None or self._kept is None or self.lightning_module.trainer.state.fn != TrainerFn.FITTING:
            return loaded
        saved, self._kept.state = self._kept.state, {}
        self.outer.agree()
        if saved:
            try:
                own = {name[4:]: part for name, part in saved.items() if name.startswith("own.")}
                self.outer.load_state_dict(_unflat(saved, self.outer), own)
            except (ValueError, RuntimeError) as error:
                raise ValueError(f"checkpoint {self.loaded_from} does not fit: {error}") from None
            with torch.no_grad():
                for name, part in self._moments():
                    part.copy_(saved[name])
        return loaded

    def _take_up_owed(self) -> None:
        """See ``CompressedEngine._take_up_owed``."""
        saved = [one for one in self.owed if _KEPT in one["units"]]
        if saved and len(saved) != self.world_size:
            raise ValueError(
                f"checkpoint {self.loaded_from} was saved by {len(saved)} ranks of replicas that train by themselves, "
                f"and cannot be shared among {self.world_size}: resume with {len(saved)}, or begin a new run from its "
                "weights (export)"
            )
        super()._take_up_owed()


def _local(tensor: Any) -> Tensor:
    found: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return found.detach()


_COUNTS = ("rounds", "met", "sent")


def _flat(state: dict[str, Any]) -> dict[str, Tensor]:
    """An outer optimizer's state as tensors; numbers that are not there as −1."""
    counts = [[-1 if one[name] is None else one[name] for name in _COUNTS] for one in state["fragments"]]
    flat = {
        "numbers": torch.tensor([state["step"], state["every"], int(state["apart"])]),
        "counts": torch.tensor(counts),
    }
    for name in ("weights", "velocity", "arrived"):
        flat |= {f"{name}.{place}": part.clone() for place, part in enumerate(state[name]) if part is not None}
    return flat


def _unflat(flat: dict[str, Tensor], outer: Outer) -> dict[str, Any]:
    """The inverse of ``_flat``; parts are those of ``outer``, whose layout is compared with residuals."""
    step, every, apart = flat["numbers"].tolist()
    counts = [
        {name: None if n < 0 else n for name, n in zip(_COUNTS, row, strict=True)} for row in flat["counts"].tolist()
    ]
    parts = range(len(outer.units))
    return {
        "step": step,
        "every": every,
        "apart": bool(apart),
        "fragments": counts,
        "layout": [[p.fqn for p in unit.parameters] for unit in outer.units],
        **{name: [flat.get(f"{name}.{place}") for place in parts] for name in ("weights", "velocity", "arrived")},
    }
