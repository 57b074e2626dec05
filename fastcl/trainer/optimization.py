"""The optimizer of a run, and what changes from step to step: the learning rate and how slow a slow network is."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from .config import TrainConfig
from .lars import LARS

_MOMENTUM = 0.9  # of SGD and LARS, in every paper that the trainer follows


def build_optimizer(config: TrainConfig, network: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of the parameters that want a gradient.

    LARS never adapts nor decays parameters of one dimension, biases and those of normalisation layers; the others
    leave them out of weight decay where the config says so.
    """
    trained = [p for p in network.parameters() if p.requires_grad]
    groups: list[Any] = trained
    if config.exclude_norm_bias or config.optimizer == "lars":
        groups = [
            {"params": [p for p in trained if p.ndim > 1]},
            {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
        ]
    if config.optimizer == "lars":
        groups[1]["adapt"] = False
        return LARS(groups, config.learning_rate, momentum=_MOMENTUM, weight_decay=config.weight_decay)
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, config.learning_rate, momentum=_MOMENTUM, weight_decay=config.weight_decay)
    return torch.optim.AdamW(groups, config.learning_rate, weight_decay=config.weight_decay)


def learning_rate(config: TrainConfig, step: int) -> float:
    """Linear warm-up over a twentieth of the steps, then a cosine that reaches 0 after the last one."""
    warmup = max(config.steps // 20, 1)
    if step <= warmup:
        return config.learning_rate * step / warmup
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (config.steps + 1 - warmup)))
