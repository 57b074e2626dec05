"""Encoders, from images to features, and the projection head that the loss sees and the probes do not."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .augment import usual_local_size
from .config import TrainConfig
from .data import Images
from .encoders import GIVEN, feature_size, freeze_patch_embedding, given_encoder, library_encoder, refuse_stem
from .errors import TrainError

_READ_AT_ONCE = 512  # images per forward pass where no gradient is needed


def build_encoder(
    name: str | None, channels: int, size: int | tuple[int, int], stem: str = "imagenet"
) -> tuple[nn.Module, int]:
    """An encoder ``(B, C, H, W) -> (B, F)`` and F, with random weights from torch's global generator.

    Args:
        name: ``"conv"``, or see :func:`~.encoders.library_encoder`; None for the default.
        size: height and width, or both in one.
        stem: how a ResNet begins: ``"imagenet"``, or ``"cifar"``, a 3 x 3 convolution without stride and no pooling
            (SimCLR, Chen et al. 2020, arXiv:2002.05709, appendix B.9).

    Raises:
        TrainError: there is no such network, or it does not take such images or such a stem.
        MissingPackage: its library is not there.
    """
    size = (size, size) if isinstance(size, int) else size
    name = encoder_name(name, size)
    if name == "conv":
        refuse_stem(name, stem)
        return _conv(channels), 128
    encoder = library_encoder(name, channels, size, stem)
    return encoder, feature_size(encoder, name, (channels, *size))


def run_encoder(config: TrainConfig, shape: Sequence[int], given: nn.Module | None) -> tuple[nn.Module, int]:
    """The encoder of a run as it is before the first step, and F, for images of ``shape`` ``(C, H, W)``.

    Args:
        given: the caller's module, of which a copy is returned, where ``config.encoder`` is ``"given"``.

    Raises:
        TrainError: as :func:`build_encoder`; a module is missing or one too many, or it is no encoder; it has no patch
            embedding to freeze.
    """
    if (config.encoder == GIVEN) != (given is not None):
        raise TrainError(
            f"got encoder = {GIVEN!r} without a module; expected one, in Python: train(config, encoder=module), and "
            "so for resume, evaluate, export and write_page. Give it, or choose --encoder by name."
            if given is None
            else f"got a module and encoder = {config.encoder!r}; expected {GIVEN!r} with a module. Leave one out."
        )
    channels, height, width = shape
    if given is None:
        encoder, features = build_encoder(config.encoder, channels, (height, width), config.stem)
    else:
        refuse_stem(GIVEN, config.stem)
        encoder, features = given_encoder(given, shape)
    name = encoder_name(config.encoder, (height, width))
    if config.local_crops:
        small = config.local_size or usual_local_size(height, width)
        feature_size(encoder, name, (channels, small, small))
    if config.freeze_patch_embedding:
        freeze_patch_embedding(encoder, name)
    return encoder, features


def encoder_name(name: str | None, size: tuple[int, int]) -> str:
    """The encoder that a config means, by name, for images of this height and width."""
    return name or ("conv" if max(size) <= 32 else "resnet18")


def projection_head(
    features: int, dim: int, *, norm: bool = False, hidden: int | None = None, layers: int = 2
) -> nn.Sequential:
    """Hidden layers and a linear one, ``(B, F) -> (B, dim)``: one hidden in SimCLR, section 4.2, and MoCo v2,
    arXiv:2003.04297; two in MoCo v3 for ViTs, arXiv:2104.02057.

    Args:
        norm: BatchNorm in it, and hidden layers of at least twice ``dim`` (BYOL, section 3.3, on a smaller scale).
        hidden: width of the hidden layers, where it is not that.
        layers: linear layers in all.
    """
    hidden = hidden or (max(features, 2 * dim) if norm else features)
    head = nn.Sequential()
    for inputs in [features] + [hidden] * (layers - 2):
        head.extend([nn.Linear(inputs, hidden), *([nn.BatchNorm1d(hidden)] if norm else []), nn.ReLU()])
    return head.append(nn.Linear(hidden, dim))


@torch.no_grad()
def encode(encoder: nn.Module, images: Images, at: Tensor, device: torch.device) -> Tensor:
    """Features of the images ``at`` ``(N,)``, in evaluation mode: ``(N, F)`` on the CPU."""
    was_training = encoder.training
    encoder.eval()
    features = [encoder(images.read(part).to(device)).float().cpu() for part in at.split(_READ_AT_ONCE)]
    encoder.train(was_training)
    return torch.cat(features)


@torch.no_grad()
def calibrated(encoder: nn.Module, images: Images, at: Tensor, device: torch.device) -> nn.Module:
    """A copy of ``encoder`` whose BatchNorm statistics are those of the images ``at``.

    A fair random-init baseline: as built, BatchNorm assumes mean 0 and variance 1, and the features it passes on are
    worse than random weights need be. Dropout, where there is any, drops nothing.
    """
    encoder = copy.deepcopy(encoder).eval()
    for module in encoder.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.train().reset_running_stats()
            module.momentum = None  # average over all batches
    for part in at.split(_READ_AT_ONCE):
        encoder(images.read(part).to(device))
    return encoder.eval()


def _conv(channels: int) -> nn.Module:
    """93k parameters for images of 8 x 8 to 32 x 32."""

    def block(inputs: int, outputs: int) -> list[nn.Module]:
        return [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]

    return nn.Sequential(
        *block(channels, 32),
        nn.MaxPool2d(2),
        *block(32, 64),
        *block(64, 128),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )
