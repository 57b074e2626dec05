"""Everything that decides a run, in one place: the same fields are the Python API, the flags and ``config.json``."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, get_type_hints

from .errors import TrainError


def _option(default: Any, help: str, *choices: str, least: int | None = None) -> Any:
    return field(default=default, metadata={"help": help, "choices": choices or None, "least": least})


MULTI_CROP = ("simclr", "supcon", "triplet", "byol", "simsiam")  # methods that take more than two views


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run. ``None`` means: chosen by :meth:`resolved` from the method, the data or the machine.

    Equal configs give equal metrics, bit for bit, on one machine and one version of torch.
    """

    method: str = _option(
        "simclr",
        "what to train",
        "simclr",
        "moco",
        "moco-v3",
        "byol",
        "simsiam",
        "supcon",
        "siamese",
        "triplet",
        "clip",
    )
    data: str = _option(
        "digits",
        "data set; shards are WebDataset's tar files, idx the files that MNIST comes in, given is data= in Python",
        "digits",
        "fashion-mnist",
        "cifar10",
        "stl10",
        "imagefolder",
        "imagenet",
        "shards",
        "idx",
        "given",
    )
    data_dir: str | None = _option(None, "folder of the data set; digits come with fastcl")
    download: bool = _option(False, "let torchvision download cifar10 or stl10 into --data-dir")
    image_size: int = _option(224, "pixels per side of imagefolder, imagenet and shards images", least=8)
    decode_threads: int | None = _option(
        None, "threads that decode those images (default: as many as cores and 4); results are the same", least=1
    )
    max_corrupt: float = _option(
        0.05,
        "share of the images read so far that may be broken, 0 to 1; another of the class stands in for one, and "
        "skipped_images.json lists them",
    )
    local_crops: int = _option(
        0,
        f"small views of a small part of every image, beside the two (SwAV's multi-crop): {', '.join(MULTI_CROP)}",
        least=0,
    )
    local_size: int | None = _option(None, "pixels per side of those (default: 3/7 of the image's)", least=1)
    encoder: str | None = _option(
        None,
        "network: conv; a classification network of torchvision, as resnet50, vit_b_16 or efficientnet_b0; timm:NAME; "
        "in Python also given, with a module (default: conv for images up to 32 pixels, else resnet18)",
    )
    stem: str = _option(
        "imagenet",
        "of torchvision's ResNets: imagenet, 7 x 7 pixels, or cifar, 3 x 3 without pooling, for images up to about 64",
        "imagenet",
        "cifar",
    )
    freeze_patch_embedding: bool = _option(
        False, "leave the patch projection of a ViT at its random weights, which steadies training (MoCo v3)"
    )
    head: str = _option(
        "mlp",
        "projection head of all but byol, moco-v3, simsiam and clip: mlp, or linear as in MoCo v1",
        "mlp",
        "linear",
    )
    head_layers: int = _option(2, "linear layers of an mlp head; moco-v3 has 3 for ViTs", least=2)
    predictor_norm: bool = _option(False, "moco-v3: BatchNorm after the predictor too, as it has for ViTs")
    dim: int = _option(64, "features that the loss sees", least=1)
    hidden: int | None = _option(
        None,
        "width of the hidden layers of heads (default: of the features; with BatchNorm at least twice --dim)",
        least=1,
    )
    init: str | None = _option(
        None, "where the encoder starts: torchvision:NAME, timm:NAME, or a file of fastcl export"
    )
    steps: int = _option(900, "optimizer steps", least=1)
    batch_size: int = _option(256, "images per step; each gives two views", least=2)
    chunk: int | None = _option(
        None,
        "images whose activations are held at once, for a --batch-size beyond memory; BatchNorm sees a chunk",
        least=2,
    )
    accumulate: int = _option(
        1,
        "micro-batches that --batch-size is cut into, whose gradients are added: negatives then come from one of them "
        "only, and BatchNorm sees one; --chunk saves as much memory and keeps all negatives",
        least=1,
    )
    precision: str = _option(
        "fp32", "of the encoder and heads, by autocast; fp16 scales its gradients", "fp32", "bf16", "fp16"
    )
    compile: bool = _option(False, "torch.compile the encoder and heads: faster, and other bits")
    optimizer: str = _option(
        "adamw", "adamw; sgd, with momentum 0.9; or lars, sgd for thousands of images per step", "adamw", "sgd", "lars"
    )
    sync_batchnorm: bool = _option(
        False, "BatchNorm over the rows of all ranks (of torchrun, on GPUs); else each sees its own"
    )
    bn_splits: int = _option(
        1,
        "moco: equal parts of a batch that BatchNorm sees one by one, as so many GPUs would; keys are shuffled then",
        least=1,
    )
    learning_rate: float = _option(3e-3, "peak learning rate, before --lr-scaling")
    lr_scaling: str = _option(
        "none", "of the learning rate: linear times batch size / 256, sqrt times its root", "none", "linear", "sqrt"
    )
    lr_schedule: str = _option(
        "cosine",
        "after the warm-up: cosine to 0, or steps, a tenth after 3/5 and again after 4/5 of all",
        "cosine",
        "steps",
    )
    warmup_steps: int | None = _option(
        None, "steps of linear warm-up of the learning rate (default: a twentieth of all, at least 1)", least=0
    )
    weight_decay: float = _option(1e-4, "weight decay: decoupled for adamw, added to the gradient for sgd and lars")
    exclude_norm_bias: bool = _option(
        False, "no weight decay of biases and normalisation layers (lars always leaves them out)"
    )
    temperature: float = _option(
        0.5, "of the loss; 0.5 suits digits, papers on photographs use 0.07 to 0.2 for MoCo; clip learns its own"
    )
    margin: float | None = _option(
        None, "siamese: in distances (default: 1), triplet: in squared distances (default: 0.2) of unit vectors"
    )
    queue_size: int = _option(1024, "moco: keys in the queue", least=1)
    text_width: int = _option(64, "clip: features of the text encoder, a multiple of 32", least=1)
    text_layers: int = _option(2, "clip: layers of the text encoder", least=1)
    text_context: int = _option(64, "clip: bytes of a caption that are read, with a begin and an end", least=3)
    momentum: float = _option(0.99, "moco, moco-v3, byol: how much of the slowly moving encoder a step keeps")
    momentum_schedule: str = _option(
        "constant", "of --momentum: constant, or cosine, which ends at 1 (BYOL)", "constant", "cosine"
    )
    control: str | None = _option(
        None,
        "a run that must fail, to check the checks: shuffled-pairs gives every image the second view of another one, "
        "no-training has learning rate 0, frozen-queue (moco) never puts a key into the queue",
        "shuffled-pairs",
        "no-training",
        "frozen-queue",
    )
    seed: int = _option(0, "of the weights, the order of the images and their views")
    output: str | None = _option(None, "run folder (default: runs/METHOD-DATA-seedSEED)")
    overwrite: bool = _option(False, "replace the run that is in the folder")
    checkpoint_every: int = _option(100, "steps between checkpoints", least=1)
    probe_every: int = _option(100, "steps between probes of the encoder, for the curves", least=1)
    threads: int | None = _option(None, "torch threads (default: half of the cores, at most 8)", least=1)
    device: str = _option("cpu", "where to train: cpu or cuda")

    def resolved(self) -> TrainConfig:
        """Checked, and with everything filled in that depends on the method or the machine only.

        Raises:
            TrainError: a value of another type, a choice that does not exist or a number out of range.
        """
        hints = get_type_hints(type(self))
        for f in fields(self):
            value, choices, hint = getattr(self, f.name), f.metadata["choices"], hints[f.name]
            kinds = getattr(hint, "__args__", (hint,))
            if type(value) not in kinds and not (type(value) is int and float in kinds):
                expected = " or ".join(kind.__name__.removesuffix("Type") for kind in kinds)
                raise TrainError(f"got {f.name} = {value!r}; expected {expected}. Give one.")
            if choices and value is not None and value not in choices:
                raise TrainError(f"got {f.name} = {value!r}; expected one of {', '.join(choices)}. Choose one.")
            least = f.metadata["least"]
            if least is not None and value is not None and value < least:
                raise TrainError(f"got {f.name} = {value}; expected {least} or more. Choose a larger number.")
        if self.batch_size % self.accumulate or self.batch_size // self.accumulate < 2:
            raise TrainError(
                f"got accumulate = {self.accumulate} for a batch size of {self.batch_size}; expected equal "
                "micro-batches of at least 2 images. Choose a divisor."
            )
        if self.warmup_steps is not None and self.warmup_steps > self.steps:
            raise TrainError(
                f"got warmup_steps = {self.warmup_steps} for {self.steps} steps; expected no more. Warm up less."
            )
        for name, value in (("learning_rate", self.learning_rate), ("temperature", self.temperature)):
            if not 0 < value < math.inf:
                raise TrainError(f"got {name} = {value}; expected a finite number above 0. Choose another.")
        if self.margin is not None and not 0 <= self.margin < math.inf:
            raise TrainError(f"got margin = {self.margin}; expected a finite number, 0 or more. Distances end at 2.")
        if not 0 <= self.weight_decay < math.inf:
            raise TrainError(f"got weight_decay = {self.weight_decay}; expected a finite number, 0 or more. Try 1e-4.")
        if self.head == "linear" and self.head_layers > 2:
            raise TrainError(
                f"got head_layers = {self.head_layers} for a linear head; expected an mlp. Leave one of them out."
            )
        if self.predictor_norm and self.method != "moco-v3":
            raise TrainError(
                f"got predictor_norm for {self.method}; expected moco-v3, whose code has it. Leave it out."
            )
        if not 0 <= self.max_corrupt <= 1:
            raise TrainError(f"got max_corrupt = {self.max_corrupt}; expected a share, 0 to 1. Try 0.05.")
        if self.text_width % 32:
            raise TrainError(f"got text_width = {self.text_width}; expected a multiple of 32. Try 64.")
        if self.bn_splits > 1 and (self.method != "moco" or self.sync_batchnorm):
            other = "sync_batchnorm" if self.sync_batchnorm else self.method
            raise TrainError(
                f"got bn_splits = {self.bn_splits} for {other}; expected moco, whose keys are shuffled, and no "
                "sync_batchnorm, which is the contrary. Leave one out."
            )
        if self.local_crops and self.method not in MULTI_CROP:
            raise TrainError(
                f"got local_crops = {self.local_crops} for {self.method}; expected a method that takes more than two "
                f"views: {', '.join(MULTI_CROP)}. Choose one, or leave them out."
            )
        if self.control == "frozen-queue" and self.method != "moco":
            raise TrainError(
                f"got control = 'frozen-queue' for {self.method}; expected moco, which has one. Choose --method moco."
            )
        if not 0 <= self.momentum <= 1:
            raise TrainError(f"got momentum = {self.momentum}; expected 0 to 1. Values near 1 are usual.")
        # Spinning OpenMP threads on a busy machine can be several times slower than one thread.
        threads = max(1, min(8, (os.cpu_count() or 1) // 2)) if self.threads is None else self.threads
        control = f"-{self.control}" if self.control else ""
        output = self.output or f"runs/{self.method}-{self.data}-seed{self.seed}{control}"
        return replace(self, threads=threads, output=output)


# Groups of ``fastcl train --help``: from which field on.
SECTIONS = {
    "data": "images",
    "encoder": "network",
    "steps": "steps, and how weights move",
    "temperature": "the loss, and what some methods have beside it",
    "control": "the run",
}


def load_config(file: Path | str, **settings: Any) -> TrainConfig:
    """The settings in the ``config.json`` of a run, but for those given.

    A replay leaves the run alone: it goes to a folder beside it, whose name ends in ``-replay``, and overwrites
    nothing, unless ``output`` and ``overwrite`` are given.

    Raises:
        TrainError: there is no such file, or it holds something else.
    """
    file = Path(file)
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TrainError(f"{file} cannot be read ({error}). Give the config.json of a run.") from error
    names = {f.name for f in fields(TrainConfig)}
    if not isinstance(found, dict) or not found.keys() <= names:
        what = f"the settings {', '.join(sorted(found.keys() - names))}" if isinstance(found, dict) else "no settings"
        raise TrainError(f"got {what} in {file}; expected those of TrainConfig. Give the config.json of a run.")
    found.pop("overwrite", None)
    if found.get("output") and Path(found["output"]).resolve() == file.parent.resolve():
        found["output"] += "-replay"
    return TrainConfig(**found | settings)
