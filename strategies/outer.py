"""Local training with rare meetings: DiLoCo's outer optimizer, whole or streaming. Knows no Trainer and no engine.

Replicas train by themselves. Every H local steps they average how far they have come, their pseudo-gradients, and one
step of Nesterov's momentum along the mean moves the weights that all agree on (Douillard et al., DiLoCo, arXiv
2311.08105). The streaming form (arXiv 2501.18512) does so for parts of the model in turn, sends them while training
goes on, and blends what arrives with what was trained meanwhile.
"""

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from strategies.traffic import StepTraffic, Traffic
from strategies.units import ParameterSlice, Unit

Reduce = Callable[[Unit, Tensor, int], None]
"""Called as ``reduce(unit, pseudo_gradient [N], round)``; writes the mean over replicas in place."""

Named = list[tuple[str, Tensor]]
_COUNTS = ("rounds", "met", "sent")


@dataclass(frozen=True)
class Meetings:
    """When replicas meet, and what comes of it.

    Attributes:
        every: H, local steps between two meetings over the same part of the model.
        fragments: Parts of the model that meet in turn, ``every / fragments`` steps apart; 1 is all at once.
        delay: Local steps between sending a part and taking up what became of it; training goes on meanwhile.
        alpha: Share of a replica's own weights in what it goes on with; 0 takes up the common ones.
        lr: Learning rate of the outer step.
        momentum: Its Nesterov momentum.

    Raises:
        ValueError: An attribute is out of range, or the next meeting would come before the last one's end.
    """

    every: int
    fragments: int = 1
    delay: int = 0
    alpha: float = 0.0
    lr: float = 0.7
    momentum: float = 0.9

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"sync_every must be at least 1 local step, got {self.every}")
        if not 1 <= self.fragments <= self.every:
            raise ValueError(
                f"num_fragments must be from 1 to sync_every={self.every}, so that parts meet at different steps; "
                f"got {self.fragments}"
            )
        if not 0 <= self.delay < self.every:
            raise ValueError(
                f"fragment_sync_delay must be at least 0 and less than sync_every={self.every}, since a part meets "
                f"again only when it is through; got {self.delay}"
            )
        if not 0 <= self.alpha < 1:
            raise ValueError(
                f"fragment_update_alpha must be in [0, 1), got {self.alpha}: at 1 nothing is ever taken up"
            )
        if self.lr <= 0:
            raise ValueError(f"outer_lr must be more than 0, got {self.lr}")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"outer_momentum must be in [0, 1), got {self.momentum}")

    def due(self, fragment: int, step: int) -> bool:
        """Whether a part is sent after local step ``step`` (counted from 1)."""
        return step > 0 and (step - fragment * self.every // self.fragments) % self.every == 0


@dataclass
class _Piece:
    """Some parameters that are reduced together: a unit, the weights that all replicas agree on, and their velocity."""

    unit: Unit
    parameters: list[Tensor]
    weights: Tensor
    velocity: Tensor
    delta: Tensor | None = None  # this replica's pseudo-gradient, later the mean

    @property
    def exact(self) -> bool:
        """Whether the parameters' dtype can stand for the common weights."""
        return all(p.dtype == torch.float32 for p in self.parameters)

    def local(self) -> Tensor:
        """This replica's own weights ``float32 [N]``."""
        return torch.cat([p.detach().float().flatten() for p in self.parameters])

    def put(self, flat: Tensor) -> None:
        """Make ``flat [N]`` this replica's own weights."""
        for parameter, part in self.parts(flat):
            parameter.copy_(part)

    def parts(self, flat: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Every parameter with its part of ``flat [N]``."""
        sizes = [p.numel() for p in self.parameters]
        for parameter, part in zip(self.parameters, flat.split(sizes), strict=True):
            yield parameter, part.view_as(parameter)


@dataclass
class _Fragment:
    """A part of the model that meets at once.

    Attributes:
        pieces: Its parameters.
        rounds: Outer steps so far.
        met: Local step that the last one reaches to.
        sent: Local step at which it was sent, while it is under way.
        arriving: The thread's work then; what it has counted.
    """

    pieces: list[_Piece]
    rounds: int = 0
    met: int = 0
    sent: int | None = None
    arriving: Future[StepTraffic] | None = field(default=None, repr=False)


class Outer:
    """The weights that all replicas agree on, and the steps that move them.

    Args:
        parameters: This replica's trained parameters by name; equal on all replicas.
        meetings: See ``Meetings``.
        reduce: See ``Reduce``.
        traffic: This rank's counters.
        group: The replicas; with ``meetings.delay`` a group for this alone, since it is used from another thread.
        unit_numel: Elements that are reduced at once, at most, where no parameter has more.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        meetings: Meetings,
        reduce: Reduce,
        traffic: Traffic,
        group: dist.ProcessGroup | None = None,
        unit_numel: int = 25 << 18,
    ) -> None:
        self.meetings, self.reduce, self.traffic = meetings, reduce, traffic
        self.step = 0
        self.apart = False  # whether replicas have trained since they last agreed on the whole model
        self.parameters = dict(parameters)
        self._own: list[Tensor] | None = None  # this replica's weights while the common ones stand in their place
        device = next(iter(parameters.values())).device
        self._worker = ThreadPoolExecutor(1, "outer") if meetings.delay else None
        self._stream = torch.cuda.Stream(device) if meetings.delay and device.type == "cuda" else None
        self._aside = Traffic()  # the thread counts for itself
        counters = self._aside if meetings.delay else traffic
        self.fragments = []
        for number, some in enumerate(_cut(list(parameters.items()), meetings.fragments)):
            label = f"fragment {number} unit" if meetings.fragments > 1 else "unit"
            held = enumerate(_fill(some, unit_numel))
            self.fragments.append(_Fragment([_piece(f"{label} {i}", own, group, counters) for i, own in held]))

    @property
    def units(self) -> list[Unit]:
        """What is reduced on its own."""
        return [piece.unit for piece in self._pieces()]

    def _pieces(self) -> list[_Piece]:
        return [piece for fragment in self.fragments for piece in fragment.pieces]

    @torch.no_grad()
    def stepped(self) -> None:
        """A local step has been made: take up what is through by now, and send what is due."""
        self.step += 1
        self.apart = True
        for number, fragment in enumerate(self.fragments):
            if fragment.sent is not None and self.step - fragment.sent >= self.meetings.delay:
                self._take_up(fragment, self.meetings.alpha)
            if self.meetings.due(number, self.step):
                self._send(fragment)
                if not self.meetings.delay:
                    self._take_up(fragment, self.meetings.alpha)
                    self.apart = len(self.fragments) > 1 or self.meetings.alpha > 0

    @torch.no_grad()
    def finish(self) -> None:
        """Let all replicas agree on the whole model now, and begin a round; nothing to do where they agree."""
        if not self.apart:
            return
        for fragment in self.fragments:
            if fragment.sent is not None:
                self._take_up(fragment, self.meetings.alpha)
            if fragment.met < self.step:
                self._send(fragment)
                self._take_up(fragment, 0.0)
        self.step = -(-self.step // self.meetings.every) * self.meetings.every
        for fragment in self.fragments:
            fragment.met = self.step
        for piece in self._pieces():
            piece.put(piece.weights)
        self.apart = False

    def _send(self, fragment: _Fragment) -> None:
        for piece in fragment.pieces:
            # a replica began where its own dtype can stand: what rounding took away there is no progress
            begun = [part.to(p.dtype).float().flatten() for p, part in piece.parts(piece.weights)]
            piece.delta = torch.cat(begun).sub_(piece.local())
        fragment.sent = self.step
        if self._worker is None:
            self._reduce(fragment)
            return
        begun_on = torch.cuda.current_stream() if self._stream is not None else None

        def away() -> StepTraffic:
            with torch.no_grad(), torch.cuda.stream(self._stream) if self._stream is not None else nullcontext():
                if self._stream is not None and begun_on is not None:
                    self._stream.wait_stream(begun_on)
                self._reduce(fragment)
            return self._aside.take()

        fragment.arriving = self._worker.submit(away)

    def _reduce(self, fragment: _Fragment) -> None:
        for piece in fragment.pieces:
            if piece.delta is not None:
                self.reduce(piece.unit, piece.delta, fragment.rounds)

    def _await(self, fragment: _Fragment) -> None:
        """Until a part that is under way has arrived."""
        if fragment.arriving is not None:
            counted, fragment.arriving = fragment.arriving.result(), None
            self.traffic.absorb(counted)
            if self._stream is not None:
                torch.cuda.current_stream().wait_stream(self._stream)

    def _take_up(self, fragment: _Fragment, alpha: float) -> None:
        """One outer step of a part.

        Raises:
            FloatingPointError: The mean pseudo-gradient is not finite; on all replicas.
        """
        self._await(fragment)
        deltas = [piece.delta for piece in fragment.pieces if piece.delta is not None]
        if not torch.stack([delta.isfinite().all() for delta in deltas]).all():
            raise FloatingPointError(
                f"the replicas' mean pseudo-gradient is not finite after local step {self.step}: one of them has "
                "diverged. Go on from a checkpoint with a lower learning rate, or with GradientGuard.nonfinite=skip"
            )
        for piece, delta in zip(fragment.pieces, deltas, strict=True):
            # torch.optim.SGD with nesterov=True, on flat tensors
            piece.velocity.mul_(self.meetings.momentum).add_(delta)
            piece.weights.sub_(delta.add_(piece.velocity, alpha=self.meetings.momentum), alpha=self.meetings.lr)
            piece.delta = None
            piece.put(torch.lerp(piece.weights, piece.local(), alpha) if alpha else piece.weights)
        fragment.rounds, fragment.met, fragment.sent = fragment.rounds + 1, fragment.sent or self.step, None

    # The weights that all agree on, in the replica's place.

    @torch.no_grad()
    def show(self) -> bool:
        """Put the common weights in place of this replica's own; False where they stand there already."""
        if self._own is not None:
            return False
        self._own = [p.detach().clone() for p in self.parameters.values()]
        for piece in self._pieces():
            piece.put(piece.weights)
        return True

    @torch.no_grad()
    def hide(self) -> None:
        """Undo ``show``."""
        for parameter, own in zip(self.parameters.values(), self._own or (), strict=True):
            parameter.copy_(own)
        self._own = None

    # Checkpoints.

    def state_dict(self) -> dict[str, Any]:
        """What all replicas agree on: plain tensors and numbers."""
        for fragment in self.fragments:
            self._await(fragment)
        pieces = self._pieces()
        return {
            "step": self.step,
            "every": self.meetings.every,
            "apart": self.apart,
            "fragments": [{name: getattr(fragment, name) for name in _COUNTS} for fragment in self.fragments],
            "layout": [[p.fqn for p in unit.parameters] for unit in self.units],
            "weights": [None if piece.exact else piece.weights for piece in pieces],  # exact ones are the model's
            "velocity": [piece.velocity for piece in pieces],
            "arrived": [piece.delta for piece in pieces],
        }

    def own_weights(self) -> dict[str, Tensor]:
        """This replica's weights by name."""
        own = self._own if self._own is not None else [p.detach() for p in self.parameters.values()]
        return dict(zip(self.parameters, own, strict=True))

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any], own: Mapping[str, Tensor] | None) -> None:
        """See ``state_dict`` and ``own_weights``; without ``own`` the replica begins with the common weights.

        Raises:
            ValueError: The state is of other parts of the model, or of the middle of a round of another length.
        """
        if state["layout"] != [[p.fqn for p in unit.parameters] for unit in self.units]:
            raise ValueError("it holds the model in other parts: give num_fragments and bucket_cap_mb as they were")
        same = state["every"] == self.meetings.every
        if state["apart"] and not same:
            raise ValueError(f"it was saved in the middle of a round: give sync_every={state['every']}, as it was")
        for fragment, counts in zip(self.fragments, state["fragments"], strict=True):
            for name in _COUNTS:
                setattr(fragment, name, counts[name])
            fragment.met = fragment.met if same else 0
        self.step, self.apart = state["step"] if same else 0, state["apart"]
        saved = zip(state["weights"], state["velocity"], state["arrived"], strict=True)
        for piece, (weights, velocity, arrived) in zip(self._pieces(), saved, strict=True):
            if weights is not None:
                piece.weights.copy_(weights)
            piece.velocity.copy_(velocity)
            piece.delta = None if arrived is None else arrived.to(piece.weights.device, copy=True)
            piece.put(piece.weights)
        for name, weight in (own or {}).items():
            self.parameters[name].copy_(weight)

    @torch.no_grad()
    def agree(self) -> None:
        """Take this replica's weights for those that all agree on: a round begins."""
        for piece in self._pieces():
            piece.weights.copy_(piece.local())

    def close(self) -> None:
        """End the thread; what is under way is given up."""
        if self._worker is not None:
            self._worker.shutdown(wait=False, cancel_futures=True)


