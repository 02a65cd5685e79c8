"""A teacher beside a student that was cut out of it: what is equal in both is held once."""

from typing import Any

import torch
from torch import nn


def share_equal(teacher: Any, student: Any) -> int:
    """Let the teacher use the student's own parameters wherever they are the same numbers.

    Pruning leaves embeddings, head and norms as they were, and most often whole projections. Both stay as they are, for
    neither is trained: adapters lie beside. They are the same objects afterwards, so that they also move to a device as
    one.

    Args:
        teacher: The dense model, frozen; its parameters are replaced.
        student: The pruned model, whose weights are frozen; adapters beside them may be trained.

    Returns:
        Bytes of the teacher that are not held any more.
    """
    own: dict[tuple[Any, ...], list[nn.Parameter]] = {}
    for parameter in student.parameters():
        if not parameter.requires_grad:
            own.setdefault(_kind(parameter), []).append(parameter)
    shared = 0
    replaced: dict[int, nn.Parameter] = {}  # tied weights of the teacher stay tied
    for module in teacher.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            twin = replaced.get(id(parameter))
            if twin is None:
                alike = own.get(_kind(parameter), [])
                place = next((i for i, one in enumerate(alike) if torch.equal(one, parameter)), None)
                if place is None:
                    continue
                twin = replaced[id(parameter)] = alike.pop(place)  # once: equal norms stay apart
                shared += parameter.nbytes
            setattr(module, name, twin)
    return shared


def _kind(parameter: nn.Parameter) -> tuple[Any, ...]:
    """What equal parameters have in common; a corner of their numbers spares most comparisons of the rest."""
    corner = parameter.detach().flatten()[:4].float().tolist()
    return (tuple(parameter.shape), parameter.dtype, parameter.device, tuple(corner))
