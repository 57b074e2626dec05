"""The folder of a run: what may be in it, and its metrics."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .checkpoint import write_atomically
from .collapse import MONITORS
from .errors import TrainError

COLUMNS = ("step", "loss", "learning_rate", "knn", "few10", *MONITORS)  # no times: equal runs write equal files
_FILES = (
    "config.json", "*checkpoint.pt", "metrics.csv", "result.json", "evaluation.json", "skipped.json", "report.html",
    "*.png", "events.out.tfevents.*", "*.tmp",
)  # fmt: skip


def claim(folder: Path, *, overwrite: bool) -> None:
    """Make ``folder`` ready for a new run; only files of an earlier run are removed from it.

    Raises:
        TrainError: it holds a run and ``overwrite`` is not set, or it cannot be made.
    """
    if (folder / "config.json").exists() and not overwrite:
        finished = (folder / "result.json").exists()
        way_on = "" if finished else f", or continue it with: fastcl train --resume {folder}"
        raise TrainError(
            f"got {folder}, which holds {'a finished' if finished else 'an interrupted'} run; expected a new folder. "
            f"Name another with --output, replace the run with --overwrite{way_on}"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for pattern in _FILES:
            for file in folder.glob(pattern):
                file.unlink()
    except OSError as error:
        raise TrainError(f"the run folder {folder} cannot be made ({error}). Name another with --output.") from error


@contextmanager
def metrics_log(path: Path, history: Sequence[Mapping[str, Any]]) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """A CSV file that starts with ``history``; the function it gives appends one row and flushes it."""
    text = io.StringIO(newline="")
    csv.DictWriter(text, COLUMNS).writeheader()
    csv.DictWriter(text, COLUMNS).writerows(history)
    write_atomically(path, lambda file: file.write(text.getvalue().encode()))
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)

        def append(row: Mapping[str, Any]) -> None:
            writer.writerow(row)
            file.flush()

        yield append
