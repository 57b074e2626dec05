"""solo-learn: the functions of its repository, and those of its release where the two differ."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from . import Case, Draw, Problem, clone, original


@cache
def originals() -> SimpleNamespace:
    """The functions of both, of which one name means two: ``two_view_simclr_loss_func`` is the release's.

    Raises:
        ImportError: the repository, the release, or a module that the repository's file of helpers imports is missing.
    """
    functions = SimpleNamespace()
    with _bare(_folder("solo-learn", "mocov2plus")):
        for name in ("simclr", "mocov2plus", "mocov3", "nnclr", "byol", "simsiam"):
            setattr(functions, f"{name}_loss_func", getattr(import_module(f"solo.losses.{name}"), f"{name}_loss_func"))
    with _bare(_folder("solo-learn-1.0.2", "moco")):
        functions.moco_loss_func = import_module("solo.losses.moco").moco_loss_func
        simclr = import_module("solo.losses.simclr")
        functions.two_view_simclr_loss_func = simclr.simclr_loss_func
        functions.manual_simclr_loss_func = simclr.manual_simclr_loss_func
    return functions


def _folder(inside: str, has: str) -> str:
    """The package ``solo`` with a certain loss, in $FASTCL_UPSTREAM or installed."""
    installed = find_spec("solo")
    found = [clone(f"{inside}/solo"), *(installed.submodule_search_locations or [] if installed else [])]
    for folder in found:
        if os.path.exists(os.path.join(folder, "losses", f"{has}.py")):
            return folder
    raise ImportError(f"neither installed nor in $FASTCL_UPSTREAM/{inside}")


@contextmanager
def _bare(folder: str) -> Iterator[None]:
    """``solo`` without the code of its packages, which imports a trainer and all that this needs."""
    ours = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "solo"}
    for name in ours:
        del sys.modules[name]
    # solo.utils.misc can do without solo.data, which is not found
    for name, path in {"solo": "", "solo.losses": "losses", "solo.utils": "utils", "solo.data": "none"}.items():
        package = ModuleType(name)
        package.__path__ = [os.path.join(folder, path)]
        sys.modules[name] = package
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of timm, about the names by which it is imported
            yield
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] == "solo"]:
            del sys.modules[name]
        sys.modules.update(ours)


def _problem(leaves: list[Tensor], name: str, *args: Any, theirs: str = "", **options: Any) -> Problem:
    from fastcl.integrations import solo_learn

    def step(function: Any) -> Any:
        return lambda *rows: function(*rows, *args, **options)

    return Problem(leaves, step(getattr(solo_learn, name)), step(getattr(original("solo_learn"), theirs or name)))


def _temperature(draw: Draw, usual: float = 0.1) -> float:
    return draw.between(0.05, 1.0, usual)


def _half(draw: Draw) -> int:
    return max(draw.n // 2, 2)


def _views(draw: Draw) -> Problem:
    """n rows in all: some views of each image."""
    views = draw.choice(2, 3, usual=2)
    images = max(draw.n // views, 2)
    indexes = torch.arange(images).repeat(views)
    return _problem([draw.rows(images * views)], "simclr_loss_func", indexes, _temperature(draw))


def _labels(draw: Draw) -> Problem:
    labels = draw.labels(_half(draw)).repeat(2)
    return _problem([draw.rows(len(labels))], "simclr_loss_func", labels, temperature=_temperature(draw))


def _two_views(draw: Draw) -> Problem:
    leaves = [draw.rows(_half(draw)), draw.rows(_half(draw))]
    return _problem(leaves, "simclr_loss_func", _temperature(draw), theirs="two_view_simclr_loss_func")


def _extra_positives(draw: Draw) -> Problem:
    n = 2 * _half(draw)
    mask = torch.rand(n, n, generator=draw.generator) < 0.1
    leaves = [draw.rows(n // 2), draw.rows(n // 2)]
    return _problem(leaves, "simclr_loss_func", _temperature(draw), mask, theirs="two_view_simclr_loss_func")


def _manual(draw: Draw) -> Problem:
    n = max(draw.n, 4)
    chance = torch.rand(n, n, generator=draw.generator)
    positive, negative = chance < 0.2, (chance > 0.3) & (chance < 0.9)
    positive[0] = False
    positive[1, 1] = True
    return _problem([draw.rows(n)], "manual_simclr_loss_func", positive, negative, temperature=_temperature(draw))


def _moco(name: str) -> Any:
    def build(draw: Draw) -> Problem:
        """n keys in the queue, 256 queries."""
        queries = 256 if draw.usual else max(draw.n // 3, 1)
        queue = draw.units().detach().T.contiguous()
        return _problem([draw.units(queries), draw.units(queries)], name, queue, _temperature(draw))

    return build


def _pairs(name: str, usual: float) -> Any:
    return lambda draw: _problem([draw.rows(), draw.rows()], name, temperature=_temperature(draw, usual))


def _cosines(name: str) -> Any:
    return lambda draw: _problem([draw.rows(), draw.rows()], name, simplified=draw.choice(True, False, usual=True))


CASES = [
    Case("solo_learn", "simclr_loss_func", _views),
    Case("solo_learn", "simclr_loss_func, labels", _labels),
    Case("solo_learn", "simclr_loss_func of 1.0.2", _two_views),
    Case("solo_learn", "simclr_loss_func of 1.0.2, extra_pos_mask", _extra_positives, fused=False),
    Case("solo_learn", "manual_simclr_loss_func of 1.0.2", _manual, fused=False),
    Case("solo_learn", "moco_loss_func of 1.0.2", _moco("moco_loss_func")),
    Case("solo_learn", "mocov2plus_loss_func", _moco("mocov2plus_loss_func")),
    Case("solo_learn", "mocov3_loss_func", _pairs("mocov3_loss_func", 0.2)),
    Case("solo_learn", "nnclr_loss_func", _pairs("nnclr_loss_func", 0.1)),
    Case("solo_learn", "byol_loss_func", _cosines("byol_loss_func"), fused=False),
    Case("solo_learn", "simsiam_loss_func", _cosines("simsiam_loss_func"), fused=False),
]
