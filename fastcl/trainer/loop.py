"""The training loop: from a config to a finished run, or from its last checkpoint on to the same bits."""

from __future__ import annotations

import dataclasses
import json
import math
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .batches import batch_of, generator, images_of
from .checkpoint import CHECKPOINT, load_checkpoint, restore, save_checkpoint
from .collapse import monitors
from .config import TrainConfig
from .data import Data, load_data
from .errors import need
from .export import start_from
from .gradients import add_gradients, now
from .guard import Guard
from .machine import torch_threads, usable_device
from .method import Method, check_labels
from .methods import METHODS
from .models import run_encoder
from .optimization import build_optimizer, learning_rate, slow_momentum
from .outcome import finish
from .probe import Prober
from .progress import Progress
from .ranks import Ranks, joined, launched
from .run_folder import COLUMNS, Records, claim, in_a_row
from .signals import leave, requests


def train(config: TrainConfig, *, data: Data | None = None, encoder: nn.Module | None = None) -> dict[str, Any]:
    """Train, probe and report; write the run folder.

    Args:
        data: the images, where ``config.data`` is ``"given"``.
        encoder: where ``config.encoder`` is ``"given"``: any module from images ``(B, C, H, W)``, 0 to 1, to features
            ``(B, F)``. A copy is trained, in training mode; what it is worth as given is the random-init baseline.

    Returns:
        What ``result.json`` holds.

    Raises:
        TrainError: the config, the data or an optional package is not usable, the folder already holds a run, too many
            batches in a row were not finite, or a checkpoint cannot be written.
        KeyboardInterrupt, SystemExit: SIGINT or SIGTERM came; the step is finished and saved.
    """
    config = config.resolved()
    with joined(config) as ranks:
        return _run(config, Path(str(config.output)), None, ranks, data, encoder)


def resume(folder: Path | str, *, data: Data | None = None, encoder: nn.Module | None = None) -> dict[str, Any]:
    """Continue an interrupted run from its last checkpoint, to the bits that it would have reached uninterrupted.

    A finished run is left alone and its result returned.

    Args:
        data: as :func:`train` had it.
        encoder: as :func:`train` had it: the baseline is computed from its weights, training goes on from the saved.

    Raises:
        TrainError: there is no checkpoint, it cannot be read, its weights do not fit the encoder, the data are other
            ones, or :func:`train` would raise it.
        KeyboardInterrupt, SystemExit: as :func:`train`.
    """
    folder = Path(folder)
    if (folder / "result.json").exists():
        finished: dict[str, Any] = json.loads((folder / "result.json").read_text())
        return finished
    state = load_checkpoint(folder / CHECKPOINT, repair=launched().first)
    config = TrainConfig(**state["config"])
    with joined(config) as ranks:
        if ranks.told(state["step"]) != state["step"]:  # a file that one rank could read and another could not
            state = load_checkpoint(folder / CHECKPOINT, repair=False)
        return _run(config, folder, state, ranks, data, encoder)


