"""What engines of local training have in common: the meetings of an outer optimizer around Lightning's steps."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from strategies import transport
from strategies.checkpoints import peer_lost, reason
from strategies.compressors import Compressor
from strategies.engine import CompressedEngine
from strategies.outer import Meetings, Outer
from strategies.units import Unit


def check_method(method: Compressor, every: int) -> None:
    """Refuse a method for pseudo-gradients that is about gradients.

    Raises:
        ValueError: It is.
    """
    if needy := [part for part in method.within() if part.every_step]:
        raise ValueError(
            f"{needy[0]!r} is about the gradients of every step, and replicas meet every {every} steps: use "
            "another compressor, such as Bidirectional(inner=ErrorFeedback(inner=Int4()))"
        )


class LocalTraining(CompressedEngine):
    """Mixed in before an engine whose ``outer`` moves the weights that all replicas agree on.

    Attributes:
        meetings: When replicas meet.
        outer: None while there is one replica, or none is set up.
    """

    meetings: Meetings
    outer: Outer | None = None
    _last: float = float("inf")

    def describe(self) -> dict[str, Any]:
        """See ``CompressedEngine.describe``."""
        overlaps = {"overlaps": True} if self.meetings.delay else {}
        return {**super().describe(), "local_steps": vars(self.meetings), **overlaps}

    def setup(self, trainer: Any) -> None:
        """See ``DDPStrategy.setup``.

        Raises:
            ValueError: The precision scales gradients, by a factor that would be every replica's own.
        """
        if str(self.precision_plugin.precision) == "16-mixed":
            raise ValueError(
                "precision=16-mixed scales gradients by a factor that replicas would not share: bf16-mixed"
            )
        self.outer = None
        super().setup(trainer)
        if trainer.state.fn == TrainerFn.FITTING and len(self.optimizers) > 1:
            raise ValueError(f"{type(self).__name__} knows one optimizer, the module has {len(self.optimizers)}")

    def _reduce_progress(self, unit: Unit, delta: Tensor, meeting: int) -> None:
        """Average ``delta [N]`` over replicas in place."""
        unit.seed, unit.step = self.seed, meeting
        unit.traffic.baseline(unit.name, 0.0, 0.0)  # counted step by step: see ``optimizer_step``
        method = self._between_replicas()
        assert method is not None
        method.all_reduce(delta, unit)

    def _between_replicas(self) -> Compressor | None:
        """What reduces pseudo-gradients."""
        return self.compressor

    # Running.

    def on_train_start(self) -> None:
        """See ``CompressedEngine.on_train_start``."""
        super().on_train_start()
        self._last = self.lightning_module.trainer.estimated_stepping_batches

    def optimizer_step(self, *args: Any, **kwargs: Any) -> Any:
        """A local step, and the meetings that are due after it."""
        result = super().optimizer_step(*args, **kwargs)
        if self.outer is not None:
            for unit in self.outer.units:  # what DDP would have sent
                ideal = 2 * transport.ring_bytes(4 * unit.numel, unit.world_size)
                self.traffic.baseline(unit.name, ideal, ideal)
            with self._meeting():
                self.outer.stepped()
                if self.lightning_module.trainer.global_step + 1 >= self._last:
                    self.outer.finish()
        return result

    def on_train_end(self) -> None:
        """Where training ended before its time, replicas meet once more."""
        super().on_train_end()
        if self.outer is not None:
            with self._meeting():
                self.outer.finish()

    @contextmanager
    def _meeting(self) -> Iterator[None]:
        """Say what it means when a replica does not come.

        Raises:
            RuntimeError: A replica has left.
        """
        try:
            yield
        except RuntimeError as error:
            if not peer_lost(error):
                raise
            step = self.lightning_module.trainer.global_step + 1
            raise RuntimeError(
                f"a replica has left: the others wait for it after step {step} in vain ({reason(error)}). Start all of "
                "them again with --ckpt_path last; what was trained since that checkpoint is lost"
            ) from error

    def on_validation_start(self) -> None:
        """Validate what all replicas agree on."""
        super().on_validation_start()
        if self.outer is not None:
            self.outer.show()

    def on_validation_end(self) -> None:
        """See ``on_validation_start``."""
        super().on_validation_end()
        if self.outer is not None:
            self.outer.hide()

    def teardown(self) -> None:
        """See ``DDPStrategy.teardown``."""
        if self.outer is not None:
            self.outer.close()
        super().teardown()
