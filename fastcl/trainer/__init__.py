"""The reference trainer: from images to a probed encoder in one command, ``fastcl train``.

::

    from fastcl.trainer import TrainConfig, train

    result = train(TrainConfig(method="moco", steps=900, output="runs/first"))
    print(result["probe"]["trained"]["few10"]["mean"])
    train(preset("simclr-cifar10", data_dir="data"))
    train(TrainConfig(data="given"), data=from_tensors(images, labels, test_images, test_labels))
"""

from __future__ import annotations

from .augment import Augmentation
from .config import TrainConfig, load_config
from .data import Data, Images
from .errors import TrainError
from .export import export
from .given import from_tensors
from .loop import resume, train
from .outcome import table
from .page import write_page
from .presets import PRESETS, Preset, preset

__all__ = [
    "PRESETS",
    "Augmentation",
    "Data",
    "Images",
    "Preset",
    "TrainConfig",
    "TrainError",
    "export",
    "from_tensors",
    "load_config",
    "preset",
    "resume",
    "table",
    "train",
    "write_page",
]