def _run(
    config: TrainConfig,
    folder: Path,
    state: dict[str, Any] | None,
    ranks: Ranks,
    given: Data | None,
    encoder: nn.Module | None,
) -> dict[str, Any]:
    need("matplotlib", "plotting")  # better now than after the training
    need("tensorboard", "the event log")
    device = usable_device(config.device)
    data = load_data(config, given)
    if state is not None:
        data.load_state_dict(state["data"])
    check_labels(config, data)
    prober = Prober(data, generator("probe"))
    with torch_threads(config.threads), torch.random.fork_rng([device] if device.type == "cuda" else []):
        method = build_method(config, data, config.init if state is None else None, encoder).to(device)
        optimizer = build_optimizer(config, method)
        scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")
        start, seconds, loss_seconds = 0, 0.0, 0.0
        history: list[dict[str, Any]] = []
        if config.compile:
            method.compile()  # what the loop calls; the probes call the encoder alone, as it is
        if state is None and ranks.first:
            claim(folder, config)
        if state is not None:
            restore(method, state["method"], folder / CHECKPOINT)
            optimizer.load_state_dict(state["optimizer"])
            if scaler.is_enabled():
                scaler.load_state_dict(state["scaler"])
            start, history = state["step"], state["history"]
            seconds, loss_seconds = state["seconds"], state["loss_seconds"]

        parallel = ranks.parallel(method, config)

        def images(of_step: int) -> list[int]:
            at: list[int] = images_of(config, data, of_step)[1].tolist()
            return at

        with ExitStack() as stack:
            request = stack.enter_context(requests(insist=ranks.count == 1))
            guard = Guard(method, ranks, request, in_a_row(history))
            if ranks.first:
                progress = stack.enter_context(Progress(config.steps, start, device))
                records = stack.enter_context(Records(folder, history, images, data.decoder, progress.say))
            how = config.chunk, config.accumulate, config.precision, scaler, parallel, guard
            if ranks.count > 1:
                guard.rehearsal = True
                views, labels = batch_of(config, data, start + 1, device, ranks.rows(config))
                _step(method, optimizer, views, labels, device, *how)
            for step in range(start + 1, config.steps + 1):
                began = now(device)
                rate = learning_rate(config, step)
                for group in optimizer.param_groups:
                    group["lr"] = rate
                method.momentum = slow_momentum(config, step)
                method.seed = generator(config.seed, "method", step).initial_seed()
                torch.manual_seed(generator(config.seed, "network", step, ranks.rank).initial_seed())  # dropout
                views, labels = batch_of(config, data, step, device, ranks.rows(config))
                loss, spent = _step(method, optimizer, views, labels, device, *how)
                loss_seconds += spent
                seconds += now(device) - began
                if ranks.first:
                    row = dict.fromkeys(COLUMNS) | {"step": step, "learning_rate": rate}
                    row |= {"skipped": guard.bad} if guard.bad else {"loss": loss}
                    if step % config.probe_every == 0 or step == config.steps:
                        row |= prober.monitor(method.encoder, device)
                        head = method.get_submodule("head")
                        seen = monitors(method.encoder, head, data, prober.train_at, device)
                        progress.probed(step, seen["effective_rank"])
                        row |= seen
                    images_per_second = config.batch_size * step / seconds
                    records.add(row, images_per_second)
                    progress.update(step, loss, images_per_second, loss_seconds / seconds)
                guard.lose_patience(step, config.steps, folder)
                saving = step % config.checkpoint_every == 0 or step == config.steps or bool(guard.stop)
                if saving:
                    ranks.unite(data.decoder.state, device)
                if saving and ranks.first:
                    save_checkpoint(
                        folder / CHECKPOINT,
                        {
                            "config": dataclasses.asdict(config),
                            "step": step,
                            "images": data.shape,
                            "seconds": seconds,
                            "loss_seconds": loss_seconds,
                            "method": method.state_dict(),
                            "optimizer": optimizer.state_dict(),
                            "scaler": scaler.state_dict(),
                            "history": history,
                            "data": data.state_dict(),
                        },
                    )
                    records.list_broken()
                if guard.stop:
                    ranks.told(None)  # a launcher ends the others when the first one leaves: not before it has saved
                    leave(guard.stop)
        result = None
        if ranks.first:
            untrained = build_method(config, data, None, encoder).to(device).encoder
            batch = batch_of(config, data, config.steps, device)
            result = finish(config, folder, data, prober, method, untrained, batch, history, seconds, loss_seconds)
        finished: dict[str, Any] = ranks.told(result)
        return finished


def _step(
    method: Method,
    optimizer: torch.optim.Optimizer,
    views: tuple[Tensor, ...],
    labels: Tensor,
    device: torch.device,
    chunk: int | None = None,
    accumulate: int = 1,
    precision: str = "fp32",
    scaler: torch.amp.GradScaler | None = None,
    parallel: nn.Module | None = None,
    guard: Guard | None = None,
) -> tuple[float, float]:
    """One optimizer step: the mean loss of its micro-batches over all ranks, and the seconds that the loss itself took.

    ``parallel`` is called in place of the method, where there are other ranks. Where the guard refuses the batch, its
    loss is NaN and nothing has changed.
    """
    scaler = scaler or torch.amp.GradScaler(device.type, enabled=False)
    guard = guard or Guard(method)
    optimizer.zero_grad()
    guard.begin()
    method.begin_step()
    size = len(labels) // accumulate
    parts = zip(*(whole.split(size) for whole in (*views, labels)), strict=True)
    losses, spent = [], 0.0
    for *part, of_part in parts:
        loss, seconds = add_gradients(
            method, parallel or method, tuple(part), of_part,
            chunk=chunk, precision=precision, scaler=scaler, share=1 / accumulate, admits=guard.admits,
        )  # fmt: skip
        if loss is None:
            break
        losses.append(loss)
        spent += seconds
    mean = guard.settle(losses, scaled=scaler.is_enabled())
    if math.isfinite(mean):
        scaler.step(optimizer)
        scaler.update()
    return mean, spent


def build_method(config: TrainConfig, data: Data, init: str | None = None, given: nn.Module | None = None) -> Method:
    """The method with the weights of the seed, and of ``init``; the global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        encoder, features = run_encoder(config, data.shape, given)
        if init:
            start_from(encoder, init)  # before a method copies the encoder
        method = METHODS[config.method](encoder, features, config)
    if config.control == "frozen-queue":
        method.loss.eval()  # MoCoLoss moves its queue in training mode only
    return method.to(memory_format=torch.channels_last)
