"""PNG pictures of a run: its loss, its probes, its features and their neighbours."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from .errors import need


def plot_loss(path: Path | IO[bytes], history: Sequence[Mapping[str, Any]]) -> None:
    """Loss against step."""
    figure, axes = _figure()
    losses = [math.nan if row["loss"] is None else row["loss"] for row in history]  # a gap for a skipped batch
    axes.plot([row["step"] for row in history], losses, linewidth=1)
    axes.set(xlabel="step", ylabel="loss", title="training loss")
    figure.savefig(path, format="png")


def plot_probe(path: Path | IO[bytes], history: Sequence[Mapping[str, Any]], probe: Mapping[str, Any]) -> None:
    """Probes of the encoder against step, and what raw pixels and random weights reach."""
    figure, axes = _figure()
    probed = [row for row in history if row["few10"] is not None]
    for color, key, label in (("C0", "few10", "10 labels per class"), ("C1", "knn", "kNN")):
        axes.plot([r["step"] for r in probed], [r[key] for r in probed], color=color, marker="o", label=label)
        for style, baseline in (("--", "raw"), (":", "random")):
            value = probe[baseline][key]
            axes.axhline(
                value["mean"] if key == "few10" else value, color=color, linestyle=style, label=f"{label}, {baseline}"
            )
    axes.set(xlabel="step", ylabel="held-out accuracy, %", title="probes")
    axes.legend(fontsize="small")
    figure.savefig(path, format="png")


def plot_embedding(path: Path | IO[bytes], features: Tensor, labels: Tensor, classes: Sequence[str]) -> None:
    """The held-out images' features ``(N, F)`` on their first two principal components, one colour per class."""
    centred = features - features.mean(0)
    _, _, directions = torch.linalg.svd(centred, full_matrices=False)
    flat = centred @ directions[:2].T
    figure, axes = _figure()
    shown = axes.scatter(*flat.T.tolist(), c=labels.tolist(), cmap="tab10" if len(classes) <= 10 else "turbo", s=10)
    if len(classes) <= 20 and bool((labels >= 0).all()):
        handles, _ = shown.legend_elements(num=None)
        axes.legend(handles, classes, fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    axes.set(xlabel="first component", ylabel="second component", title="held-out images, principal components")
    figure.savefig(path, format="png")


def plot_neighbours(path: Path | IO[bytes], images: Tensor, labels: Tensor, classes: Sequence[str]) -> None:
    """A row for each image ``(Q, 1 + K, C, H, W)``, 0 to 1, and its K neighbours; a neighbour of its class is green.

    Labels ``(Q, 1 + K)`` of -1 have no class, and no colour.
    """
    rows, columns = labels.shape
    figure = need("matplotlib.figure", "plotting").Figure(figsize=(columns, 1.25 * rows), dpi=120, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for i in range(rows):
        for j in range(columns):
            known = int(labels[i, j]) >= 0
            color = "black" if j == 0 or not known else "green" if labels[i, j] == labels[i, 0] else "red"
            axes[i, j].imshow(images[i, j].permute(1, 2, 0).numpy(), cmap="grey", vmin=0, vmax=1)
            axes[i, j].set_title(classes[int(labels[i, j])] if known else "", fontsize="x-small", color=color)
            axes[i, j].set_axis_off()
    figure.savefig(path, format="png")


def _figure() -> tuple[Any, Any]:
    """A figure of its own, outside pyplot's global state: no display is needed and nothing is left behind."""
    figure = need("matplotlib.figure", "plotting").Figure(figsize=(7, 4.5), dpi=120, layout="constrained")
    return figure, figure.add_subplot()
