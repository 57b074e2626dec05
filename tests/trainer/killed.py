"""Runs of the trainer that end badly: ``python -m tests.trainer.killed FOLDER SEED KILLS OPTIONS``, and how they ended.

Each is a fork of this process, before torch has started a thread, because importing takes longer than the runs.
"""

from __future__ import annotations

import io
import json
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

FULL = 3  # exit code of a run that said in words that the disk is full
EVERY = 2  # steps between checkpoints


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def in_step(killed: int) -> None:
    """In the middle of a step: its gradients are there, its weights have not moved."""
    step = torch.optim.AdamW.step

    def stepping(*args: Any) -> Any:
        return kill() if now[0] == killed else step(*args)

    now = at_steps(lambda number: None)
    torch.optim.AdamW.step = stepping  # type: ignore[method-assign]


def in_write(killed: int, share: float) -> None:
    """When this share of the first checkpoint from a step on is in its file."""
    save, now = torch.save, at_steps(lambda number: None)

    def saving(state: Any, file: Any) -> None:
        if now[0] < killed:
            return save(state, file)
        whole = io.BytesIO()
        save(state, whole)
        file.write(whole.getvalue()[: int(share * len(whole.getvalue()))])
        file.flush()
        kill()

    torch.save = saving


def before_rename(killed: int) -> None:
    """When the checkpoint before has been set aside, and the first from a step on has not got its name."""
    replace, now = os.replace, at_steps(lambda number: None)

    def replacing(source: Path, target: Path) -> None:
        if target.name == "checkpoint.pt" and now[0] >= killed:
            kill()
        replace(source, target)

    checkpoint.os.replace = replacing  # type: ignore[attr-defined]


def full_disk() -> None:
    """From the second checkpoint on no file may grow beyond a megabyte, which is less than a checkpoint."""
    save, saves = loop.save_checkpoint, iter(range(1, 1000))

    def limited(path: Path, state: dict[str, Any]) -> None:
        if next(saves) == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))
        save(path, state)

    loop.save_checkpoint = limited


def full_log() -> None:
    """From step 3 to 6 no file may grow beyond 64 bytes; the next checkpoint, of step 8, has room again."""
    most = resource.getrlimit(resource.RLIMIT_FSIZE)[1]

    def limit(step: int) -> None:
        if step in (3, 7):
            resource.setrlimit(resource.RLIMIT_FSIZE, (64 if step == 3 else most, most))

    at_steps(limit)


def at_steps(act: Callable[[int], None]) -> list[int]:
    """Calls ``act`` with the number of every step before it; what is given always holds the number of the last one."""
    rate, now = loop.learning_rate, [0]

    def asked(config: TrainConfig, step: int) -> float:
        now[0] = step
        act(step)
        return rate(config, step)

    loop.learning_rate = asked
    return now


def main(folder: Path, seed: int, kills: int, options: dict[str, Any]) -> None:
    """A run that is killed at random steps, and one of each kind that has no room."""
    draw = random.Random(seed)
    config = TrainConfig(output=str(folder / "killed"), **options | {"checkpoint_every": EVERY})
    # the first two steps are before the first checkpoint: without one there is nothing to resume
    for number, step in enumerate(sorted(draw.randint(EVERY + 1, config.steps) for _ in range(kills))):
        how = draw.choice([in_step, partial(in_write, share=draw.random()), before_rename])
        fork(partial(how, step), partial(resume, folder / "killed") if number else partial(train, config))
    for how in (full_disk, full_log):
        fork(how, partial(train, TrainConfig(output=str(folder / how.__name__), **options)))


def fork(prepare: Callable[[], object], run: Callable[[], object]) -> None:
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
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), json.loads(sys.argv[4]))
