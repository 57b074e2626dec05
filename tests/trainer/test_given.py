"""Images in memory: ``train(TrainConfig(data="given"), data=from_tensors(...))``."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from fastcl.trainer import (
    Augmentation,
    Data,
    Images,
    TrainConfig,
    TrainError,
    command,
    from_tensors,
    resume,
    train,
    write_page,
)
from fastcl.trainer.augment import GREY, RGB
from fastcl.trainer.data import load_data
from fastcl.trainer.errors import MissingData
from fastcl.trainer.evaluation import evaluate
from fastcl.trainer.export import trained_encoder

from .runs import interrupt, parse, same_run

GIVEN = {"steps": 4, "batch_size": 16, "probe_every": 4, "checkpoint_every": 2, "threads": 1, "data": "given"}


def tensors(seed: int = 0) -> list[torch.Tensor]:
    """Two classes, without red and with it, of 40 and 12 images."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for count in (40, 12):
        labels = torch.arange(count) % 2
        noise = torch.randint(100, (count, 3, 9, 9), dtype=torch.uint8, generator=generator)
        noise[:, 0] += (140 * labels).to(torch.uint8).view(-1, 1, 1)
        found += [noise, labels]
    return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("given") / "run"
    return folder, train(TrainConfig(output=str(folder), **GIVEN), data=from_tensors(*tensors()))


def test_tensors_are_a_data_set(whole: tuple[Path, dict[str, Any]]) -> None:
    assert whole[1]["dataset"] == "given" and whole[1]["skipped_images"] == 0
    assert whole[1]["probe"]["raw"]["linear"] == 100
    data = from_tensors(*tensors())
    assert list(data.classes) == ["0", "1"] and data.augmentation == RGB
    assert torch.equal(data.test.read(torch.tensor([3])), tensors()[2][3:4] / 255)


def test_floating_point_and_other_integers_are_taken() -> None:
    images, labels, test_images, test_labels = tensors()
    for dtype in (torch.float64, torch.float16):
        given = (images[:, :1].to(dtype) / 255, labels.to(torch.uint8), test_images[:, :1], test_labels.int())
        data = from_tensors(*given, classes=["blue", "red", "neither"])
        read = data.train.read(torch.arange(40))
        assert read.dtype == torch.float32 and data.train.labels.dtype == torch.int64
        torch.testing.assert_close(read, images[:, :1] / 255, atol=1e-3, rtol=0)
        assert list(data.classes) == ["blue", "red", "neither"] and data.augmentation == GREY
    own = Augmentation(area=(0.9, 1.0))
    assert from_tensors(*tensors(), augmentation=own).augmentation == own


@pytest.mark.parametrize(
    ("which", "change", "sentence"),
    [
        (0, lambda t: t.numpy(), "images of type ndarray; expected a tensor"),
        (0, lambda t: t[:, 0], r"images \(40, 9, 9\); expected \(N, C, H, W\)"),
        (0, lambda t: t[:0], r"images \(0, 3, 9, 9\); expected \(N, C, H, W\), none of them 0"),
        (0, lambda t: t.int(), r"images of torch\.int32; expected uint8 or floating point"),
        (0, lambda t: t.float(), r"images from 0 to 239; expected floating point from 0 to 1"),
        (2, lambda t: t / 255 - 0.5, r"test_images from -0\.5 to "),
        (2, lambda t: (t / 255).index_fill(0, torch.tensor(3), float("nan")), "test_images from nan to nan"),
        (2, lambda t: t[:, :1], r"images of \(3, 9, 9\) and test_images of \(1, 9, 9\)"),
        (1, lambda t: t[:39], r"labels \(39,\) of torch\.int64; expected \(40,\)"),
        (1, lambda t: t.float(), r"labels \(40,\) of torch\.float32; expected"),
        (1, lambda t: t == 1, r"labels \(40,\) of torch\.bool; expected"),
        (3, lambda t: t - 2, "test_labels of -2; expected 0 or more, or -1"),
        (3, list, "test_labels of type list"),
    ],
)
def test_tensors_that_are_no_images_or_labels_are_refused(which: int, change: Any, sentence: str) -> None:
    given: list[Any] = tensors()
    given[which] = change(given[which])
    with pytest.raises(MissingData, match=sentence):
        from_tensors(*given)


def test_each_class_has_a_name() -> None:
    with pytest.raises(MissingData, match="got 1 names for 2 classes"):
        from_tensors(*tensors(), classes=["blue"])


