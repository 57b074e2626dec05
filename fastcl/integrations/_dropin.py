"""What drop-ins share: a drop-in is a subclass of the class whose name it bears, and replaces its quadratic part."""

from __future__ import annotations

import inspect
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .._checks import sentence


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
