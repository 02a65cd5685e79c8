"""How much memory each step of pruning takes at its peak, by arithmetic: nothing is loaded.

Counted are tensors on the device that computes, the models included. Workspaces of libraries, the allocator's rounding
and the interpreter come on top. An attention kernel is taken for granted that keeps no matrix of tokens by tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lightning_modules.structured_pruning.footprint import parameters_of
from lightning_modules.structured_pruning.layers import LayerShape
from lightning_modules.structured_pruning.model_shape import ModelShape
from lightning_modules.structured_pruning.plan import LayerPlan

DOUBLE, SINGLE = 8, 4


@dataclass(frozen=True)
class Workload:
    """A model and the text that it is pruned on.

    Attributes:
        model: Its layers, and what is outside of them.
        hidden: Hidden size.
        vocabulary: Tokens that the head tells apart.
        batch_tokens: Tokens of one calibration batch.
        calibration_tokens: Tokens of all calibration text.
        verify_tokens: Tokens of the text that verification compares logits on.
        probe_tokens: Tokens of all text that shapes are tried on; 0 where none are.
        probe_batch_tokens: The same of one batch of it.
        refit_tokens: Tokens that tried shapes are refitted on; 0 where they are not.
    """

    model: ModelShape
    hidden: int
    vocabulary: int
    batch_tokens: int
    calibration_tokens: int
    verify_tokens: int
    probe_tokens: int = 0
    probe_batch_tokens: int = 0
    refit_tokens: int = 0

    @property
    def shapes(self) -> list[LayerShape]:
        """Of the model's layers."""
        return self.model.shapes

    def states(self, tokens: int) -> int:
        """Bytes of one hidden state for so many tokens."""
        return tokens * self.hidden * self.model.bytes_per_parameter

    def forward(self, tokens: int, wide: int = 3) -> int:
        """Bytes of activations that a forward pass over a batch holds at once, without logits.

        Args:
            tokens: Of the batch.
            wide: Activations as wide as the MLP: two factors and their product.
        """
        widest = max(wide * shape.channels for shape in self.shapes) + 3 * self.hidden
        return tokens * widest * self.model.bytes_per_parameter

    def loss(self, tokens: int) -> int:
        """Bytes that a pass over a batch holds at once when nothing but its loss is asked for.

        That is activations; or logits, these in float32 where they are not, and their log-probabilities.
        """
        size = self.model.bytes_per_parameter
        return max(self.forward(tokens), tokens * self.vocabulary * (size + SINGLE * (size < SINGLE) + SINGLE))

    def backward(self, gates: bool) -> int:
        """Bytes that a forward and backward pass over a batch hold at once, no weight wanting a gradient.

        The norms keep what they are given, in float32; attention its queries, keys, values and output; the MLP three
        of its four wide activations. Of the loss there are log-probabilities and two gradients, in float32.

        Args:
            gates: The inputs of ``o_proj`` and ``down_proj`` are kept, too.
        """
        kept = 0
        for shape in self.shapes:
            heads, keys = (shape.groups * count * shape.head_dim for count in (shape.n_rep, 1))
            attention = 2 * heads + 2 * keys + gates * heads
            kept += 2 * self.hidden * SINGLE
            kept += (attention + (3 + gates) * shape.channels) * self.model.bytes_per_parameter
        return self.batch_tokens * (kept + 3 * self.vocabulary * SINGLE)


def peaks(work: Workload, kept: Sequence[LayerPlan], importance: Any, compensation: Any) -> dict[str, int]:
    """Most bytes that each step holds at once.

    Args:
        work: The model and its text.
        kept: What a plan keeps.
        importance: See ``Importance.memory``.
        compensation: See ``Compensation.memory``.

    Returns:
        Bytes by step: "load", "perplexity" (before and after, on batches of the calibration's size), "score", "slice",
        "compensate", "verify"; and, where shapes are tried, "probe layers" and "try shapes".
    """
    size = work.model.bytes_per_parameter
    whole = work.model.footprint(1).weight_bytes
    layers = work.model.footprint(1, kept).decoder_parameters * size  # the rest is shared
    pairs = list(zip(kept, work.shapes, strict=True))
    widest = max(max(len(k.channels), len(k.queries(s.n_rep)) * s.head_dim) for k, s in pairs)
    logits = work.verify_tokens * work.vocabulary * DOUBLE
    # in float64: of the dense model, with parts zeroed, of the slice and of the control, then two differences of them;
    # or the head, or a layer and its activations, before the last of them are there
    sliced = max(_wide(work, s, len(k.groups), len(k.channels)) for k, s in pairs if not k.dropped)
    with_slice = layers + max(6 * logits, 4 * logits + DOUBLE * work.model.head_parameters, 3 * logits + sliced)
    dense = work.model.footprint(1).decoder_parameters * size - layers  # what is zeroed, to be put back
    dense += logits + max(_wide(work, s, s.groups, s.channels) for s in work.shapes)
    pruned = whole - work.model.footprint(1).decoder_parameters * size + layers
    tried = {}
    if work.probe_tokens:
        loss = work.loss(work.probe_batch_tokens)
        inputs = max(max(s.channels, s.groups * s.n_rep * s.head_dim) for s in work.shapes)  # where layers go whole
        # what enters a layer, and what entered the one before
        tried["probe layers"] = whole + loss + 2 * work.states(work.probe_tokens)
        refit = compensation.quick().memory(inputs, work.hidden, work.states(work.refit_tokens))
        tried["try shapes"] = whole + max(loss, (layers + max(refit, loss)) * (work.refit_tokens > 0))
    return {
        "load": whole,
        # after, what has been written is loaded again beside what was written
        "perplexity": max(whole, 2 * pruned) + work.loss(work.batch_tokens),
        **tried,
        "score": whole + importance.memory(work),
        "slice": whole + layers,
        "verify": whole + max(with_slice, dense),
        "compensate": whole + layers + compensation.memory(widest, work.hidden, work.states(work.calibration_tokens)),
    }


def _wide(work: Workload, shape: LayerShape, groups: int, channels: int) -> int:
    """Bytes of a layer in float64 with the activations of the text that logits are compared on."""
    activations = work.verify_tokens * (4 * channels + 3 * work.hidden)
    return DOUBLE * (parameters_of(shape, groups, channels) + activations)
