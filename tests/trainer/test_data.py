"""Data sets: what is in them, and what is said when they are not there."""

import gzip
import struct
from importlib import resources
from pathlib import Path

import pytest
import torch

from fastcl.trainer import TrainConfig, train
from fastcl.trainer import data as data_module
from fastcl.trainer.data import load_data
from fastcl.trainer.errors import MissingData, MissingPackage

from .runs import block_torchvision, need_torchvision


def test_digits_are_the_1797_images_of_uci() -> None:
    data = load_data(TrainConfig())
    assert len(data.train) + len(data.test) == 1797
    pixels = torch.cat([half.read(torch.arange(len(half))) for half in (data.train, data.test)])
    labels = torch.cat([data.train.labels, data.test.labels])
    assert pixels.shape == (1797, 1, 8, 8) and pixels.min() == 0 and pixels.max() == 1
    assert labels.bincount().tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    # the first 0 of the original table, row by row
    first = "0 0 5 13 9 1 0 0 0 0 13 15 10 15 5 0 0 3 15 2 0 11 8 0 0 4 12 0 0 8 8 0"
    assert (data.train.read(torch.tensor([0]))[0, 0, :4].flatten() * 16).tolist() == list(map(int, first.split()))


def test_the_held_out_digits_are_a_quarter_of_each_class_and_in_no_training_image() -> None:
    data = load_data(TrainConfig())
    share = data.test.labels.bincount() / (data.test.labels.bincount() + data.train.labels.bincount())
    assert ((share - 0.25).abs() < 0.01).all()
    train, test = (
        {tuple(image.tolist()) for image in half.read(torch.arange(len(half))).flatten(1)}
        for half in (data.train, data.test)
    )
    assert not train & test


def test_the_split_partitions_any_labels() -> None:
    labels = torch.tensor([1, 0, 1, 1, 0, 1, 1, 0, 0, 1])
    train, test = data_module._split(labels)
    assert sorted(train.tolist() + test.tolist()) == list(range(10))
    assert test.tolist() == [5, 8]  # the fourth 1 and the fourth 0


@pytest.mark.parametrize("damage", ["flipped", "truncated", "not gzip"])
def test_damaged_digits_are_refused(damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = (resources.files("fastcl.trainer") / "data" / "digits.bin.gz").read_bytes()
    raw = bytearray(gzip.decompress(packed))
    raw[1000] ^= 1
    damaged = {"flipped": gzip.compress(bytes(raw)), "truncated": packed[:-100], "not gzip": b"version https://git-lfs"}
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "digits.bin.gz").write_bytes(damaged[damage])
    monkeypatch.setattr(data_module.resources, "files", lambda package: tmp_path)
    with pytest.raises(MissingData, match="reinstall fastcl"):
        load_data(TrainConfig())


def write_idx(path: Path, values: torch.Tensor, *, zipped: bool) -> None:
    head = struct.pack(f">{1 + values.ndim}I", 0x0800 + values.ndim, *values.shape)
    body = head + bytes(values.flatten().tolist())
    if zipped:
        path.with_name(path.name + ".gz").write_bytes(gzip.compress(body))
    else:
        path.write_bytes(body)


@pytest.fixture
def fashion(tmp_path: Path) -> Path:
    """A small Fashion-MNIST: the training half gzipped, the test half not."""
    for name, count, zipped in (("train", 40, True), ("t10k", 20, False)):
        images = (torch.arange(count * 28 * 28) % 251).view(count, 28, 28)
        write_idx(tmp_path / f"{name}-images-idx3-ubyte", images, zipped=zipped)
        write_idx(tmp_path / f"{name}-labels-idx1-ubyte", torch.arange(count) % 10, zipped=zipped)
    return tmp_path


def test_idx_files_load_zipped_or_not(fashion: Path) -> None:
    data = load_data(TrainConfig(data="fashion-mnist", data_dir=str(fashion), batch_size=8))
    assert (len(data.train), len(data.test), len(data.classes)) == (40, 20, 10)
    assert data.test.labels.tolist() == [i % 10 for i in range(20)]
    image = data.train.read(torch.tensor([3]))
    assert image.shape == (1, 1, 28, 28)
    expected = (torch.arange(28 * 28) + 3 * 28 * 28) % 251
    assert torch.equal((image.flatten() * 255).round(), expected.float())


def test_any_idx_files_are_a_data_set_of_numbered_classes(fashion: Path) -> None:
    data = load_data(TrainConfig(data="idx", data_dir=str(fashion), batch_size=8))
    same = load_data(TrainConfig(data="fashion-mnist", data_dir=str(fashion), batch_size=8))
    assert list(data.classes) == [str(c) for c in range(10)] and data.augmentation.flip == 0
    assert torch.equal(data.train.read(torch.arange(40)), same.train.read(torch.arange(40)))
    assert torch.equal(data.test.labels, same.test.labels)


def test_absent_idx_files_name_the_debian_package(tmp_path: Path) -> None:
    with pytest.raises(MissingData, match="apt-get install dataset-fashion-mnist"):
        load_data(TrainConfig(data="fashion-mnist", data_dir=str(tmp_path)))


