"""What a step is given. What is random is a function of (seed, epoch, image), so an interrupted run goes on exactly."""

from __future__ import annotations

import functools
import hashlib

import torch
from torch import Tensor

from .config import TrainConfig
from .data import Data
from .text import captions, tokens


def batch_of(
    config: TrainConfig, data: Data, step: int, device: torch.device, rows: Tensor | None = None
) -> tuple[tuple[Tensor, ...], Tensor]:
    """Views of step ``step``, counted from 1, ``(B, C, H, W)`` each, channels last, which convolves faster; labels.

    For clip one view, and the tokens ``(B, L)`` of a caption. Of the whole batch, or of some rows of it.
    """
    rows = torch.arange(config.batch_size) if rows is None else rows
    epoch, at = images_of(config, data, step)
    at = at[rows]
    images = data.train.read(at).to(device, memory_format=torch.channels_last)
    captioned = config.method == "clip"
    views = data.augmentation.views(
        images, at, ("views", config.seed, epoch), count=2 - captioned,
        local_crops=config.local_crops, local_size=config.local_size,
    )  # fmt: skip
    if captioned:
        views = (*views, tokens(captions(data, at, config.seed, epoch), config.text_context).to(device))
    if config.control == "shuffled-pairs":
        # the order is random, so a neighbour is a random other image
        views = tuple(view.roll(number, 0) for number, view in enumerate(views))
    return views, data.train.labels[at].to(device)


def images_of(config: TrainConfig, data: Data, step: int) -> tuple[int, Tensor]:
    """The epoch of step ``step``, counted from 0, and the images ``(B,)`` of its batch."""
    epoch, batch = divmod(step - 1, len(data.train) // config.batch_size)
    return epoch, _order(len(data.train), config.seed, epoch)[batch * config.batch_size :][: config.batch_size]


@functools.lru_cache(maxsize=1)
def _order(count: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(count, generator=generator(seed, "order", epoch))


def generator(*key: object) -> torch.Generator:
    """A random stream of its own for every key. Hashed, because torch's CPU generator reads 32 bits of its seed."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))
