"""What drop-ins share: a drop-in is a subclass of the class whose name it bears, and replaces its quadratic part."""

from __future__ import annotations

import inspect
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import embedding, logsigmoid

from .._checks import Scalar, sentence
from ..distributed import Wire
from ..distributed import gathered as rows_of_ranks
from ..pairwise import contrastive, pair_logsumexp, row_dot


def upstream(module: str, origin: str) -> ModuleType:
    """A module of the library that a drop-in stands in for.

    Raises:
        ImportError: the library is not installed; its own reason where it is but does not load.
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module.partition(".")[0]:
            raise
        raise ImportError(
            sentence(f"no module {error.name}", "the library whose losses are replaced", f"Get it: {origin}.")
        ) from error


class DropIn:
    """First base of a drop-in: takes ``strict`` beside the arguments of the class that it stands in for.

    Attributes:
        strict: keep the numbers of the original also where they are wrong, as far as that can be had; documented at
            every drop-in. ``False`` unless given or set by :func:`fastcl.integrations.patch`.
    """

    strict: bool = False

    def __init__(self, *args: Any, strict: bool | None = None, **options: Any) -> None:
        super().__init__(*args, **options)
        self.strict = type(self).strict if strict is None else strict

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if DropIn in cls.__bases__:  # users' own subclasses have signatures of their own
            original = inspect.signature(next(base for base in cls.__mro__[1:] if not issubclass(base, DropIn)))
            strict = inspect.Parameter("strict", inspect.Parameter.KEYWORD_ONLY, default=None)
            cls.__signature__ = original.replace(  # type: ignore[attr-defined]
                parameters=sorted([*original.parameters.values(), strict], key=lambda parameter: parameter.kind)
            )


def as_original(loss: Tensor, *inputs: Tensor) -> Tensor:
    """A loss in the dtype that plain torch gives it: that of the inputs, or fp32 under autocast."""
    if torch.is_autocast_enabled(inputs[0].device.type):
        return loss
    dtype = inputs[0].dtype
    for other in inputs[1:]:
        dtype = torch.promote_types(dtype, other.dtype)
    return loss.to(dtype)


def image_ids(batch: int, rank: int, world_size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Numbers of the rows of this rank among those of all ranks, and the numbers of all."""
    everyone = torch.arange(batch * world_size, device=device)
    return everyone[rank * batch : (rank + 1) * batch], everyone


def ranks() -> tuple[int, int]:
    """Number of this rank, and of all ranks; ``(0, 1)`` where torch.distributed is not initialised."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def gathered(x: Tensor, group: Any = None) -> Tensor:
    """Rows of all ranks, in their order: ``(W B, ...)`` of ``(B, ...)``, the same shape and dtype on every rank.

    The gradient is the sum of those that all ranks have for the rows of this one, so every rank must run the backward
    pass. Integers have none.
    """
    wire = Wire(dist.group.WORLD if group is None else group)
    return rows_of_ranks(x, [len(x)] * wire.size, wire)


def softmax_rows(q: Tensor, k: Tensor, target: Tensor | None = None, *, scale: Scalar) -> Tensor:
    """Cross-entropy of the softmax over ``scale * q @ k.T``, without that matrix.

    Args:
        q: ``(M, D)``.
        k: ``(N, D)``.
        target: ``(M,)`` integers in [0, N); row i itself when omitted, with M = N.

    Returns:
        ``(M,)``, fp32 or fp64.
    """
    own = torch.arange(len(k), device=k.device)
    if target is None:
        loss = contrastive(q, k, scale=scale)
        if loss is not None:
            return loss
        target, positive = own, k
    else:
        positive = embedding(target.long(), k)
    negatives = pair_logsumexp(q, k, scale=scale, drop=(target, own))
    return -logsigmoid(row_dot(q, positive) * scale - negatives)
