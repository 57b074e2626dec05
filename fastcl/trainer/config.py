"""Everything that decides a run, in one place: the same fields are the Python API, the flags and ``config.json``."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field, fields, replace
from typing import Any

from .errors import TrainError


def _option(default: Any, help: str, *choices: str) -> Any:
    return field(default=default, metadata={"help": help, "choices": choices or None})


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run. ``None`` means: chosen by :meth:`resolved` from the method, the data or the machine.

    Equal configs give equal metrics, bit for bit, on one machine and one version of torch.
    """

    method: str = _option("simclr", "what to train", "simclr", "moco", "byol", "simsiam", "supcon")
    data: str = _option("digits", "data set", "digits", "fashion-mnist", "cifar10", "stl10", "imagefolder", "imagenet")
    data_dir: str | None = _option(None, "folder of the data set (digits needs none)")
    download: bool = _option(False, "let torchvision download cifar10 or stl10 into --data-dir")
    image_size: int = _option(224, "pixels per side of imagefolder and imagenet images")
    encoder: str | None = _option(
        None, "network (default: conv for images up to 32 pixels, else resnet18)", "conv", "resnet18", "resnet50"
    )
    init: str | None = _option(
        None, "where the encoder starts: torchvision:resnet18, torchvision:resnet50, or a file of fastcl export"
    )
    steps: int = _option(900, "optimizer steps")
    batch_size: int = _option(256, "images per step; each gives two views")
    chunk: int | None = _option(
        None, "images whose activations are held at once, for a --batch-size beyond memory; BatchNorm sees a chunk"
    )
    learning_rate: float = _option(3e-3, "peak learning rate of AdamW, after a linear warm-up and before a cosine")
    weight_decay: float = _option(1e-4, "weight decay of AdamW")
    temperature: float = _option(0.5, "of the loss; 0.5 suits digits, papers on photographs use 0.07 to 0.2 for MoCo")
    queue_size: int = _option(1024, "moco: keys in the queue")
    momentum: float = _option(0.99, "moco, byol: how much of the slowly moving encoder a step keeps")
    control: str | None = _option(
        None,
        "a run that must fail, to check the checks: shuffled-pairs gives every image the second view of another one",
        "shuffled-pairs",
    )
    seed: int = _option(0, "of the weights, the order of the images and their views")
    output: str | None = _option(None, "run folder (default: runs/METHOD-DATA-seedSEED)")
    overwrite: bool = _option(False, "replace the run that is in the folder")
    checkpoint_every: int = _option(100, "steps between checkpoints")
    probe_every: int = _option(100, "steps between probes of the encoder, for the curves")
    threads: int | None = _option(None, "torch threads (default: half of the cores, at most 8)")
    device: str = _option("cpu", "where to train: cpu or cuda")

    def resolved(self) -> TrainConfig:
        """Checked, and with everything filled in that depends on the method or the machine only.

        Raises:
            TrainError: a choice that does not exist or a number out of range.
        """
        for f in fields(self):
            value, choices = getattr(self, f.name), f.metadata["choices"]
            if choices and value not in choices and (value is not None or f.default is not None):
                raise TrainError(f"got {f.name} = {value!r}; expected one of {', '.join(choices)}. Choose one.")
        least = {"batch_size": 2, "chunk": 2, "image_size": 8}
        counts = (
            "steps",
            "batch_size",
            "chunk",
            "queue_size",
            "image_size",
            "checkpoint_every",
            "probe_every",
            "threads",
        )
        for name in counts:
            value, low = getattr(self, name), least.get(name, 1)
            if value is not None and value < low:
                raise TrainError(f"got {name} = {value}; expected {low} or more. Choose a larger number.")
        for name, value in (("learning_rate", self.learning_rate), ("temperature", self.temperature)):
            if not 0 < value < math.inf:
                raise TrainError(f"got {name} = {value}; expected a finite number above 0. Choose another.")
        if not 0 <= self.momentum <= 1:
            raise TrainError(f"got momentum = {self.momentum}; expected 0 to 1. Values near 1 are usual.")
        # Spinning OpenMP threads on a busy machine can be several times slower than one thread.
        threads = max(1, min(8, (os.cpu_count() or 1) // 2)) if self.threads is None else self.threads
        control = f"-{self.control}" if self.control else ""
        output = self.output or f"runs/{self.method}-{self.data}-seed{self.seed}{control}"
        return replace(self, threads=threads, output=output)
