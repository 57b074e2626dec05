"""What can go wrong before and during a run, as sentences for the person at the terminal, and the optional packages."""

from __future__ import annotations

import importlib
from typing import Any


class TrainError(Exception):
    """A run cannot start or go on. The message says what came, what was expected and how to mend it."""


class MissingData(TrainError):
    """A data set is not there, or is not what it should be."""


class MissingPackage(TrainError):
    """An optional package is not installed, or is installed but broken."""


def need(module: str, purpose: str, mend: str = 'Install the extras: pip install "fastcl[train]".') -> Any:
    """Import an optional package when it is first needed.

    A package that is there but does not work counts as missing: torchvision, for one, raises RuntimeError on import
    when it was built for another torch.
    """
    try:
        return importlib.import_module(module)
    except Exception as error:
        package = module.partition(".")[0]
        first_line = str(error).partition("\n")[0]
        raise MissingPackage(
            f"{package} cannot be imported ({type(error).__name__}: {first_line}); {purpose} needs it. {mend}"
        ) from error
