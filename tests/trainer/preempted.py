"""Runs of four ranks that are preempted, damaged or poisoned: ``python -m tests.trainer.preempted FOLDER OPTIONS``.

Ranks are forks of this process, before torch has started a thread, because importing takes longer than the runs.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import socket
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from fastcl.trainer import TrainConfig, TrainError, checkpoint, loop
from fastcl.trainer import command as fastcl_train

from .runs import parse

RANKS = 4


def ranks(name: str, of_one: Callable[[], int], prepare: Callable[[int], object] = lambda rank: None) -> None:
    """Prints the exit codes of the ranks."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(RANKS):
        children.append(os.fork())
        if children[-1] == 0:
            os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(RANKS)}
            os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
            prepare(rank)
            try:
                code = of_one()
            except BaseException as error:
                print(f"{name}: rank {rank}: {error!r}", flush=True)
                code = 1
            sys.stdout.flush()
            os._exit(code)
    print(name, [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children], flush=True)


def command(*words: str) -> int:
    """The exit code of ``fastcl train``."""
    return fastcl_train.run(parse(*words))


def preempted(rank: int) -> None:
    """SIGTERM for rank 2 alone, in step 5."""
    rate = loop.learning_rate

    def asked(config: TrainConfig, step: int) -> float:
        if rank == 2 and step == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return rate(config, step)

    loop.learning_rate = asked


def poisoned(rank: int) -> None:
    """Of step 2 the views of rank 3 are not finite, of step 4 those of rank 0, in the second micro-batch."""
    batch = loop.batch_of

    def given(config: TrainConfig, data: Any, step: int, *rest: Any) -> Any:
        views, labels = batch(config, data, step, *rest)
        if (rank, step) in ((3, 2), (0, 4)):
            views[0][-1] = math.nan
        return views, labels

    loop.batch_of = given


def misread(rank: int) -> None:
    """Rank 1 cannot read the newest checkpoint, the first time: it takes the one before, which the others do not."""
    read, reads = checkpoint._read, iter(range(1000))

    def reading(path: Path) -> dict[str, Any]:
        if rank == 1 and path.name == "checkpoint.pt" and next(reads) == 0:
            raise TrainError(f"{path} cannot be read")
        return read(path)

    checkpoint._read = reading


def main(folder: Path, options: dict[str, Any]) -> None:
    settings = folder / "settings.json"
    settings.write_text(json.dumps(options))

    def new(name: str, *words: str) -> Callable[[], int]:
        return partial(command, "--config", str(settings), "--output", str(folder / name), *words)

    ranks("whole", new("whole"))
    ranks("preempted", new("cut"), preempted)
    shutil.copytree(folder / "cut", folder / "damaged")
    newest = folder / "damaged" / "checkpoint.pt"
    newest.write_bytes(newest.read_bytes()[:-100])
    ranks("resumed", partial(command, "--resume", str(folder / "cut")), misread)
    ranks("repaired", partial(command, "--resume", str(folder / "damaged")))
    ranks("poisoned", new("poisoned", "--accumulate", "2", "--chunk", "2"), poisoned)


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
