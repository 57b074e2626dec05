"""Files that are either the old one or the new one, whatever happens while they are written."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor, nn

from .errors import TrainError

# 2: a digest; 3: views by image, the shape of the images, and which of them are broken; 4: all pixels tell data apart
FORMAT = 4
CHECKPOINT = "checkpoint.pt"  # in the folder of a run
_SHOWN = 300  # characters of what differs


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write ``state`` (tensors and plain containers only) so that ``torch.load(path, weights_only=True)`` reads it.

    The checkpoint that was there is kept beside it as the previous one. Whenever this is cut off, one of them is whole.

    Raises:
        TrainError: a tensor of it is not finite, or there is no room; the checkpoints stay as they are then.
    """
    for name, value in _leaves(state):
        if isinstance(value, Tensor) and value.is_floating_point() and not bool(value.isfinite().all()):
            raise TrainError(
                f"got {name} with numbers that are not finite; expected finite ones in a checkpoint. The last one is "
                f"in {path.parent}, of before. Lower --learning-rate or raise --temperature."
            )
    state = {"format": FORMAT, **state}
    state["sha256"] = _digest(state)
    try:
        write_atomically(path, lambda file: torch.save(state, file), keep=_previous(path))
    except (OSError, RuntimeError) as error:  # torch wraps what its file raises
        raise no_room(path, error) from error


def no_room(path: Path, error: Exception) -> TrainError:
    """What to raise where a file of a run, without which it cannot go on, cannot be written."""
    reason = error.__context__ if isinstance(error.__context__, OSError) else error
    first_line = str(reason).partition("\n")[0]
    return TrainError(
        f"{path} cannot be written ({first_line}); expected room for it. The last checkpoint is whole: make room, then "
        f"go on with: fastcl train --resume {path.parent}"
    )


def load_checkpoint(path: Path, *, repair: bool = True) -> dict[str, Any]:
    """What :func:`save_checkpoint` wrote last, on the CPU.

    Where that is damaged it is the one before: the damaged file is then renamed, so that it does not become the
    previous one of the next, and a line on stderr says so. Of several processes that read it one may ``repair`` so,
    while the others read; whatever it has done by then, they find the same one.

    Raises:
        TrainError: there is none, all are damaged, or another fastcl wrote them.
    """
    previous = _previous(path)
    if not path.is_file() and previous.is_file():  # the rotation was cut off
        return _read(previous)
    try:
        return _read(path)
    except TrainError as error:
        if not previous.is_file():
            raise
        try:
            state = _read(previous)
        except TrainError:
            raise error from None
        if not repair:
            return state
        aside = path.with_name("damaged-" + path.name)
        os.replace(path, aside)
        print(f"warning: {error} It is now {aside.name}; {previous.name} is used in its place.", file=sys.stderr)
        return state


def has_checkpoint(folder: Path) -> bool:
    """Whether a run has come to one, so that it can go on."""
    path = folder / CHECKPOINT
    return path.is_file() or _previous(path).is_file()


def restore(network: nn.Module, weights: Mapping[str, Any], source: Path | str) -> None:
    """Load the state dict ``weights`` of the checkpoint ``source`` into a network that must be the one it is of.

    Raises:
        TrainError: it is another one; the message begins to say where.
    """
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        _, *differences = str(error).splitlines()
        raise TrainError(
            f"the weights of {source} do not fit the network ({' '.join(differences).strip()[:_SHOWN]}...); expected "
            "the encoder that the run had. Give that one, with the same version of its library."
        ) from error


def _read(path: Path) -> dict[str, Any]:
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
    digest = state.pop("sha256", None)
    if digest != _digest(state):
        raise TrainError(
            f"{path} cannot be read (its content does not match its digest). Start the run again with --overwrite."
        )
    return state


def _previous(path: Path) -> Path:
    return path.with_name("previous-" + path.name)


def _digest(state: dict[str, Any]) -> str:
    """SHA-256 of names, types, shapes and bytes of everything in ``state``, whatever the file round them."""
    sha = hashlib.sha256()
    for name, value in _leaves(state):
        if isinstance(value, Tensor):
            sha.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            sha.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        else:
            sha.update(f"{name} {value!r}".encode())
    return sha.hexdigest()


def _leaves(value: Any, name: str = "state") -> Iterator[tuple[str, Any]]:
    """Everything in nested containers that is not a container with something in it, and the way to it."""
    if isinstance(value, (dict, list, tuple)) and value:
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _leaves(part, f"{name}.{type(value).__name__}[{key!r}]")
    else:
        yield name, value


def write_json(path: Path, value: object) -> None:
    """``value`` as indented JSON."""
    write_atomically(path, lambda file: file.write((json.dumps(value, indent=2) + "\n").encode()))


def write_atomically(path: Path, write: Callable[[IO[bytes]], object], keep: Path | None = None) -> None:
    """Call ``write`` with a temporary file in the same folder and, once it is on the disk, rename it to ``path``.

    What was there is renamed to ``keep`` before, where that is given.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        temporary.unlink(missing_ok=True)  # part of a file takes room that there may not be
        raise
    if keep is not None and path.exists():
        os.replace(path, keep)
    os.replace(temporary, path)
    if hasattr(os, "O_DIRECTORY"):  # the rename itself must reach the disk too; Windows has no way to ask
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
