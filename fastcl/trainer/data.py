"""Data sets as two disjoint halves: ``train``, for the encoder and its probes, and ``test``, for neither."""

from __future__ import annotations

import gzip
import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .augment import DIGITS, GREY, RGB, Augmentation
from .config import TrainConfig
from .decoding import Decoder, Part
from .errors import MissingData, MissingPackage, TrainError, need
from .idx import read_idx
from .shards import find_shards, samples

_SAMPLE = 256  # images of each half, at most, evenly spaced, by which data are told apart that only ``read`` knows


@dataclass(frozen=True)
class Images:
    """Labelled images of one size, of which any selection can be had as a tensor.

    Attributes:
        labels: ``(N,)`` int64; -1 for an image without a label, which only the encoder sees.
        read: from indices ``(B,)`` to images ``(B, C, H, W)``, fp32, 0 to 1. Equal indices, equal images: no chance.
        captions: what is said of the image that ``read`` gives, N texts, empty for one of which nothing is; None where
            the data set has none.
        pixels: ``(N, C, H, W)``, of any dtype, what ``read`` reads from; None where the images are not in memory.
    """

    labels: Tensor
    read: Callable[[Tensor], Tensor]
    captions: Sequence[str] | None = None
    pixels: Tensor | None = None

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Data:
    """``train`` and ``test`` images, the names of the classes, and the augmentation that suits them.

    Attributes:
        decoder: of images that are not in memory; it knows which of them are broken.
    """

    train: Images
    test: Images
    classes: Sequence[str]
    augmentation: Augmentation
    decoder: Decoder = field(default_factory=Decoder)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of what the data are: other images, or the same in another order, have another one.

        Of labels, classes and augmentation; of images in memory all pixels and captions; of images in files their
        places, not what stands there, which would have to be read. Of images that come out of a function of the
        caller's, at most 256 of each half are read, so a change in a few of many goes unnoticed.
        """
        sha = hashlib.sha256(repr((list(self.classes), self.augmentation)).encode())
        for half in (self.train, self.test):
            sha.update(half.labels.numpy().tobytes())
            if self.decoder.parts:
                continue
            pixels = half.pixels
            if pixels is None:
                count = min(len(half), _SAMPLE)
                pixels = half.read(torch.arange(count) * len(half) // count)
            sha.update(repr((pixels.shape, pixels.dtype, half.captions)).encode())
            sha.update(pixels.contiguous().view(-1).view(torch.uint8).numpy().data)
        for part in self.decoder.parts:
            sha.update(repr(part).encode())
        return sha.hexdigest()

    @property
    def shape(self) -> list[int]:
        """C, H and W of the images."""
        return list(self.test.read(torch.tensor([0])).shape[1:])

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps: which data these are, and which images were found broken."""
        return {"fingerprint": self.fingerprint, "decoded": self.decoder.state}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on as the data of :meth:`state_dict`.

        Raises:
            TrainError: these are other ones.
        """
        if state["fingerprint"] != self.fingerprint:
            raise TrainError(
                "got other data than the run began with; expected the same images and labels, in the same order. Give "
                "it those, or start another run."
            )
        self.decoder.state.copy_(state["decoded"])


def load_data(config: TrainConfig, given: Data | None = None) -> Data:
    """The data set of a config, or the given one where ``config.data`` is ``"given"``.

    Raises:
        MissingData: it is not there or damaged; the message says how to get it.
        MissingPackage: it needs torchvision or Pillow, which is not installed or does not work.
    """
    if (config.data == "given") != (given is not None):
        came = "data= with" if given is not None else "no data= for"
        raise MissingData(
            f"got {came} data = {config.data!r}; expected both or neither. Images in memory come from Python alone: "
            'train(TrainConfig(data="given"), data=from_tensors(...)), and resume, evaluate and write_page with the '
            "same data=."
        )
    if given is not None and not isinstance(given, Data):
        raise MissingData(
            f"got data= of type {type(given).__name__}; expected Data. fastcl.trainer.from_tensors makes it."
        )
    loaders: dict[str, Callable[[TrainConfig], Data]] = {
        "digits": _digits,
        "fashion-mnist": _fashion_mnist,
        "cifar10": partial(_torchvision, "CIFAR10", {"train": True}, {"train": False}),
        "stl10": partial(_torchvision, "STL10", {"split": "train+unlabeled"}, {"split": "test"}),
        "imagefolder": _image_folder,
        "imagenet": _image_folder,
        "idx": _idx,
        "shards": _shards,
    }
    data = given or loaders[config.data](config)
    if len(data.train) < config.batch_size:
        raise MissingData(
            f"got batch size {config.batch_size} and {len(data.train)} training images; expected at least one full "
            "batch. Lower --batch-size."
        )
    return data


_DIGITS_COUNT = 1797
_DIGITS_SHA256 = "fd8303b917f0385e1829a4503fd6d176a5e64b160214bea244de5f89b18b6e2b"


def _digits(config: TrainConfig) -> Data:
    if config.data_dir is not None:
        raise MissingData(
            f"got --data-dir {config.data_dir} for the digits, which come with fastcl; expected --data beside it. Name "
            "the kind of data, for a folder of images: --data imagefolder"
        )
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
        train=in_memory(images[train], labels[train], peak=16),
        test=in_memory(images[test], labels[test], peak=16),
        classes=[str(c) for c in range(10)],
        augmentation=DIGITS,
    )


def _fashion_mnist(config: TrainConfig) -> Data:
    folder = Path(config.data_dir or "/usr/share/datasets/fashion-mnist")
    names = "T-shirt/top Trouser Pullover Dress Coat Sandal Shirt Sneaker Bag Ankle-boot"
    mend = "Install them with: apt-get install dataset-fashion-mnist, or name their folder with --data-dir."
    return Data(*_idx_halves(folder, mend), names.split(), GREY)


def _idx(config: TrainConfig) -> Data:
    """Images in the format of MNIST, most often of characters: views are not mirrored, as those of digits."""
    if config.data_dir is None:
        raise MissingData("got no folder for --data idx; expected --data-dir PATH. Name that of the four IDX files.")
    train, test = _idx_halves(Path(config.data_dir), "Name their folder with --data-dir.")
    return Data(train, test, class_names(None, train.labels, test.labels), DIGITS)


def _idx_halves(folder: Path, mend: str) -> tuple[Images, Images]:
    def half(name: str) -> Images:
        images = read_idx(folder, f"{name}-images-idx3-ubyte", 3, mend)
        labels = read_idx(folder, f"{name}-labels-idx1-ubyte", 1, mend)
        if len(images) != len(labels) or not len(images):
            raise MissingData(
                f"got {len(images)} images and {len(labels)} labels in {folder} ({name}); expected as many of "
                "one as of the other, and some. Install the files again."
            )
        return in_memory(images[:, None], labels.long())

    return half("train"), half("t10k")


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
        return in_memory(pixels, labels.long()), found.classes

    images, classes = part(train)
    return Data(images, part(test)[0], classes, RGB)


def _image_folder(config: TrainConfig) -> Data:
    """A folder with one folder per class, or of images without classes; or two such, ``train/`` and ``val/``."""
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
            with os.scandir(folder) as entries:
                names = None if any(entry.is_dir() for entry in entries) else sorted(os.listdir(folder))
            if images := [name for name in names or () if name.lower().endswith(sets.folder.IMG_EXTENSIONS)]:
                return [str(folder / name) for name in images], torch.full((len(images),), -1), []
            found = sets.ImageFolder(folder)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise MissingData(
                f"got no usable images in {folder} ({str(error).splitlines()[0]}); expected one folder of images per "
                "class, or images without classes. Name another with --data-dir."
            ) from error
        return [path for path, _ in found.samples], torch.tensor(found.targets), found.classes

    if both:
        paths, labels, classes = part(root / "train")
        test_paths, test_labels, test_classes = part(root / "val")
        if classes != test_classes:
            raise MissingData(f"train/ and val/ in {root} have different classes. Give both the same folders.")
        halves = torch.arange(len(paths)), torch.arange(len(test_paths)) + len(paths)
        paths, labels = paths + test_paths, torch.cat([labels, test_labels])
    else:
        paths, labels, classes = part(root)
        halves = _split(labels)
    return _from_files([Part(path) for path in paths], labels, halves, classes, config)


def _shards(config: TrainConfig) -> Data:
    """WebDataset's tar shards, ``train-*.tar`` and ``val-*.tar``, or any, of whose images a part is held out."""
    if config.data_dir is None:
        raise MissingData("got no folder for --data shards; expected --data-dir PATH. Name that of the .tar files.")
    root = Path(config.data_dir)
    train, val = find_shards(root, "train-*.tar"), find_shards(root, "val-*.tar")
    both = bool(train and val)
    parts = [train, val] if both else [find_shards(root, "*.tar")]
    found = [[sample for shard in part for sample in samples(shard)] for part in parts]
    if not all(found):
        raise MissingData(
            f"got no images in the .tar files of {root}; expected shards with .jpg, .jpeg, .png or .webp members, "
            "train-*.tar and val-*.tar or others. Name another folder with --data-dir."
        )
    every = [sample for part in found for sample in part]
    labels = torch.tensor([sample.label for sample in every])
    halves = (torch.arange(len(found[0])), torch.arange(len(found[0]), len(every))) if both else _split(labels)
    names = root / "classes.txt"
    classes = class_names(names.read_text(encoding="utf-8").splitlines() if names.is_file() else None, labels)
    captions = [sample.caption for sample in every]
    return _from_files(
        [sample.image for sample in every], labels, halves, classes, config, captions if any(captions) else None
    )


