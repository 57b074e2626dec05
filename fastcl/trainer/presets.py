"""Settings that somebody published, with what they reached: a place to start from, and to compare with.

They are the hyper-parameters of their sources. What the trainer does in its own way stays its own: the views of
``augment.py`` (no blur and no hue), heads without BatchNorm for SimCLR and MoCo, BatchNorm over the whole batch of one
device, but where ``bn_splits`` stands for the GPUs of MoCo's, and probes of its own for the published accuracy. So no
figure here was reached by this trainer, but for digits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from .config import TrainConfig
from .errors import TrainError

_IMAGES = {"fashion-mnist": 60_000, "cifar10": 50_000, "imagenet": 1_281_167}  # for training


@dataclass(frozen=True)
class Preset:
    """A run that somebody published.

    Attributes:
        config: its settings; ``steps`` are epochs of whole batches.
        source: where they stand.
        accuracy: percent, as the source has it, or None where it has none.
        measure: what the accuracy is of.
    """

    config: TrainConfig
    source: str
    accuracy: float | None
    measure: str


def preset(name: str, **settings: Any) -> TrainConfig:
    """The settings of a preset, but for those given.

    Raises:
        TrainError: there is no such preset.
    """
    if name not in PRESETS:
        raise TrainError(f"got preset {name!r}; expected one of {', '.join(PRESETS)}. Choose one.")
    return replace(PRESETS[name].config, **settings)


def _config(data: str, batch_size: int, epochs: int, warmup_epochs: int = 0, **settings: Any) -> TrainConfig:
    """Epochs as steps, of full batches only; probes and checkpoints come once in an epoch."""
    epoch = _IMAGES[data] // batch_size
    return TrainConfig(
        data=data, batch_size=batch_size, steps=epochs * epoch, warmup_steps=warmup_epochs * epoch,
        checkpoint_every=epoch, probe_every=epoch, **settings,
    )  # fmt: skip


_CIFAR: Mapping[str, Any] = {"encoder": "resnet18", "stem": "cifar", "device": "cuda"}
_R50: Mapping[str, Any] = {"encoder": "resnet50", "device": "cuda"}
# facebookresearch/moco, main_moco.py and README.md; K and m: He et al. 2020, arXiv:1911.05722, section 3.3
_MOCO_R50: Mapping[str, Any] = {
    **_R50, "method": "moco", "optimizer": "sgd", "learning_rate": 0.03, "lr_scaling": "linear", "weight_decay": 1e-4,
    "queue_size": 65_536, "momentum": 0.999, "dim": 128, "bn_splits": 8,  # GPUs of 32 images each
}  # fmt: skip
# Losses may differ by a factor from their sources' (SimCLR's code adds up both views): LARS does not see it.
_LARS: Mapping[str, Any] = {
    "optimizer": "lars", "lr_scaling": "linear", "weight_decay": 1e-6, "exclude_norm_bias": True,
}  # fmt: skip
# facebookresearch/moco-v3, CONFIG.md, main_moco.py and moco/builder.py. Not as there: positions are learned, not fixed
# sines and cosines; layers have the initial weights of their library, not Xavier's; and timm's ViT-S has 6 heads of
# attention, not 12.
_MOCO_V3_VIT: Mapping[str, Any] = {
    "method": "moco-v3", "optimizer": "adamw", "learning_rate": 1.5e-4, "lr_scaling": "linear", "weight_decay": 0.1,
    "freeze_patch_embedding": True, "temperature": 0.2, "momentum": 0.99, "momentum_schedule": "cosine", "dim": 256,
    "hidden": 4096, "head_layers": 3, "predictor_norm": True, "precision": "fp16", "device": "cuda",
}  # fmt: skip
_CIFAR_SGD: dict[str, Any] = {"optimizer": "sgd", "weight_decay": 5e-4, "lr_scaling": "linear", "momentum": 0.99}

PRESETS: Mapping[str, Preset] = {
    "digits": Preset(
        TrainConfig(),
        "benchmarks/results/digits.json: simclr, mean of three seeds",
        97.8,
        "logistic regression on ten labels per class",
    ),
    "fashion-mnist": Preset(
        _config("fashion-mnist", 256, epochs=20, warmup_epochs=1),
        "the settings of digits, which nobody tuned for these images",
        None,  # not measured
        "logistic regression on ten labels per class",
    ),
    "simclr-cifar10": Preset(
        _config(
            "cifar10", 512, epochs=1000, warmup_epochs=10, **_CIFAR, **_LARS, method="simclr",
            learning_rate=1.0, temperature=0.5, dim=128,
        ),
        "google-research/simclr, README.md: the commands for CIFAR-10 and a ResNet-18",
        91.0,  # "around 91%"
        "linear classifier",
    ),
    "moco-cifar10": Preset(
        _config(
            "cifar10", 512, epochs=800, **_CIFAR, **_CIFAR_SGD, method="moco",
            learning_rate=0.03,  # 0.06 for 512 images
            temperature=0.1, queue_size=4096, dim=128, head="linear", bn_splits=8,
        ),
        "facebookresearch/moco, branch colab-notebook, moco_cifar10_demo.ipynb: asymmetric loss, 800 epochs",
        88.7,
        "kNN",
    ),
    "byol-cifar10": Preset(
        _config(
            "cifar10", 512, epochs=800, **_CIFAR, **(_CIFAR_SGD | {"weight_decay": 2e-3}), method="byol",
            # 0.06 for 128 images and a decay of 5e-4, of the mean of two cosines: a quarter of the slope of BYOL's loss
            learning_rate=0.12 / 4, dim=256, hidden=1024,
        ),
        "lightly-ai/lightly, docs/source/getting_started/benchmarks/cifar10_benchmark.py",
        91.1,
        "kNN",
    ),
    "simclr-r50": Preset(
        _config(
            "imagenet", 4096, epochs=100, warmup_epochs=10, **_R50, **_LARS, method="simclr",
            learning_rate=0.3, temperature=0.1, dim=128,
        ),
        "google-research/simclr, README.md: the commands for ImageNet; Chen et al. 2020, arXiv:2002.05709, section 2.2",
        64.5,  # "around 64.5%"
        "linear classifier",
    ),
    "moco-v1-r50": Preset(
        _config("imagenet", 256, epochs=200, **_MOCO_R50, head="linear", lr_schedule="steps", temperature=0.07),
        "facebookresearch/moco, README.md: MoCo v1, mean of five runs",
        60.8,
        "linear classifier",
    ),
    "moco-v2-r50": Preset(
        _config("imagenet", 256, epochs=200, **_MOCO_R50, temperature=0.2),
        "facebookresearch/moco, README.md: MoCo v2, mean of five runs",
        67.5,
        "linear classifier",
    ),
    "moco-v3-r50": Preset(
        _config(
            "imagenet", 4096, epochs=300, warmup_epochs=10, **_R50, **_LARS, method="moco-v3",
            learning_rate=0.3, temperature=1.0, momentum=0.99, momentum_schedule="cosine", dim=256, hidden=4096,
            precision="fp16",
        ),
        "facebookresearch/moco-v3, CONFIG.md and main_moco.py: ResNet-50, 300 epochs",
        72.8,
        "linear classifier",
    ),
    "moco-v3-vit-s": Preset(
        _config("imagenet", 4096, epochs=300, warmup_epochs=40, **_MOCO_V3_VIT, encoder="timm:vit_small_patch16_224"),
        "facebookresearch/moco-v3, CONFIG.md: ViT-Small; Chen et al. 2021, arXiv:2104.02057",
        73.2,
        "linear classifier",
    ),
    "moco-v3-vit-b": Preset(
        _config("imagenet", 4096, epochs=300, warmup_epochs=40, **_MOCO_V3_VIT, encoder="vit_b_16"),
        "facebookresearch/moco-v3, CONFIG.md: ViT-Base; Chen et al. 2021, arXiv:2104.02057",
        76.7,
        "linear classifier",
    ),
}  # fmt: skip
