"""Encoders, from images to features, and the projection head that the loss sees and the probes do not."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from .data import Images
from .errors import need

_READ_AT_ONCE = 512  # images per forward pass where no gradient is needed


def build_encoder(name: str | None, channels: int, size: int, stem: str = "imagenet") -> tuple[nn.Module, int]:
    """An encoder ``(B, C, H, W) -> (B, F)`` and F, with random weights from torch's global generator.

    Args:
        stem: how a ResNet begins: ``"imagenet"``, or ``"cifar"``, a 3 x 3 convolution without stride and no pooling
            (SimCLR, Chen et al. 2020, arXiv:2002.05709, appendix B.9).

    Raises:
        MissingPackage: a ResNet is asked for and torchvision is not there.
    """
    name = name or ("conv" if size <= 32 else "resnet18")
    if name == "conv":
        return _conv(channels), 128
    models = need(
        "torchvision.models", f"--encoder {name}", "Install it: pip install torchvision, or use --encoder conv."
    )
    encoder = getattr(models, name)(weights=None)
    if stem == "cifar":
        encoder.conv1 = nn.Conv2d(channels, 64, kernel_size=3, padding=1, bias=False)
        encoder.maxpool = nn.Identity()
    elif channels != 3:
        encoder.conv1 = nn.Conv2d(channels, 64, kernel_size=7, stride=2, padding=3, bias=False)
    features = encoder.fc.in_features
    encoder.fc = nn.Identity()
    return encoder, features


def projection_head(features: int, dim: int, *, norm: bool = False, hidden: int | None = None) -> nn.Sequential:
    """One hidden layer (SimCLR, section 4.2; MoCo v2, arXiv:2003.04297): ``(B, F) -> (B, dim)``.

    Args:
        norm: BatchNorm in it, and a hidden layer of at least twice ``dim`` (BYOL, section 3.3, on a smaller scale).
        hidden: width of the hidden layer, where it is not that.
    """
    hidden = hidden or (max(features, 2 * dim) if norm else features)
    between = [nn.BatchNorm1d(hidden)] if norm else []
    return nn.Sequential(nn.Linear(features, hidden), *between, nn.ReLU(), nn.Linear(hidden, dim))


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
    worse than random weights need be.
    """
    encoder = copy.deepcopy(encoder).train()
    for module in encoder.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.reset_running_stats()
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