def class_names(names: Sequence[str] | None, *labels: Tensor) -> Sequence[str]:
    """The names of the classes, or their numbers where there are none."""
    count = max(int(part.max()) for part in labels) + 1
    if names is None:
        return [str(c) for c in range(count)]
    if len(names) < count:
        raise MissingData(f"got {len(names)} names for {count} classes; expected one for each. Add the others.")
    return names


def in_memory(images: Tensor, labels: Tensor, peak: int = 255) -> Images:
    """Images ``(N, C, H, W)`` of 0 to ``peak``, with their labels ``(N,)``."""
    return Images(labels, lambda at: images[at].float() / peak, pixels=images)


def _from_files(
    parts: list[Part],
    labels: Tensor,
    halves: tuple[Tensor, Tensor],
    classes: Sequence[str],
    config: TrainConfig,
    captions: Sequence[str] | None = None,
) -> Data:
    """Images that are decoded when they are asked for; ``halves`` are the indices for training and for testing."""
    need("PIL.Image", f"--data {config.data}", "Install it: pip install pillow.")
    groups = 2 * labels
    groups[halves[1]] += 1
    decoder = Decoder(parts, groups, config.image_size, config.decode_threads, config.max_corrupt)

    def half(at: Tensor) -> Images:
        return Images(
            labels[at],
            lambda i: decoder.read(at[i]),
            _Captions(captions, at, decoder) if captions else None,
        )

    return Data(half(halves[0]), half(halves[1]), classes, RGB, decoder)


class _Captions(Sequence[str]):
    """Captions of some images: that of its stand-in for one that cannot be decoded."""

    def __init__(self, every: Sequence[str], at: Tensor, decoder: Decoder) -> None:
        self._every, self._at, self._decoder = every, at, decoder

    def __len__(self) -> int:
        return len(self._at)

    def __getitem__(self, index: Any) -> Any:
        shown = [self._every[i] for i in self._decoder.shown(self._at[index].reshape(-1)).tolist()]
        return shown if isinstance(index, slice) else shown[0]


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
