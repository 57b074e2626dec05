"""Data sets as two disjoint halves: ``train``, for the encoder and its probes, and ``test``, for neither."""

from __future__ import annotations

import gzip
import hashlib
import struct
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .augment import DIGITS, GREY, RGB, Augmentation
from .config import TrainConfig
from .errors import MissingData, MissingPackage, need


@dataclass(frozen=True)
class Images:
    """Labelled images of one size, of which any selection can be had as a tensor.

    Attributes:
        labels: ``(N,)`` int64; -1 for an image without a label, which only the encoder sees.
        read: from indices ``(B,)`` to images ``(B, C, H, W)``, fp32, 0 to 1.
        captions: what is said of each image, N of them, where a data set says it.
    """

    labels: Tensor
    read: Callable[[Tensor], Tensor]
    captions: Sequence[str] | None = None

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Data:
    """``train`` and ``test`` images, the names of the classes, and the augmentation that suits them."""

    train: Images
    test: Images
    classes: Sequence[str]
    augmentation: Augmentation


def load_data(config: TrainConfig) -> Data:
    """The data set of a config.

    Raises:
        MissingData: it is not there or damaged; the message says how to get it.
        MissingPackage: it needs torchvision, which is not installed or does not work.
    """
    loaders: dict[str, Callable[[TrainConfig], Data]] = {
        "digits": _digits,
        "fashion-mnist": _fashion_mnist,
        "cifar10": partial(_torchvision, "CIFAR10", {"train": True}, {"train": False}),
        "stl10": partial(_torchvision, "STL10", {"split": "train+unlabeled"}, {"split": "test"}),
        "imagefolder": _image_folder,
        "imagenet": _image_folder,
    }
    data = loaders[config.data](config)
    if len(data.train) < config.batch_size:
        raise MissingData(
            f"got batch size {config.batch_size} and {len(data.train)} training images; expected at least one full "
            "batch. Lower --batch-size."
        )
    return data


_DIGITS_COUNT = 1797
_DIGITS_SHA256 = "fd8303b917f0385e1829a4503fd6d176a5e64b160214bea244de5f89b18b6e2b"


def _digits(config: TrainConfig) -> Data:
    file = resources.files(__package__) / "data" / "digits.bin.gz"
    mend = "The installed package is damaged: reinstall fastcl."
    try:
        raw = gzip.decompress(file.read_bytes())
    except (OSError, EOFError, ValueError) as error:
        raise MissingData(f"the embedded digits cannot be read ({error}). {mend}") from error
    if hashlib.sha256(raw).hexdigest() != _DIGITS_SHA256:
        raise MissingData(f"the embedded digits ({len(raw)} bytes) do not match their checksum. {mend}")
    values = torch.frombuffer(bytearray(raw), dtype=torch.uint8)
    pixels, labels = values[:-_DIGITS_COUNT], values[-_DIGITS_COUNT:].long()
    images = pixels.view(64, _DIGITS_COUNT).T.reshape(-1, 1, 8, 8)
    train, test = _split(labels)
    return Data(
        train=_in_memory(images[train], labels[train], peak=16),
        test=_in_memory(images[test], labels[test], peak=16),
        classes=[str(c) for c in range(10)],
        augmentation=DIGITS,
    )


def _fashion_mnist(config: TrainConfig) -> Data:
    folder = Path(config.data_dir or "/usr/share/datasets/fashion-mnist")

    def part(name: str) -> Images:
        images = _read_idx(folder, f"{name}-images-idx3-ubyte", dims=3)
        labels = _read_idx(folder, f"{name}-labels-idx1-ubyte", dims=1)
        if len(images) != len(labels):
            raise MissingData(
                f"got {len(images)} images and {len(labels)} labels in {folder} ({name}); expected as many of "
                "one as of the other. Install the files again."
            )
        return _in_memory(images[:, None], labels.long())

    names = "T-shirt/top Trouser Pullover Dress Coat Sandal Shirt Sneaker Bag Ankle-boot"
    return Data(part("train"), part("t10k"), names.split(), GREY)


def _read_idx(folder: Path, name: str, dims: int) -> Tensor:
    """One IDX file of unsigned bytes (LeCun's MNIST format), gzipped or not."""
    for file in (folder / f"{name}.gz", folder / name):
        if file.is_file():
            break
    else:
        raise MissingData(
            f"got no {name} or {name}.gz in {folder}; expected the four IDX files of Fashion-MNIST. "
            "Install them with: apt-get install dataset-fashion-mnist, or name their folder with --data-dir."
        )
    try:
        raw = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
        magic, *shape = struct.unpack(f">{1 + dims}I", raw[: 4 + 4 * dims])
    except (OSError, EOFError, ValueError, struct.error) as error:
        raise MissingData(f"{file} cannot be read ({error}). Install it again.") from error
    body = raw[4 + 4 * dims :]
    if magic != 0x0800 + dims or len(body) != torch.Size(shape).numel():
        raise MissingData(
            f"got {file} with magic number {magic:#06x}, shape {tuple(shape)} and {len(body)} bytes; expected "
            f"{0x0800 + dims:#06x} and as many bytes as the shape says. Install it again."
        )
    return torch.frombuffer(bytearray(body), dtype=torch.uint8).view(shape)


