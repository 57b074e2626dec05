"""What the encoder of a run is worth: probes of its last checkpoint, and the whole network fine-tuned on all labels."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from .batches import generator
from .checkpoint import CHECKPOINT, load_checkpoint, restore, write_json
from .config import TrainConfig
from .data import Data, load_data
from .errors import TrainError
from .loop import build_method
from .machine import torch_threads, usable_device
from .models import calibrated, encode
from .outcome import ROWS
from .probe import Features, Prober, few_label_probe, knn, linear_probe

PROBES = ("knn", "linear", "few-label", "fine-tune")
_COLUMNS = {
    "knn": "kNN", "linear": "linear", "few10": "10 labels/class", "few1": "1 label/class", "fine_tune": "fine-tuned",
}  # fmt: skip


def evaluate(
    folder: Path | str,
    probe: str | None = None,
    *,
    epochs: int = 20,
    device: str | None = None,
    data: Data | None = None,
    encoder: nn.Module | None = None,
) -> dict[str, Any]:
    """Probe the last checkpoint of a finished or interrupted run, on all labelled images of its data set.

    Equal checkpoints give equal figures. They are written to ``evaluation.json`` in the folder, beside those of other
    probes of the same step.

    Args:
        folder: of the run; nothing else in it is changed.
        probe: one of :data:`PROBES`: ``knn`` of 200 neighbours, ``linear`` on all labels, ``few-label`` on 10 and 1 of
            each class, and ``fine-tune``, see :func:`fine_tune`; all of them when omitted.
        epochs: of fine-tuning.
        device: where to compute; that of the run when omitted.
        data: the images, where the run was given them.
        encoder: as :func:`~.loop.train` had it, of a run whose encoder was given.

    Returns:
        What ``evaluation.json`` holds: accuracies in percent on the held-out images, of raw pixels, of the encoder with
        its random weights (fine-tuned: trained from scratch on the labels) and of the trained one.

    Raises:
        TrainError: no such probe, fewer than 1 epoch, no checkpoint or a damaged one, data or a device that are not
            usable.
    """
    if probe is not None and probe not in PROBES:
        raise TrainError(f"got probe {probe!r}; expected one of {', '.join(PROBES)}. Choose one.")
    if epochs < 1:
        raise TrainError(f"got epochs = {epochs}; expected 1 or more. Choose a larger number.")
    folder = Path(folder)
    state = load_checkpoint(folder / CHECKPOINT)
    config, probes = TrainConfig(**state["config"]), PROBES if probe is None else (probe,)
    with torch_threads(config.threads):
        images = load_data(config, data)
        accuracy = _accuracies(config, images, state, probes, epochs, usable_device(device or config.device), encoder)
    result: dict[str, Any] = {
        "method": config.method,
        "dataset": config.data,
        "seed": config.seed,
        "step": state["step"],
        "steps": config.steps,
        "accuracy": _earlier(folder / "evaluation.json", state["step"]),
    }
    for name, found in accuracy.items():
        result["accuracy"].setdefault(name, {}).update(found)
    write_json(folder / "evaluation.json", result)
    return result


def fine_tune(encoder: nn.Module, data: Data, config: TrainConfig, epochs: int, device: torch.device) -> float:
    """Accuracy in percent of the encoder and a linear layer on it, both trained on all labels with cross-entropy.

    SimCLR, arXiv:2002.05709, appendix B.8 in brief: every weight is trained, on augmented images. Here by AdamW, peak
    learning rate 3e-3, a cosine to 0, batches of the run's size; the linear layer starts at zero.

    Args:
        encoder: ``(B, C, H, W) -> (B, F)``; a copy is trained.
    """
    encoder = copy.deepcopy(encoder).requires_grad_(True)
    labelled = (data.train.labels >= 0).nonzero().squeeze(1)
    features = encode(encoder, data.train, labelled[:1], device).shape[1]
    linear = nn.Linear(features, int(data.train.labels.max()) + 1)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    network = nn.Sequential(encoder, linear).to(device).train()
    batch_size = min(config.batch_size, len(labelled))
    batches = len(labelled) // batch_size  # full ones, as in training
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3, weight_decay=config.weight_decay)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * batches)
    order_of = generator(config.seed, "fine-tune")
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(config.seed)  # of dropout
        for epoch in range(epochs):
            order = labelled[torch.randperm(len(labelled), generator=order_of)]
            for at in order[: batches * batch_size].split(batch_size):
                images = data.train.read(at).to(device)
                (view,) = data.augmentation.views(images, at, ("fine-tune", config.seed, epoch), count=1)
                optimizer.zero_grad()
                cross_entropy(network(view), data.train.labels[at].to(device)).backward()
                optimizer.step()
                cosine.step()
    known = (data.test.labels >= 0).nonzero().squeeze(1)
    predicted = encode(network, data.test, known, device).argmax(1)
    return 100 * (predicted == data.test.labels[known]).double().mean().item()


def table(result: Mapping[str, Any]) -> str:
    """What :func:`evaluate` found, as text."""
    keys = [key for key in _COLUMNS if key in result["accuracy"]["trained"]]
    lines = [
        f"{result['method']} on {result['dataset']}, seed {result['seed']}: step {result['step']} of {result['steps']}",
        "",
        f"{'accuracy, %':<12}" + "".join(f"{_COLUMNS[key]:>17}" for key in keys),
    ]
    for name, title in ROWS.items():
        if row := result["accuracy"].get(name):
            lines.append(f"{title:<12}" + "".join(f"{_shown(row.get(key)):>17}" for key in keys))
    return "\n".join(lines)


def _accuracies(
    config: TrainConfig,
    data: Data,
    state: Mapping[str, Any],
    probes: tuple[str, ...],
    epochs: int,
    device: torch.device,
    given: nn.Module | None,
) -> dict[str, dict[str, Any]]:
    prober = Prober(data, generator("probe"), everything=True)
    if not prober.labelled:
        raise TrainError(f"got images without labels in {config.data}; expected labels, to probe for. Label some.")
    method = build_method(config, data, None, given).to(device)
    random = calibrated(method.encoder, data.train, prober.train_at, device)
    restore(method, state["method"], "the checkpoint")
    accuracy: dict[str, dict[str, Any]] = {}
    for name, encoder in (("raw", None), ("random", random), ("trained", method.encoder)):
        accuracy[name] = _frozen(prober, encoder, probes, device) if probes != ("fine-tune",) else {}
        if "fine-tune" in probes and encoder is not None:
            accuracy[name]["fine_tune"] = {
                "accuracy": fine_tune(encoder, data, config, epochs, device), "epochs": epochs
            }  # fmt: skip
    return accuracy


def _frozen(prober: Prober, encoder: nn.Module | None, probes: tuple[str, ...], device: torch.device) -> dict[str, Any]:
    features: Features = prober.features(encoder, device)
    found: dict[str, Any] = {}
    if "knn" in probes:
        found["knn"] = knn(features)
    if "linear" in probes:
        found["linear"] = linear_probe(features)
    if "few-label" in probes:
        found |= {f"few{count}": few_label_probe(features, draws) for count, draws in prober.few.items()}
    return found


def _earlier(file: Path, step: int) -> dict[str, dict[str, Any]]:
    """Accuracies that an earlier call found at this step."""
    if not file.exists():
        return {}
    earlier = json.loads(file.read_text())
    found: dict[str, dict[str, Any]] = earlier["accuracy"] if earlier["step"] == step else {}
    return found


def _shown(value: Any) -> str:
    if value is None:
        return ""
    if not isinstance(value, dict):
        return f"{value:.1f}"
    return f"{value['mean']:.1f} ± {value['std']:.1f}" if "mean" in value else f"{value['accuracy']:.1f}"
