"""Files that are either the old one or the new one, whatever happens while they are written."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import torch

from .errors import TrainError

FORMAT = 1


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write ``state`` (tensors and plain containers only) so that ``torch.load(path, weights_only=True)`` reads it."""
    write_atomically(path, lambda file: torch.save({"format": FORMAT, **state}, file))


def load_checkpoint(path: Path) -> dict[str, Any]:
    """What :func:`save_checkpoint` wrote, on the CPU.

    Raises:
        TrainError: there is no file, it is damaged, or a newer fastcl wrote it.
    """
    if not path.is_file():
        raise TrainError(
            f"got no {path.name} in {path.parent}; expected a run with a checkpoint. Start one with: fastcl train"
        )
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        version = state["format"]
    except Exception as error:  # torch.load raises almost anything for a damaged file
        reason = str(error).partition("\n")[0]
        raise TrainError(
            f"{path} cannot be read ({type(error).__name__}: {reason}). Start the run again with --overwrite."
        ) from error
    if version != FORMAT:
        raise TrainError(f"got {path} of format {version}; expected {FORMAT}. Use the fastcl that wrote it.")
    return state


def write_json(path: Path, value: object) -> None:
    """``value`` as indented JSON."""
    write_atomically(path, lambda file: file.write((json.dumps(value, indent=2) + "\n").encode()))


def write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Call ``write`` with a temporary file in the same folder and, once it is on the disk, rename it to ``path``."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    if hasattr(os, "O_DIRECTORY"):  # the rename itself must reach the disk too; Windows has no way to ask
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
