"""Runs of the trainer that end badly: ``python -m tests.trainer.killed FOLDER SEED``, and how each of them ended.

Each is a fork of this process, before torch has started a thread, because importing takes longer than the runs.
"""

from __future__ import annotations

import dataclasses
import io
import os
import random
import resource
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fastcl.trainer import TrainConfig, TrainError, checkpoint, loop, resume, train

from .conftest import SHORT

FULL = 3  # exit code of a run that said in words that the disk is full


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def at_step(count: int) -> None:
    """In the middle of the run's ``count``-th step: its gradients are there, its weights have not moved."""
    step, steps = torch.optim.AdamW.step, iter(range(1, 1000))

    def killed(*args: Any) -> Any:
        return kill() if next(steps) == count else step(*args)

    torch.optim.AdamW.step = killed  # type: ignore[method-assign]


def in_write(share: float) -> None:
    """When this share of a checkpoint is in its file."""
    save = torch.save

    def killed(state: Any, file: Any) -> None:
        whole = io.BytesIO()
        save(state, whole)
        file.write(whole.getvalue()[: int(share * len(whole.getvalue()))])
        file.flush()
        kill()

    torch.save = killed


def before_rename() -> None:
    """When the checkpoint before has been set aside, and the new one has not got its name."""
    replace = os.replace

    def killed(source: Path, target: Path) -> None:
        if target.name == "checkpoint.pt":
            kill()
        replace(source, target)

    checkpoint.os.replace = killed  # type: ignore[attr-defined]


def full_disk() -> None:
    """From the second checkpoint on no file may grow beyond a megabyte, which is less than a checkpoint."""
    save, saves = loop.save_checkpoint, iter(range(1, 1000))

    def limited(path: Path, state: dict[str, Any]) -> None:
        if next(saves) == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))
        save(path, state)

    loop.save_checkpoint = limited


def main(folder: Path, seed: int) -> None:
    """A run that is killed and resumed until it is at its end but for a few steps, and one on a full disk."""
    draw = random.Random(seed)
    config = TrainConfig(method="moco", queue_size=100, output=str(folder / "killed"), **SHORT)
    full = dataclasses.replace(config, output=str(folder / "full"))
    again = partial(resume, folder / "killed")
    fork(partial(at_step, draw.randint(9, 16)), partial(train, config))  # behind the checkpoint of step 8
    fork(partial(in_write, draw.random()), again)  # of step 16
    fork(before_rename, again)
    fork(partial(at_step, draw.randint(9, 16)), again)  # behind the checkpoint of step 16
    fork(full_disk, partial(train, full))


def fork(prepare: Callable[[], None], run: Callable[[], object]) -> None:
    child = os.fork()
    if child == 0:
        prepare()
        try:
            run()
        except TrainError as error:
            print(error, flush=True)
            os._exit(FULL)
        os._exit(0)
    print("ended", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
