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
    """The learning rate of step ``step``, counted from 1: a linear warm-up to the peak, then the schedule.

    The cosine reaches 0 after the last step. The steps of the other schedule are MoCo's (He et al. 2020,
    arXiv:1911.05722, section 3.3): a tenth of the rate from 60% of the run, and again from 80%.
    """
    if config.control == "no-training":
        return 0.0
    scale = {"none": 1.0, "linear": config.batch_size / 256, "sqrt": math.sqrt(config.batch_size)}
    peak = config.learning_rate * scale[config.lr_scaling]
    warmup = max(config.steps // 20, 1) if config.warmup_steps is None else config.warmup_steps
    if step <= warmup:
        return peak * step / warmup
    if config.lr_schedule == "steps":
        return peak * 0.1 ** ((step > 0.6 * config.steps) + (step > 0.8 * config.steps))
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (config.steps + 1 - warmup)))


def slow_momentum(config: TrainConfig, step: int) -> float:
    """How much of a slow network step ``step``, counted from 1, keeps: as given, or from there to 1.

    The cosine is BYOL's (Grill et al. 2020, arXiv:2006.07733, section 3.3).
    """
    if config.momentum_schedule == "constant":
        return config.momentum
    return 1 - (1 - config.momentum) * (math.cos(math.pi * (step - 1) / config.steps) + 1) / 2
