"""What a run uses of the machine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from .errors import TrainError


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """So many threads of torch inside; None leaves them as they are."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def usable_device(name: str) -> torch.device:
    """The device of this name.

    Raises:
        TrainError: torch cannot use it here.
    """
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise TrainError(
            f"got device {name!r}, which torch cannot use here ({reason}). Choose --device cpu."
        ) from error
    return device