def _torchvision(name: str, train: dict[str, Any], test: dict[str, Any], config: TrainConfig) -> Data:
    sets = _need_torchvision("torchvision.datasets", name)
    folder = config.data_dir or "data"

    def part(which: dict[str, Any]) -> tuple[Images, Sequence[str]]:
        try:
            found = getattr(sets, name)(folder, download=config.download, **which)
        except (RuntimeError, OSError) as error:
            raise MissingData(
                f"{name} is not in {folder} ({str(error).splitlines()[0]}). Name its folder with --data-dir, or add "
                "--download where there is a network."
            ) from error
        pixels = torch.as_tensor(found.data)
        if pixels.shape[-1] == 3:  # CIFAR-10 comes as (N, H, W, C), STL-10 as (N, C, H, W)
            pixels = pixels.permute(0, 3, 1, 2).contiguous()
        labels = torch.as_tensor(found.targets if hasattr(found, "targets") else found.labels)
        return _in_memory(pixels, labels.long()), found.classes

    images, classes = part(train)
    return Data(images, part(test)[0], classes, RGB)


def _image_folder(config: TrainConfig) -> Data:
    """A folder with one folder per class, or with two such folders, ``train/`` and ``val/``, as ImageNet has."""
    if config.data_dir is None:
        raise MissingData(f"got no folder for --data {config.data}; expected --data-dir PATH. Name it.")
    root = Path(config.data_dir)
    both = (root / "train").is_dir() and (root / "val").is_dir()
    if config.data == "imagenet" and not both:
        raise MissingData(
            f"got no train/ and val/ in {root}; expected ImageNet-1k with one folder per class in each. It is handed "
            "out at image-net.org to researchers who ask; unpack it there, or name its folder with --data-dir."
        )
    sets = _need_torchvision("torchvision.datasets", config.data)

    def part(folder: Path) -> tuple[list[str], Tensor, list[str]]:
        try:
            found = sets.ImageFolder(folder)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise MissingData(
                f"got no usable images in {folder} ({str(error).splitlines()[0]}); expected one folder of images per "
                "class. Name another with --data-dir."
            ) from error
        return [path for path, _ in found.samples], torch.tensor(found.targets), found.classes

    if both:
        paths, labels, classes = part(root / "train")
        test_paths, test_labels, test_classes = part(root / "val")
        if classes != test_classes:
            raise MissingData(f"train/ and val/ in {root} have different classes. Give both the same folders.")
    else:
        every_path, every_label, classes = part(root)
        train, test = _split(every_label)
        paths, labels = [every_path[i] for i in train], every_label[train]
        test_paths, test_labels = [every_path[i] for i in test], every_label[test]
    size = config.image_size
    return Data(_from_files(paths, labels, size), _from_files(test_paths, test_labels, size), classes, RGB)


def _in_memory(images: Tensor, labels: Tensor, peak: int = 255) -> Images:
    return Images(labels, lambda at: images[at].float() / peak)


def _from_files(paths: list[str], labels: Tensor, size: int) -> Images:
    """Images decoded when they are asked for, resized and cropped to ``size x size``."""
    transforms = _need_torchvision("torchvision.transforms.v2", "a folder of images")
    loader = _need_torchvision("torchvision.datasets.folder", "a folder of images").default_loader
    prepare = transforms.Compose(
        [transforms.Resize(size), transforms.CenterCrop(size), transforms.PILToTensor()]
    )  # PIL antialiases, and releases the lock that threads share
    pool = ThreadPoolExecutor(thread_name_prefix="fastcl-decode")

    def decode(index: int) -> Tensor:
        try:
            image: Tensor = prepare(loader(paths[index]))
        except OSError as error:
            raise MissingData(f"{paths[index]} cannot be decoded ({error}). Remove or replace it.") from error
        return image

    return Images(labels, lambda at: torch.stack(list(pool.map(decode, at.tolist()))).float() / 255)


def _split(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Indices for training and for testing: every fourth image of each class is held out, whatever the seed."""
    held_out = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        held_out[(labels == label).nonzero().squeeze(1)[3::4]] = True
    return (~held_out).nonzero().squeeze(1), held_out.nonzero().squeeze(1)


def _need_torchvision(module: str, purpose: str) -> Any:
    try:
        return need(module, purpose, "Install the one that fits your torch: pip install torchvision.")
    except MissingPackage as error:
        raise MissingPackage(f"{error} The digits (--data digits) do without.") from error