def test_given_and_data_come_together(tmp_path: Path) -> None:
    data = from_tensors(*tensors())
    with pytest.raises(TrainError, match=r"got no data= for data = 'given'; .*from_tensors"):
        train(TrainConfig(output=str(tmp_path / "run"), **GIVEN))
    with pytest.raises(TrainError, match="got data= with data = 'digits'"):
        train(TrainConfig(output=str(tmp_path / "run")), data=data)
    with pytest.raises(TrainError, match="got data= of type list; expected Data"):
        train(TrainConfig(output=str(tmp_path / "run"), **GIVEN), data=tensors())  # type: ignore[arg-type]
    with pytest.raises(TrainError, match="batch size 64 and 40 training images"):
        train(TrainConfig(output=str(tmp_path / "run"), **GIVEN | {"batch_size": 64}), data=data)
    assert not (tmp_path / "run").exists()


def test_the_command_line_has_no_data(tmp_path: Path) -> None:
    with pytest.raises(TrainError, match="Images in memory come from Python alone"):
        command.run(parse("--data", "given", "--output", str(tmp_path / "run")))


def test_a_run_on_given_data_is_resumed_with_them_and_no_others(
    whole: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        interrupt(patch, at=4)
        with pytest.raises(KeyboardInterrupt):
            train(TrainConfig(output=str(folder), **GIVEN), data=from_tensors(*tensors()))
    with pytest.raises(TrainError, match="got no data= for"):
        resume(folder)
    images, labels, test_images, test_labels = tensors()
    order = torch.arange(40).roll(2)  # the labels stay as they are
    one = images.clone()
    one[17, 2, 8, 8] ^= 1
    other_labels = labels.clone()
    other_labels[3] = 0
    others = {
        "another seed": from_tensors(*tensors(1)),
        "another order": from_tensors(images[order], labels, test_images, test_labels),
        "one bit": from_tensors(one, labels, test_images, test_labels),
        "one label": from_tensors(images, other_labels, test_images, test_labels),
        "another test half": from_tensors(images, labels, test_images.flip(0), test_labels),
        "fewer": from_tensors(images[:38], labels[:38], test_images, test_labels),
        "augmentation": from_tensors(*tensors(), augmentation=GREY),
        "names": from_tensors(*tensors(), classes=["a", "b"]),
    }
    for name, other in others.items():
        with pytest.raises(TrainError, match="other data than the run began with"):
            resume(folder, data=other)
            pytest.fail(name)
    result = resume(folder, data=from_tensors(*tensors()))
    same_run(folder, whole[0])
    assert result["probe"] == whole[1]["probe"]
    assert resume(folder) == result  # a finished run needs none


def test_a_single_pixel_of_many_images_makes_other_data() -> None:
    images, labels = torch.zeros(700, 1, 2, 3, dtype=torch.uint8), torch.arange(700) % 2
    other = images.clone()
    other[1, 0, 1, 2] = 1
    data, changed = (from_tensors(pixels, labels, images, labels) for pixels in (images, other))
    assert data.fingerprint != changed.fingerprint
    assert data.fingerprint == from_tensors(images.clone(), labels, images, labels).fingerprint
    strided = torch.empty(700, 1, 2, 6, dtype=torch.uint8)[..., ::2].copy_(images)
    assert data.fingerprint == from_tensors(strided, labels, images, labels).fingerprint


def test_captions_are_part_of_the_data() -> None:
    data = from_tensors(*tensors())

    def said(text: str) -> Data:
        return dataclasses.replace(data, train=dataclasses.replace(data.train, captions=[text] * 40))

    assert said("a").fingerprint == said("a").fingerprint != said("b").fingerprint
    assert data.fingerprint not in (said("a").fingerprint, said("b").fingerprint)


def test_a_data_set_of_ones_own_making(tmp_path: Path) -> None:
    images, labels, _, _ = tensors()
    half = Images(labels, lambda at: images[at] / 255)
    data = Data(half, half, ["blue", "red"], Augmentation(area=(0.5, 1.0)))
    assert load_data(TrainConfig(**GIVEN), data) is data
    assert half.captions is None
    assert train(TrainConfig(output=str(tmp_path / "run"), **GIVEN), data=data)["steps"] == 4


def test_what_is_done_with_a_run_says_that_it_needs_the_data(whole: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = whole
    data = from_tensors(*tensors())
    with pytest.raises(TrainError, match="evaluate and write_page with the same data="):
        evaluate(folder, "knn")
    with pytest.raises(TrainError, match="evaluate and write_page with the same data="):
        write_page(folder)
    assert evaluate(folder, "linear", data=data)["accuracy"]["raw"]["linear"] == 100
    assert write_page(folder, data=data).is_file()
    assert trained_encoder(folder)[1]["data"] == "given"  # an export needs no images