def _piece(label: str, held: Named, group: dist.ProcessGroup | None, traffic: Traffic) -> _Piece:
    slices, offset = [], 0
    for name, parameter in held:
        slices.append(ParameterSlice(name, tuple(parameter.shape), offset))
        offset += parameter.numel()
    weights = torch.cat([p.detach().float().flatten() for _, p in held])
    parameters = [parameter for _, parameter in held]
    return _Piece(Unit(label, slices, offset, group, traffic), parameters, weights, torch.zeros_like(weights))


def _cut(parameters: Named, fragments: int) -> Iterator[Named]:
    """Consecutive parameters in ``fragments`` parts of about equal size; in fewer where there are too few."""
    left = sum(p.numel() for _, p in parameters)
    part: Named = []
    size, target = 0, left / fragments
    for name, parameter in parameters:
        if part and size + parameter.numel() / 2 > target and fragments > 1:
            yield part
            left, fragments = left - size, fragments - 1
            part, size, target = [], 0, left / fragments
        part.append((name, parameter))
        size += parameter.numel()
    yield part


def _fill(parameters: Named, numel: int) -> Iterator[Named]:
    """Consecutive parameters in units of at most ``numel`` elements, or of one parameter."""
    unit: Named = []
    for name, parameter in parameters:
        if unit and sum(p.numel() for _, p in unit) + parameter.numel() > numel:
            yield unit
            unit = []
        unit.append((name, parameter))
    yield unit
