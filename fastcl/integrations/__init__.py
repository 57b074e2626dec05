"""Drop-ins for the losses of other libraries: change one import line, or patch the library in place.

``from fastcl.integrations.lightly import NTXentLoss`` instead of ``from lightly.loss import NTXentLoss``, or, at the
top of a script that is to stay as it is::

    fastcl.integrations.patch("lightly")

or without touching it at all: ``python -m fastcl.integrations lightly train.py --its-own arguments``, under
``torchrun`` likewise with ``-m``.
"""

from __future__ import annotations

import inspect
import sys
from functools import partial, wraps
from importlib import import_module
from types import ModuleType
from typing import Any

from .. import _checks
from .._checks import sentence
from ._dropin import DropIn

LIBRARIES = (
    "lightly",
    "pytorch_metric_learning",
    "open_clip",
    "sentence_transformers",
    "solo_learn",
    "sup_contrast",
    "grad_cache",
    "inf_cl",
)

__all__ = ["LIBRARIES", "Patch", "patch"]


class Patch:
    """What :func:`patch` did. Undone by :meth:`undo`, or at the end of a ``with`` block.

    Attributes:
        replaced: what was replaced, as ``module.name``, where the library defines it.
    """

    def __init__(self) -> None:
        self.replaced: list[str] = []
        self._undo: list[tuple[Any, str, Any, Any]] = []

    def undo(self) -> None:
        """Put the originals back where they were. Objects that were made in between stay what they are."""
        while self._undo:
            owner, name, before, after = self._undo.pop()
            if vars(owner).get(name) is after:
                setattr(owner, name, before)

    def __enter__(self) -> Patch:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()

    def __repr__(self) -> str:
        return f"fastcl replaced {', '.join(self.replaced) or 'nothing'}"

    def _set(self, owner: Any, name: str, after: Any) -> None:
        self._undo.append((owner, name, getattr(owner, name), after))
        setattr(owner, name, after)

    def _swap(self, original: Any, ours: Any) -> None:
        """In every module that has the original under any name: the library's own and those of the user."""
        for module in list(sys.modules.values()):
            if not isinstance(module, ModuleType) or module.__name__.partition(".")[0] == __name__.partition(".")[0]:
                continue
            for name in [name for name, value in list(vars(module).items()) if value is original]:
                self._set(module, name, ours)
        self.replaced.append(f"{original.__module__}.{original.__qualname__}")


def patch(*libraries: str, strict: bool = False, verbose: bool = True) -> Patch:
    """Swap the losses of libraries for their drop-ins, in place, in every module that is loaded.

    Objects that exist already stay what they are, so patch before losses are made.

    Args:
        libraries: of :data:`LIBRARIES`.
        strict: drop-ins made from now on keep the numbers of the originals also where they are wrong.
        verbose: say on stderr what was replaced.

    Returns:
        What was replaced; a context manager that puts the originals back.

    Raises:
        ValueError: a library without drop-ins.
        ImportError: a library that is not installed. Nothing is replaced then.
    """
    _checks.flag(strict=strict, verbose=verbose)
    for library in libraries:
        if library not in LIBRARIES:
            raise ValueError(
                sentence(
                    f"the library {library!r}",
                    f"one of {', '.join(LIBRARIES)}",
                    "Use its import name, with underscores.",
                )
            )
    found = [(import_module(f"{__name__}.{library}"), library) for library in libraries]
    originals = [(module, _originals(module, library)) for module, library in found]
    done = Patch()
    for module, theirs in originals:
        for name, original in theirs.items():
            ours = getattr(module, name)
            if isinstance(ours, type) and issubclass(ours, DropIn):
                done._set(ours, "strict", strict)
            elif strict and "strict" in inspect.signature(ours).parameters:
                ours = wraps(ours)(partial(ours, strict=True))
            if original is not ours:
                done._swap(original, ours)
    if verbose:
        print(done, file=sys.stderr)
    return done


def _originals(module: Any, library: str) -> dict[str, Any]:
    try:
        theirs = import_module(module.UPSTREAM)
    except ModuleNotFoundError as error:
        raise ImportError(
            sentence(
                f"no module {error.name}", f"{library}, whose losses are to be replaced", f"Get it: {module.ORIGIN}."
            )
        ) from error
    return {name: getattr(theirs, name) for name in module.__all__ if hasattr(theirs, name)}