@pytest.mark.parametrize("damage", ["short", "magic", "empty", "labels", "gzip"])
def test_damaged_idx_files_are_refused(fashion: Path, damage: str) -> None:
    file = fashion / "t10k-labels-idx1-ubyte"
    whole = file.read_bytes()
    if damage == "labels":
        write_idx(file, torch.arange(19), zipped=False)
    elif damage == "gzip":
        zipped = gzip.compress(whole)
        (fashion / "t10k-labels-idx1-ubyte.gz").write_bytes(zipped[:12] + b"\xff\xff" + zipped[14:])
    else:
        file.write_bytes({"short": whole[:-1], "magic": b"\1" + whole[1:], "empty": b""}[damage])
    with pytest.raises(MissingData, match=r"[Ii]nstall"):
        load_data(TrainConfig(data="fashion-mnist", data_dir=str(fashion), batch_size=8))


def test_a_batch_larger_than_the_data_is_refused() -> None:
    with pytest.raises(MissingData, match=r"batch size 5000 and 1352 .* --batch-size"):
        load_data(TrainConfig(batch_size=5000))


@pytest.mark.parametrize("data", ["cifar10", "stl10", "imagefolder"])
@pytest.mark.parametrize("error", [ImportError("No module named"), RuntimeError("operator torchvision::nms")])
def test_a_missing_or_broken_torchvision_is_a_sentence(
    data: str, error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    block_torchvision(monkeypatch, error)
    with pytest.raises(MissingPackage, match=r"torchvision cannot be imported .* pip install torchvision"):
        load_data(TrainConfig(data=data, data_dir=str(tmp_path)))


def test_digits_need_no_torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    block_torchvision(monkeypatch, ImportError("blocked"))
    assert len(load_data(TrainConfig()).train) == 1352


@pytest.mark.parametrize("name", ["cifar10", "stl10"])
def test_absent_torchvision_data_name_the_flags(name: str, tmp_path: Path) -> None:
    need_torchvision()
    with pytest.raises(MissingData, match=r"--data-dir, or add --download"):
        load_data(TrainConfig(data=name, data_dir=str(tmp_path)))


def make_folder(root: Path, per_class: int = 16) -> None:
    """Two classes of images that are not square: left half black (a) or white (b), right half the opposite."""
    from PIL import Image

    for name, dark_left in (("a", True), ("b", False)):
        (root / name).mkdir(parents=True)
        for i in range(per_class):
            image = Image.new("RGB", (40, 30), (0, 0, 0))
            image.paste((255, 255, 255), (20, 0, 40, 30) if dark_left else (0, 0, 20, 30))
            image.save(root / name / f"{i:02}.png")


def test_a_folder_of_images_is_split_cropped_and_decoded(tmp_path: Path) -> None:
    need_torchvision()
    make_folder(tmp_path)
    data = load_data(TrainConfig(data="imagefolder", data_dir=str(tmp_path), batch_size=8, image_size=16))
    assert (len(data.train), len(data.test), list(data.classes)) == (24, 8, ["a", "b"])
    images = data.train.read(torch.arange(24))
    assert images.shape == (24, 3, 16, 16) and images.min() >= 0 and images.max() <= 1
    left_is_dark = images[..., :6].mean((1, 2, 3)) < images[..., -6:].mean((1, 2, 3))
    assert torch.equal(left_is_dark, data.train.labels == 0)


def test_a_folder_without_classes_is_trained_on_and_not_probed(tmp_path: Path) -> None:
    need_torchvision()
    make_folder(tmp_path / "made")
    flat = tmp_path / "flat"
    flat.mkdir()
    (flat / "notes.txt").write_text("no image")
    for i, file in enumerate(sorted((tmp_path / "made").rglob("*.png"))):
        file.rename(flat / f"{i:02}.PNG")
    few = {"steps": 2, "batch_size": 8, "probe_every": 2, "threads": 1, "image_size": 8}
    config = TrainConfig(data="imagefolder", data_dir=str(flat), output=str(tmp_path / "run"), **few)
    data = load_data(config)
    assert (len(data.train), len(data.test), list(data.classes)) == (24, 8, [])
    assert set(data.train.labels.tolist()) == {-1}
    # the left half of every image is black, but for those of class b, which come last
    assert torch.equal(data.train.read(torch.arange(24))[:, 0, 4, 0].round(), (torch.arange(24) >= 12).float())
    assert train(config)["probe"]["trained"] == {}


def test_train_and_val_folders_are_used_as_they_are(tmp_path: Path) -> None:
    need_torchvision()
    make_folder(tmp_path / "train")
    make_folder(tmp_path / "val", per_class=3)
    for name in ("imagefolder", "imagenet"):
        data = load_data(TrainConfig(data=name, data_dir=str(tmp_path), batch_size=8, image_size=16))
        assert (len(data.train), len(data.test)) == (32, 6)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"data_dir": "empty"}, "--data-dir empty for the digits, .* --data imagefolder"),
        ({"data": "imagefolder"}, "--data-dir PATH"),
        ({"data": "imagefolder", "data_dir": "empty"}, "one folder of images per class"),
        ({"data": "imagefolder", "data_dir": "nowhere"}, "one folder of images per class"),
        ({"data": "imagenet", "data_dir": "empty"}, "image-net.org"),
        ({"data": "shards"}, "no folder for --data shards"),
        ({"data": "shards", "data_dir": "empty"}, r"no images in the \.tar files"),
        ({"data": "shards", "data_dir": "nowhere"}, r"no images in the \.tar files"),
        ({"data": "idx"}, "no folder for --data idx"),
        ({"data": "idx", "data_dir": "empty"}, "four IDX files: images and labels of train and t10k"),
    ],
)
def test_absent_folders_are_sentences(
    settings: dict[str, str], sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    need_torchvision()
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MissingData, match=sentence):
        load_data(TrainConfig(**settings))
