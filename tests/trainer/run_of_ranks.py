"""A short run for ``test_ranks.py``, of one process or of those of torchrun.

The encoder never mixes rows, unless the last word is "batchnorm".
"""

from __future__ import annotations

import json
import sys

import torch
from torch import Tensor, nn

from fastcl.trainer import TrainConfig, loop, train


class _Double(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.double()


def build() -> nn.Module:
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(16) if sys.argv[-1] == "batchnorm" else nn.GroupNorm(4, 16)
    layers = [nn.Conv2d(1, 16, 3, padding=1), norm, nn.ReLU()]
    encoder = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten())
    return nn.Sequential(_Double(), encoder.double()) if sys.argv[2] == "float64" else encoder


def heads_in_double(build_method: object) -> object:
    def built(*args: object) -> object:
        method = build_method(*args)  # type: ignore[operator]
        return method.double() if sys.argv[2] == "float64" else method

    return built


loop.build_method = heads_in_double(loop.build_method)
train(TrainConfig(encoder="given", output=sys.argv[1], **json.loads(sys.argv[3])), encoder=build())
