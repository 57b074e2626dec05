"""One exchange per step, over the CPU: what every rank is about to do, so that all go on or all raise the same error.

Collectives of unequal shapes hang or mix bytes. So before the first of a step every rank says what it has: loss and
options, shapes, dtypes, which tensors want gradients, or the error that keeps it from going on.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from .._checks import sentence
from ._wire import all_gather

_ROOM = 4096  # bytes of what a rank says
_companions: dict[Any, Any] = {}
_exchanges = 0


def over_cpu(group: Any) -> Any:
    """The group, or where it has no backend for CPU tensors another of the same ranks that has."""
    if "gloo" in str(dist.get_backend_config(group)):
        return group
    if group not in _companions:
        ranks = dist.get_process_group_ranks(group)
        _companions[group] = dist.new_group(ranks, backend="gloo", use_local_synchronization=True)
    return _companions[group]


def exchanged(mine: dict[str, Any], group: Any) -> list[dict[str, Any]]:
    """What every rank says, in the order of ranks."""
    global _exchanges
    _exchanges += 1
    text = json.dumps(mine).encode()
    if len(text) > _ROOM:
        got = f"{len(text)} bytes of arguments to compare with other ranks"
        told = sentence(got, f"at most {_ROOM}", "Pass even=True, which compares none.")
        text = json.dumps({"error": told}).encode()
    said = torch.zeros(_ROOM, dtype=torch.uint8)
    said[: len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    group = over_cpu(group)
    everyone = torch.empty(dist.get_world_size(group) * _ROOM, dtype=torch.uint8)
    all_gather(everyone, said, group=group)
    return [json.loads(bytes(part[part != 0].tolist())) for part in everyone.view(-1, _ROOM)]


@torch.compiler.disable  # collectives whose shapes come from other ranks make no graph
def together(ranks: Any, call: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Calls something that calls a loss. What fails on one rank, before it could tell the others, fails on all.

    Raises:
        ValueError: in the words of the rank that cannot go on, on all.
    """
    before = _exchanges
    try:
        return call(*args, **options)
    except (TypeError, ValueError) as error:
        if ranks.even or _exchanges > before or dist.get_world_size(ranks.process_group) == 1:
            raise
        try:
            agree({"error": str(error)}, ranks.process_group)
        except ValueError as told:
            raise told from error


def agree(mine: dict[str, Any], group: Any) -> list[dict[str, Any]]:
    """What every rank says, if they can go on together.

    Args:
        mine: ``error``, what keeps this rank from going on, or ``None``; else ``call``, ``options`` and ``tensors``:
            name -> (shape, dtype, whether it wants a gradient). Ranks may differ in the first number of a shape alone.

    Raises:
        ValueError: they cannot; in the same words on all ranks.
    """
    everyone = exchanged(mine, group)
    for rank, said in enumerate(everyone):
        if said["error"] is not None:
            raise ValueError(f"rank {rank} cannot go on, and so no rank does: {said['error']}")
    first = _comparable(everyone[0])
    for rank, said in enumerate(everyone[1:], 1):
        for what, value in _comparable(said).items():
            if first.get(what) != value:
                got = f"{what} = {value} on rank {rank} and {first.get(what)} on rank 0"
                raise ValueError(
                    sentence(got, "the same on all ranks", "Make it so: only the number of rows may differ.")
                )
        if missing := first.keys() - _comparable(said).keys():
            got = f"no {min(missing)} on rank {rank}, and one on rank 0"
            raise ValueError(sentence(got, "the same tensors on all ranks", "Pass it on all ranks or on none."))
    return everyone


def _comparable(said: dict[str, Any]) -> dict[str, Any]:
    values: dict[str, Any] = {"the loss": said["call"], **said["options"]}
    for name, (shape, dtype, _) in said["tensors"].items():
        values[f"the dtype of {name}"] = dtype
        values[f"the shape of {name} beyond its rows"] = shape[1:]
    return values
