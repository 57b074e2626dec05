"""The folder of a run: what may be in it, and what is written there beside the checkpoints.

The history of a run, which is in its checkpoints, is the truth. ``metrics.csv``, the events of TensorBoard and
``skipped_batches.jsonl`` are copies of it for people and tools, and no run ends because of them.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from .checkpoint import CHECKPOINT, has_checkpoint, write_atomically, write_json
from .collapse import MONITORS
from .config import TrainConfig
from .decoding import Decoder
from .errors import TrainError, need

# No times: equal runs write equal files. Of a skipped batch "skipped" says what was not finite, and there is no loss.
COLUMNS = ("step", "loss", "learning_rate", "knn", "few10", *MONITORS, "skipped")
SKIPPED, BROKEN = "skipped_batches.jsonl", "skipped_images.json"
_LISTED = 100  # skipped batches, at most, whose images are listed
_FILES = (
    "config.json", "*" + CHECKPOINT, "metrics.csv", "result.json", "evaluation.json", "report.html", "*.png",
    "events.out.tfevents.*", SKIPPED, BROKEN, "*.tmp",
)  # fmt: skip


def claim(folder: Path, config: TrainConfig) -> None:
    """Make ``folder`` ready for a new run, whose config it gets; only files of an earlier run are removed from it.

    Raises:
        TrainError: it holds a run and ``overwrite`` is not set, or it cannot be made.
    """
    if (folder / "config.json").exists() and not config.overwrite:
        finished = (folder / "result.json").exists()
        can_go_on = not finished and has_checkpoint(folder)
        way_on = f", or continue it with: fastcl train --resume {folder}" if can_go_on else ""
        raise TrainError(
            f"got {folder}, which holds {'a finished' if finished else 'an interrupted'} run; expected a new folder. "
            f"Name another with --output, replace the run with --overwrite{way_on}"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for pattern in _FILES:
            for file in folder.glob(pattern):
                file.unlink()
        write_json(folder / "config.json", dataclasses.asdict(config))
    except OSError as error:
        raise TrainError(f"the run folder {folder} cannot be made ({error}). Name another with --output.") from error


class Records:
    """What a run writes while it trains; use as a context manager, :meth:`add` a row after every step.

    A file that cannot be written is named once on stderr and left alone; ``metrics.csv`` is written again from the
    history when the run ends or goes on. A batch without a loss is one that was skipped.

    Args:
        history: the rows so far, a mapping with the :data:`COLUMNS` each; rows are added to it.
        images: which images the batch of a step consists of.
        decoder: knows which of the images are broken.
        say: takes a line for stderr.
    """

    def __init__(
        self,
        folder: Path,
        history: list[dict[str, Any]],
        images: Callable[[int], list[int]],
        decoder: Decoder,
        say: Callable[[str], None],
    ) -> None:
        self.history, self.images, self.decoder, self.say = history, images, decoder, say
        self.metrics, self.skipped, self.broken = folder / "metrics.csv", folder / SKIPPED, folder / BROKEN
        name = f"events.out.tfevents.{time.time_ns()}.{socket.gethostname()}.{os.getpid()}"
        self.events = folder / name  # what TensorBoard looks for
        self._event = need("tensorboard.compat.proto.event_pb2", "the event log")
        self._summary = need("tensorboard.compat.proto.summary_pb2", "the event log").Summary
        self._record = need("tensorboard.summary.writer.record_writer", "the event log").RecordWriter
        self._files: dict[Path, IO[Any]] = {}
        self._failed: set[Path] = set()

    def __enter__(self) -> Records:
        self._try(self.metrics, self._start_metrics)
        self._try(self.events, self._start_events)
        self._try(self.skipped, self._list_skipped)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.list_broken()
        for file in self._files.values():
            with suppress(OSError):  # what it could not write has been said
                file.close()
        if self.metrics in self._failed:
            with suppress(OSError):
                self._write_metrics()

    def add(self, row: dict[str, Any], images_per_second: float) -> None:
        """One step."""
        self.history.append(row)
        self._try(self.metrics, lambda: self._append_metrics(row))
        self._try(self.events, lambda: self._append_events(row | {"images_per_second": images_per_second}))
        if row["skipped"]:
            self.say(f"warning: step {row['step']}: the {row['skipped']} are not finite; the batch is skipped.")
            self._try(self.skipped, self._list_skipped)

    def list_broken(self) -> None:
        """The images that could not be decoded so far; a run does it with every checkpoint, and however it ends."""
        self._try(self.broken, lambda: self.decoder.list_broken(self.broken))

    def _try(self, path: Path, write: Callable[[], object]) -> None:
        if path not in self._failed and not spared(path, write, self.say):
            self._failed.add(path)

    def _start_metrics(self) -> None:
        self._write_metrics()
        self._files[self.metrics] = self.metrics.open("a", newline="")

    def _write_metrics(self) -> None:
        text = io.StringIO(newline="")
        csv.DictWriter(text, COLUMNS).writeheader()
        csv.DictWriter(text, COLUMNS).writerows(self.history)
        write_atomically(self.metrics, lambda file: file.write(text.getvalue().encode()))

    def _append_metrics(self, row: Mapping[str, Any]) -> None:
        csv.DictWriter(self._files[self.metrics], COLUMNS).writerow(row)
        self._files[self.metrics].flush()

    def _start_events(self) -> None:
        """A file that makes TensorBoard forget later steps of earlier files."""
        self._files[self.events] = self.events.open("wb")
        start, log = len(self.history) + 1, self._event.SessionLog
        self._write_event(step=start, file_version="brain.Event:2")
        self._write_event(step=start, session_log=log(status=log.START))

    def _append_events(self, row: Mapping[str, Any]) -> None:
        numbers = {name: row[name] for name in row if name not in ("step", "skipped") and row[name] is not None}
        values = [self._summary.Value(tag=name, simple_value=value) for name, value in numbers.items()]
        self._write_event(step=row["step"], summary=self._summary(value=values))

    def _write_event(self, **fields: Any) -> None:
        # Not SummaryWriter: it writes in a thread, whose errors nobody can catch.
        file = self._files[self.events]
        self._record(file).write(self._event.Event(wall_time=time.time(), **fields).SerializeToString())
        file.flush()

    def _list_skipped(self) -> None:
        rows = [row for row in self.history if row["skipped"]][:_LISTED]
        lines = [
            json.dumps({"step": r["step"], "not_finite": r["skipped"], "images": self.images(r["step"])}) for r in rows
        ]
        if lines:
            write_atomically(self.skipped, lambda file: file.write(("\n".join(lines) + "\n").encode()))
        else:
            self.skipped.unlink(missing_ok=True)  # of steps after the checkpoint that a run goes on from


def spared(path: Path, write: Callable[[], object], say: Callable[[str], None]) -> bool:
    """Whether ``write`` has written ``path``, which a run can do without; where not, a line says why."""
    try:
        write()
    except OSError as error:
        say(f"warning: {path} cannot be written ({error}); the run goes on without it.")
        return False
    return True


def in_a_row(history: Sequence[Mapping[str, Any]]) -> int:
    """How many batches at the end of a history were skipped."""
    count = 0
    while count < len(history) and history[-1 - count]["skipped"]:
        count += 1
    return count
