"""What a run comes to: probes of the encoder, the memory of the loss, plots, and ``result.json``."""

from __future__ import annotations

import platform
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import functional, reference
from .._measure import peak_bytes
from .._version import __version__
from ..backends import native
from . import report
from .checkpoint import no_room, write_json
from .collapse import MONITORS
from .config import TrainConfig
from .data import Data
from .method import Method
from .models import calibrated
from .probe import Prober
from .run_folder import spared

_FINAL = 50  # the loss of a run is the mean of its last steps, this many
_DENSE = 1024  # images; the matrix of a larger batch need not fit where the run did


def finish(
    config: TrainConfig,
    folder: Path,
    data: Data,
    prober: Prober,
    method: Method,
    untrained: nn.Module,
    batch: tuple[tuple[Tensor, ...], Tensor],
    history: list[dict[str, Any]],
    seconds: float,
    loss_seconds: float,
) -> dict[str, Any]:
    """Probe, measure, plot; ``result.json`` comes last: where it is, the run is complete.

    Args:
        untrained: the encoder as it was before the first step.
        batch: views and labels, whose loss is measured.
        history: the rows of ``metrics.csv``.

    Returns:
        What ``result.json`` holds.

    Raises:
        TrainError: it cannot be written. A plot that cannot be is only said.
    """
    views, labels = batch
    device = labels.device
    features = {
        "raw": prober.features(None, device),
        "random": prober.features(calibrated(untrained, data.train, prober.train_at, device), device),
        "trained": prober.features(method.encoder, device),
    }
    probe = {name: prober.all(f) for name, f in features.items()}
    final = [row["loss"] for row in history[-_FINAL:] if row["loss"] is not None]
    labels, texts = labels[:_DENSE], data.test.captions
    result = {
        "method": config.method,
        "dataset": config.data,
        "seed": config.seed,
        "steps": config.steps,
        "loss": sum(final) / len(final),
        "skipped_batches": sum(row.get("skipped") is not None for row in history),
        "seconds": seconds,
        "loss_share": loss_seconds / seconds,
        "probe": probe,
        "zero_shot": method.zero_shot(features["trained"].test, features["trained"].test_labels, data.classes),
        "retrieval": texts and method.retrieval(features["trained"].test, [texts[i] for i in prober.test_at]),
        "embeddings": {name: history[-1].get(name) for name in MONITORS},
        "loss_peak_images": len(labels),
        "loss_peak_bytes": _loss_peak_bytes(method, [view[:_DENSE] for view in views], labels),
        "skipped_images": len(data.decoder.broken()),
        "control": config.control,
        "threads": config.threads,
        "versions": {"fastcl": __version__, "torch": torch.__version__, "python": platform.python_version()},
    }
    plots: dict[str, Callable[[Path], None]] = {
        "loss.png": lambda path: report.plot_loss(path, history),
        "embedding.png": lambda path: report.plot_embedding(
            path, features["trained"].test, features["trained"].test_labels, data.classes
        ),
    }
    if prober.labelled:
        plots["probe.png"] = lambda path: report.plot_probe(path, history, probe)
    for name, plot in plots.items():
        spared(folder / name, partial(plot, folder / name), partial(print, file=sys.stderr))
    try:
        write_json(folder / "result.json", result)
    except OSError as error:
        raise no_room(folder / "result.json", error) from error
    return result


def _loss_peak_bytes(method: Method, views: Sequence[Tensor], labels: Tensor) -> dict[str, int]:
    """Peak memory in bytes of the loss, forward and backward, fused and dense, on the same embeddings of one batch."""
    method.eval()  # in training BatchNorm and MoCo's keys may wait for other ranks
    embeddings = [e.detach().requires_grad_(e.requires_grad) for e in method(*views)]

    def peak(functions: Any) -> int:
        leaves = [e.detach().clone().requires_grad_(e.requires_grad) for e in embeddings]
        native.release_workspace()  # so that taking it is counted
        return peak_bytes(lambda: method.formula(functions, labels, *leaves).backward(), labels.device)

    return {"fastcl": peak(functional), "dense": peak(reference)}
