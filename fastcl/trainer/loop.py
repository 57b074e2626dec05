"""The training loop. What is random in step t is a function of (seed, t), so an interrupted run goes on exactly."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import platform
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import functional, reference
from .._measure import peak_bytes
from .._version import __version__
from ..backends import native
from ..grad_cache import cached_embeddings
from . import report
from .checkpoint import load_checkpoint, save_checkpoint, write_json
from .config import TrainConfig
from .data import Data, load_data
from .errors import TrainError, need
from .export import start_from
from .methods import METHODS, Method
from .models import build_encoder, calibrated
from .probe import Prober
from .progress import Progress
from .run_folder import COLUMNS, claim, metrics_log

_FINAL = 50  # the loss of a run is the mean of its last steps, this many
_DENSE = 1024  # images; the matrix of a larger batch need not fit where the run did


def train(config: TrainConfig) -> dict[str, Any]:
    """Train, probe and report; write the run folder.

    Returns:
        What ``result.json`` holds.

    Raises:
        TrainError: the config, the data or an optional package is not usable, the folder already holds a run, or the
            loss stopped being a number.
    """
    config = config.resolved()
    return _run(config, Path(str(config.output)), None)


def resume(folder: Path | str) -> dict[str, Any]:
    """Continue an interrupted run from its last checkpoint, to the bits that it would have reached uninterrupted.

    A finished run is left alone and its result returned.

    Raises:
        TrainError: there is no checkpoint, or it cannot be read.
    """
    folder = Path(folder)
    if (folder / "result.json").exists():
        finished: dict[str, Any] = json.loads((folder / "result.json").read_text())
        return finished
    state = load_checkpoint(folder / "checkpoint.pt")
    return _run(TrainConfig(**state["config"]), folder, state)


def _run(config: TrainConfig, folder: Path, state: dict[str, Any] | None) -> dict[str, Any]:
    need("matplotlib", "the plots")  # better now than after the training
    need("tensorboard", "the event log")
    events = need("torch.utils.tensorboard", "the event log")
    device = _device(config.device)
    data = load_data(config)
    if config.method == "supcon" and bool((data.train.labels < 0).any()):
        raise TrainError(
            f"got images without labels in {config.data} for supcon; expected labels for all. Choose another method."
        )
    prober = Prober(data, _generator("probe"))
    with _threads(config.threads):
        method = _build(config, data, config.init if state is None else None).to(device)
        optimizer = torch.optim.AdamW(
            [p for p in method.parameters() if p.requires_grad], config.learning_rate, weight_decay=config.weight_decay
        )
        start, seconds, loss_seconds = 0, 0.0, 0.0
        history: list[dict[str, Any]] = []
        if state is None:
            claim(folder, overwrite=config.overwrite)
            write_json(folder / "config.json", dataclasses.asdict(config))
        else:
            method.load_state_dict(state["method"])
            optimizer.load_state_dict(state["optimizer"])
            start, history = state["step"], state["history"]
            seconds, loss_seconds = state["seconds"], state["loss_seconds"]

        with (
            metrics_log(folder / "metrics.csv", history) as log,
            events.SummaryWriter(str(folder), purge_step=start + 1) as board,
            Progress(config.steps, start) as progress,
        ):
            for step in range(start + 1, config.steps + 1):
                began = _now(device)
                learning_rate = _learning_rate(config, step)
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate
                views, labels = _batch(config, data, step, device)
                loss, spent = _step(method, optimizer, views, labels, device, config.chunk)
                loss_seconds += spent
                seconds += _now(device) - began
                if not math.isfinite(loss):
                    raise TrainError(
                        f"the loss became {loss} at step {step}; expected a number. Lower --learning-rate or raise "
                        f"--temperature. The last checkpoint is in {folder}."
                    )
                row = dict.fromkeys(COLUMNS) | {"step": step, "loss": loss, "learning_rate": learning_rate}
                if step % config.probe_every == 0 or step == config.steps:
                    row |= prober.monitor(prober.features(method.encoder, device))
                history.append(row)
                log(row)
                for name in COLUMNS[1:]:
                    if row[name] is not None:
                        board.add_scalar(name, row[name], step)
                images_per_second = config.batch_size * step / seconds
                board.add_scalar("images_per_second", images_per_second, step)
                progress.update(step, loss, images_per_second, loss_seconds / seconds)
                if step % config.checkpoint_every == 0 or step == config.steps:
                    save_checkpoint(
                        folder / "checkpoint.pt",
                        {
                            "config": dataclasses.asdict(config),
                            "step": step,
                            "seconds": seconds,
                            "loss_seconds": loss_seconds,
                            "method": method.state_dict(),
                            "optimizer": optimizer.state_dict(),
                            "history": history,
                        },
                    )
        return _finish(config, folder, data, prober, method, history, seconds, loss_seconds)


def _step(
    method: Method,
    optimizer: torch.optim.Optimizer,
    views: tuple[Tensor, Tensor],
    labels: Tensor,
    device: torch.device,
    chunk: int | None = None,
) -> tuple[float, float]:
    """One optimizer step: the loss, and the seconds that the loss itself took, forward and backward.

    The backward pass is cut at the embeddings: first from the loss to them, timed, then from them to the weights, of
    which a chunk of images at a time has activations.
    """
    optimizer.zero_grad()
    method.begin_step()
    embeddings = cached_embeddings(method, [views], chunk_size=chunk)[0] if chunk else method(*views)
    leaves = [e.detach().requires_grad_(e.requires_grad) for e in embeddings]
    began = _now(device)
    loss = method.objective(labels, *leaves)
    loss.backward()
    spent = _now(device) - began
    cut = [(e, leaf.grad) for e, leaf in zip(embeddings, leaves, strict=True) if leaf.grad is not None]
    torch.autograd.backward([e for e, _ in cut], [grad for _, grad in cut])
    optimizer.step()
    return loss.item(), spent


def _batch(config: TrainConfig, data: Data, step: int, device: torch.device) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Views of step ``step``, counted from 1, ``(B, C, H, W)`` each, channels last, which convolves faster; labels."""
    epoch, batch = divmod(step - 1, len(data.train) // config.batch_size)
    at = _order(len(data.train), config.seed, epoch)[batch * config.batch_size :][: config.batch_size]
    images = data.train.read(at).to(device, memory_format=torch.channels_last)
    view0, view1 = data.augmentation.two_views(images, _generator(config.seed, "views", step))
    if config.control == "shuffled-pairs":
        view1 = view1.roll(1, 0)  # the order is random, so the neighbour is a random other image
    return (view0, view1), data.train.labels[at].to(device)


@functools.lru_cache(maxsize=1)
def _order(count: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(count, generator=_generator(seed, "order", epoch))


def _generator(*key: object) -> torch.Generator:
    """A random stream of its own for every key. Hashed, because torch's CPU generator reads 32 bits of its seed."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))


def _learning_rate(config: TrainConfig, step: int) -> float:
    """Linear warm-up over a twentieth of the steps, then a cosine that reaches 0 after the last one."""
    warmup = max(config.steps // 20, 1)
    if step <= warmup:
        return config.learning_rate * step / warmup
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (config.steps + 1 - warmup)))


def _build(config: TrainConfig, data: Data, init: str | None = None) -> Method:
    """The method with the weights of the seed, and of ``init``; the global generator is left as it was."""
    _, channels, _, size = data.test.read(torch.tensor([0])).shape
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        encoder, features = build_encoder(config.encoder, channels, size)
        if init:
            start_from(encoder, init)  # before a method copies the encoder
        method = METHODS[config.method](encoder, features, config)
    return method.to(memory_format=torch.channels_last)


def _finish(
    config: TrainConfig,
    folder: Path,
    data: Data,
    prober: Prober,
    method: Method,
    history: list[dict[str, Any]],
    seconds: float,
    loss_seconds: float,
) -> dict[str, Any]:
    """Probe, measure, plot; ``result.json`` comes last: where it is, the run is complete."""
    device = _device(config.device)
    untrained = _build(config, data).to(device).encoder
    features = {
        "raw": prober.features(None, device),
        "random": prober.features(calibrated(untrained, data.train, prober.train_at, device), device),
        "trained": prober.features(method.encoder, device),
    }
    probe = {name: prober.all(f) for name, f in features.items()}
    final = [row["loss"] for row in history[-_FINAL:]]
    views, labels = _batch(config, data, config.steps, device)
    labels = labels[:_DENSE]
    result = {
        "method": config.method,
        "dataset": config.data,
        "seed": config.seed,
        "steps": config.steps,
        "loss": sum(final) / len(final),
        "seconds": seconds,
        "loss_share": loss_seconds / seconds,
        "probe": probe,
        "loss_peak_images": len(labels),
        "loss_peak_bytes": _loss_peak_bytes(method, [view[:_DENSE] for view in views], labels),
        "control": config.control,
        "threads": config.threads,
        "versions": {"fastcl": __version__, "torch": torch.__version__, "python": platform.python_version()},
    }
    report.plot_loss(folder / "loss.png", history)
    report.plot_probe(folder / "probe.png", history, probe)
    report.plot_embedding(
        folder / "embedding.png", features["trained"].test, features["trained"].test_labels, data.classes
    )
    write_json(folder / "result.json", result)
    return result


def _loss_peak_bytes(method: Method, views: Sequence[Tensor], labels: Tensor) -> dict[str, int]:
    """Peak memory in bytes of the loss, forward and backward, fused and dense, on the same embeddings of one batch."""
    embeddings = [e.detach().requires_grad_(e.requires_grad) for e in method(*views)]

    def peak(functions: Any) -> int:
        leaves = [e.detach().clone().requires_grad_(e.requires_grad) for e in embeddings]
        native.release_workspace()  # so that taking it is counted
        return peak_bytes(lambda: method.formula(functions, labels, *leaves).backward(), labels.device)

    return {"fastcl": peak(functional), "dense": peak(reference)}


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise TrainError(
            f"got device {name!r}, which torch cannot use here ({reason}). Choose --device cpu."
        ) from error
    return device


def _now(device: torch.device) -> float:
    """Seconds on a clock, once the device has done what was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
