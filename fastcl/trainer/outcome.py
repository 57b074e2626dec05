"""What a run comes to: probes of the encoder, the memory of the loss, plots, ``result.json`` and its table."""

from __future__ import annotations

import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import functional, reference
from .._measure import peak_bytes
from .._version import __version__
from ..backends import native
from . import plots
from .checkpoint import no_room, write_json
from .collapse import MONITORS
from .config import TrainConfig
from .data import Data
from .method import Method
from .models import calibrated
from .probe import Prober
from .run_folder import spared

ROWS = {"raw": "raw pixels", "random": "random init", "trained": "trained"}  # of tables
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
        "skipped_batches": sum(row["skipped"] is not None for row in history),
        "seconds": seconds,
        "loss_share": loss_seconds / seconds,
        "probe": probe,
        "zero_shot": method.zero_shot(features["trained"].test, features["trained"].test_labels, data.classes),
        "retrieval": texts and method.retrieval(features["trained"].test, [texts[i] for i in prober.test_at]),
        "embeddings": {name: history[-1][name] for name in MONITORS},
        "loss_peak_images": len(labels),
        "loss_peak_bytes": _loss_peak_bytes(method, [view[:_DENSE] for view in views], labels),
        "skipped_images": len(data.decoder.broken()),
        "control": config.control,
        "threads": config.threads,
        "versions": {"fastcl": __version__, "torch": torch.__version__, "python": platform.python_version()},
    }
    pictures: dict[str, Callable[[Path], None]] = {
        "loss.png": lambda path: plots.plot_loss(path, history),
        "embedding.png": lambda path: plots.plot_embedding(
            path, features["trained"].test, features["trained"].test_labels, data.classes
        ),
    }
    if prober.labelled:
        pictures["probe.png"] = lambda path: plots.plot_probe(path, history, probe)
    for name, plot in pictures.items():
        spared(folder / name, partial(plot, folder / name), partial(print, file=sys.stderr))
    try:
        write_json(folder / "result.json", result)
    except OSError as error:
        raise no_room(folder / "result.json", error) from error
    return result


def table(result: Mapping[str, Any]) -> str:
    """The result of a run as text; accuracies in percent on the held-out images."""
    lines = [
        f"{result['method']} on {result['dataset']}, seed {result['seed']}: {result['steps']} steps "
        f"in {result['seconds']:.1f} s, loss {result['loss']:.3f}",
    ]
    probed = {name: result["probe"][key] for key, name in ROWS.items() if result["probe"][key]}
    if probed:
        lines += ["", f"{'accuracy, %':<12}{'kNN':>8}{'linear':>8}{'10 labels/class':>18}{'1 label/class':>16}"]
    for name, row in probed.items():
        ten, one = (f"{row[k]['mean']:.1f} ± {row[k]['std']:.1f}" for k in ("few10", "few1"))
        lines.append(f"{name:<12}{row['knn']:>8.1f}{row['linear']:>8.1f}{ten:>18}{one:>16}")
    if result["zero_shot"] is not None:
        lines += ["", f"zero-shot accuracy of the class names, %: {result['zero_shot']:.1f}"]
    if result["retrieval"] is not None:
        there, back = (result["retrieval"][way] for way in ("image_to_text", "text_to_image"))
        lines += ["", f"recall at 1 of held-out pairs, %: {there:.1f} of texts, {back:.1f} of images"]
    seen = result["embeddings"]
    lines += [
        "",
        f"embeddings: alignment {seen['alignment']:.3f}, uniformity {seen['uniformity']:.3f}, "
        f"effective rank {seen['effective_rank']:.1f}",
    ]
    if result["skipped_images"]:
        lines += ["", f"images that cannot be decoded: {result['skipped_images']}, listed in skipped_images.json"]
    if result["skipped_batches"]:
        lines += ["", f"batches skipped, because they were not finite: {result['skipped_batches']}"]
    peak = {name: value / 2**20 for name, value in result["loss_peak_bytes"].items()}
    lines += [
        "",
        f"share of a step spent in the loss: {result['loss_share']:.1%}",
        f"peak memory of the loss of {result['loss_peak_images']} images: fastcl {peak['fastcl']:.2f} MiB, "
        f"dense {peak['dense']:.2f} MiB",
    ]
    return "\n".join(lines)


def _loss_peak_bytes(method: Method, views: Sequence[Tensor], labels: Tensor) -> dict[str, int]:
    """Peak memory in bytes of the loss, forward and backward, fused and dense, on the same embeddings of one batch."""
    method.eval()  # in training BatchNorm and MoCo's keys may wait for other ranks
    embeddings = [e.detach().requires_grad_(e.requires_grad) for e in method(*views)]

    def peak(functions: Any) -> int:
        leaves = [e.detach().clone().requires_grad_(e.requires_grad) for e in embeddings]
        native.release_workspace()  # so that taking it is counted
        return peak_bytes(lambda: method.formula(functions, labels, *leaves).backward(), labels.device)

    return {"fastcl": peak(functional), "dense": peak(reference)}
