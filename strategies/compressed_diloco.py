"""Local training through Lightning: replicas train by themselves and meet every H steps (DiLoCo)."""

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.trainer.states import TrainerFn
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn

from common.names import clean_name
from strategies.compressed_ddp import CompressedDDP
from strategies.compressors import Compressor, uncompressed
from strategies.kernels import Choice
from strategies.local_training import LocalTraining, check_method
from strategies.outer import Meetings, Outer


class CompressedDiLoCo(LocalTraining, CompressedDDP):
    """Every rank trains a replica of its own; every ``sync_every`` steps all take an outer step together.

    What is compressed is how far replicas have come since they last met, their pseudo-gradients, averaged in fp32. The
    outer step is Nesterov's (Douillard et al., DiLoCo, arXiv 2311.08105). With ``num_fragments`` parts of the model
    meet in turn, and with ``fragment_sync_delay`` training goes on while they travel (Streaming DiLoCo, arXiv
    2501.18512). Validation, checkpoints and exports hold the weights that all replicas agree on: those of the last
    meeting, which in the middle of a round are older than a replica's own. After the last step all meet once more.

    Optimizer states, gradient norms and clipping are each replica's own. A compressor sends fp32 back unless it is
    ``Bidirectional``.

    Args:
        compressor: How pseudo-gradients are reduced, e.g. ``Bidirectional`` of ``Int8``; by default in fp32 by torch's
            own all-reduce.
        sync_every: H, local steps between two meetings over the same part of the model.
        outer_lr: Learning rate of the outer step.
        outer_momentum: Its Nesterov momentum.
        num_fragments: Parts of the model, of about equal size in order of registration, that meet in turn.
        fragment_sync_delay: Local steps between sending a part and taking up the result. 0 waits for it.
        fragment_update_alpha: Share of a replica's own weights in what it goes on with.
        bucket_cap_mb: Size of what is reduced at once in MiB, at most, where no parameter is larger.
        kernels: How codecs compute; see ``CompressedDDP``.
        process_group_backend: "gloo" or "nccl"; by default the device's own.
        timeout: How long a rank waits for the others in a collective: longer than the slowest needs for H steps.

    Raises:
        ValueError: An argument is out of range, ``compressor`` needs the gradients of every step, the precision is
            16-mixed, or there are several optimizers.
    """

    strategy_name = "compressed_diloco"
    _saved: dict[str, Any] | None = None

    def __init__(
        self,
        compressor: Compressor | None = None,
        sync_every: int = 64,
        outer_lr: float = 0.7,
        outer_momentum: float = 0.9,
        num_fragments: int = 1,
        fragment_sync_delay: int = 0,
        fragment_update_alpha: float = 0.0,
        bucket_cap_mb: int = 25,
        kernels: Choice = "auto",
        process_group_backend: str | None = None,
        timeout: timedelta = timedelta(minutes=30),
    ) -> None:
        method = uncompressed() if compressor is None else compressor
        super().__init__(
            method, bucket_cap_mb, kernels=kernels, process_group_backend=process_group_backend, timeout=timeout
        )
        self.meetings = Meetings(
            sync_every, num_fragments, fragment_sync_delay, fragment_update_alpha, outer_lr, outer_momentum
        )
        check_method(method, sync_every)

    # Setting up.

    def _setup_model(self, model: nn.Module) -> nn.Module:  # type: ignore[override] # nothing is wrapped
        """All replicas begin with rank 0's weights, and with what the checkpoint has of them."""
        if self.world_size > 1:
            with torch.no_grad():
                for tensor in (*model.parameters(), *model.buffers()):
                    dist.broadcast(tensor, 0)
            self.outer = Outer(
                {clean_name(name): p for name, p in model.named_parameters() if p.requires_grad},
                self.meetings,
                self._reduce_progress,
                self.traffic,
                dist.new_group() if self.meetings.delay else None,
                self.bucket_cap_mb << 18,
            )
            self._take_units(self.outer.units)
            self._warm_up(self.world_size, torch.float32)
            self._go_on(self.outer)
        self._take_up_owed()
        return model

    def _register_ddp_hooks(self) -> None:
        """Nothing is wrapped."""

    # Checkpoints: the common weights as the model's, and beside them what is each replica's own.

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The weights that all replicas agree on."""
        if self.outer is None or not self.outer.show():  # in a validation they stand there already
            return super().lightning_module_state_dict()
        try:
            state = super().lightning_module_state_dict()
            return apply_to_collection(state, Tensor, Tensor.clone) if self.global_rank == 0 else state
        finally:
            self.outer.hide()

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """See ``CompressedEngine.save_checkpoint``."""
        if self.outer is not None and "optimizer_states" in checkpoint:
            common = self.outer.state_dict()
            own = {
                "weights": self.outer.own_weights() if common["apart"] else {},
                "optimizers": checkpoint["optimizer_states"],
            }
            told = self._told_first(apply_to_collection(own, Tensor, Tensor.cpu))
            checkpoint["diloco"] = {**common, "replicas": told}
        super().save_checkpoint(checkpoint, filepath, storage_options)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """See ``CompressedEngine.load_checkpoint``; of this replica. One of another strategy begins a round.

        Raises:
            ValueError: It is of another number of replicas, in the middle of a round.
        """
        loaded = super().load_checkpoint(checkpoint_path, weights_only)
        saved = loaded.pop("diloco", None)
        if saved is None or self.lightning_module.trainer.state.fn != TrainerFn.FITTING:
            return loaded
        replicas = len(saved["replicas"])
        if saved["apart"] and replicas != self.world_size:
            raise ValueError(
                f"checkpoint {checkpoint_path} was saved by {replicas} replicas in the middle of a round, and cannot "
                f"be shared among {self.world_size}: resume with {replicas}, or from a checkpoint in which they agree, "
                f"as without fragments every {saved['every']} steps, and at the end of training"
            )
        self._saved = saved
        loaded["optimizer_states"] = self._own(saved)["optimizers"]
        return loaded

    def _own(self, saved: dict[str, Any]) -> dict[str, Any]:
        """What a replica goes on with: its own, or where there are more of them now, another one's."""
        own: dict[str, Any] = saved["replicas"][self.global_rank % len(saved["replicas"])]
        return own

    def _go_on(self, outer: Outer) -> None:
        """Go on from a checkpoint, if there is one."""
        saved, self._saved = self._saved, None
        if saved is None:
            return
        try:
            outer.load_state_dict(saved, self._own(saved)["weights"])
        except ValueError as error:
            raise ValueError(f"checkpoint {self.loaded_from} does not fit: {error}") from None
