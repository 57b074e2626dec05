"""Processes that work together, such as the ranks of a group."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]


def together(arguments: Sequence[Sequence[str]], seconds: float) -> list[tuple[int, str]]:
    """Runs Python with each of these arguments at once: exit codes and what they printed.

    They are ended by their handles in any case.

    Raises:
        subprocess.TimeoutExpired: not all have ended after so many seconds.
    """
    processes = [
        subprocess.Popen(
            [sys.executable, *of_one], cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for of_one in arguments
    ]  # fmt: skip
    end = time.monotonic() + seconds
    try:
        printed = [process.communicate(timeout=max(end - time.monotonic(), 1))[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, text) for process, text in zip(processes, printed, strict=True)]
