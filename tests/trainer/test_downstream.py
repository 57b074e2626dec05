"""Detectors and segmentation networks on an exported ResNet, and folders as COCO and Cityscapes have them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fastcl.trainer import TrainError, export
from fastcl.trainer.downstream import (
    CITYSCAPES_CLASSES,
    IGNORED,
    CocoImages,
    cityscapes,
    detection_model,
    polygon_mask,
    segmentation_model,
)
from fastcl.trainer.errors import MissingData

from .runs import need_torchvision
from .test_export import a_run

SMALL = {"min_size": 64, "max_size": 64, "box_batch_size_per_image": 8, "rpn_post_nms_top_n_train": 50}
BOXES = [(8, 12, 24, 20), (30, 10, 20, 30), (20, 24, 30, 24), (4, 4, 40, 30)]  # x, y, width, height


@pytest.fixture(scope="module", autouse=True)
def torchvision_works() -> None:
    need_torchvision()


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("encoder")
    export(a_run(folder / "run", "resnet18", 3), folder / "encoder.pt")
    return folder / "encoder.pt"


def picture(box: tuple[int, int, int, int]) -> Tensor:
    """Noise with a bright box, ``(3, 64, 72)``, uint8."""
    x, y, width, height = box
    image = torch.randint(0, 90, (3, 64, 72), dtype=torch.uint8, generator=torch.Generator().manual_seed(x))
    image[:, y : y + height, x : x + width] = torch.tensor([240, 160, 40], dtype=torch.uint8)[:, None, None]
    return image


def save(image: Tensor, path: Path) -> None:
    from torchvision.transforms.v2.functional import to_pil_image

    path.parent.mkdir(parents=True, exist_ok=True)
    to_pil_image(image).save(path)


@pytest.fixture(scope="module")
def coco(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four images of one box each; the first also has a crowd and an empty box, and a fifth image has nothing."""
    root = tmp_path_factory.mktemp("coco")
    objects: list[dict[str, Any]] = []
    for i, (x, y, width, height) in enumerate(BOXES):
        save(picture(BOXES[i]), root / "train2017" / f"{i:012}.png")
        outline = [x, y, x + width, y, x + width, y + height, x, y + height]
        objects.append({"image_id": 10 + i, "category_id": (18, 3)[i % 2], "bbox": [x, y, width, height], "iscrowd": 0,
                        "segmentation": [outline]})  # fmt: skip
    save(torch.zeros(3, 64, 72, dtype=torch.uint8), root / "train2017" / f"{4:012}.png")
    objects.append(objects[0] | {"iscrowd": 1, "segmentation": {"size": [64, 72], "counts": [0, 64 * 72]}})
    objects.append(objects[0] | {"bbox": [3, 3, 0, 5]})
    write_annotations(root, objects)
    return root


def write_annotations(root: Path, objects: list[dict[str, Any]]) -> None:
    content = {
        "images": [{"id": 10 + i, "file_name": f"{i:012}.png"} for i in range(5)],
        "categories": [{"id": 18, "name": "dog"}, {"id": 3, "name": "car"}],
        "annotations": [{"id": i, **found} for i, found in enumerate(objects)],
    }
    (root / "annotations").mkdir(exist_ok=True)
    (root / "annotations" / "instances_train2017.json").write_text(json.dumps(content))


@pytest.fixture(scope="module")
def city(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same boxes as cars (26) on road (7), with a row of what is not evaluated (3, and 255 in one pixel)."""
    root = tmp_path_factory.mktemp("city")
    for i, (x, y, width, height) in enumerate(BOXES):
        labels = torch.full((1, 64, 72), 7, dtype=torch.uint8)
        labels[:, y : y + height, x : x + width] = 26
        labels[:, 0], labels[:, 0, 5] = 3, 255
        save(picture(BOXES[i]), root / "leftImg8bit/train/town" / f"town_{i}_leftImg8bit.png")
        save(labels, root / "gtFine/train/town" / f"town_{i}_gtFine_labelIds.png")
    return root


def test_coco_is_read_as_it_was_written(coco: Path) -> None:
    data = CocoImages(coco, masks=True)
    assert len(data) == 5 and data.classes == ["dog", "car"]
    for i, (x, y, width, height) in enumerate(BOXES):
        image, target = data[i]
        assert torch.equal(image, picture(BOXES[i]) / 255)
        assert target["boxes"].tolist() == [[x, y, x + width, y + height]]  # no crowd, no empty box
        assert target["labels"].tolist() == [1 + i % 2]
        expected = torch.zeros(1, 64, 72, dtype=torch.uint8)
        expected[:, y : y + height, x : x + width] = 1
        assert torch.equal(target["masks"], expected)
    _, nothing = data[4]
    assert [tuple(nothing[k].shape) for k in ("boxes", "labels", "masks")] == [(0, 4), (0,), (0, 64, 72)]
    assert "masks" not in CocoImages(coco)[0][1]


def test_a_polygon_covers_the_pixels_whose_centres_it_holds() -> None:
    triangle = polygon_mask(torch.tensor([[0.0, 0.0], [4.0, 0.0], [0.0, 4.0]], dtype=torch.float64), 4, 5)
    assert triangle.int().tolist() == [[1, 1, 1, 0, 0], [1, 1, 0, 0, 0], [1, 0, 0, 0, 0], [0, 0, 0, 0, 0]]
    angle = torch.linspace(0, 2 * torch.pi, 201, dtype=torch.float64)[:-1]
    disc = polygon_mask(torch.stack([20 + 15 * angle.cos(), 20 + 15 * angle.sin()], 1), 40, 40)
    y, x = torch.meshgrid(torch.arange(40) + 0.5, torch.arange(40) + 0.5, indexing="ij")
    radius = ((x - 20) ** 2 + (y - 20) ** 2).sqrt()
    assert disc[radius < 14.99].all() and not disc[radius > 15].any()


@pytest.mark.parametrize(
    ("content", "sentence"),
    [("{}", "KeyError"), ("no json", "JSONDecodeError"), ("[]", "TypeError"), (None, "FileNotFoundError")],
)
def test_files_that_are_not_cocos_are_sentences(content: str | None, sentence: str, tmp_path: Path) -> None:
    (tmp_path / "annotations").mkdir()
    if content is not None:
        (tmp_path / "annotations" / "instances_train2017.json").write_text(content)
    with pytest.raises(MissingData, match=rf"instances_train2017\.json cannot be read \({sentence}"):
        CocoImages(tmp_path)


def test_masks_without_polygons_and_images_that_are_not_there_are_sentences(tmp_path: Path) -> None:
    save(picture(BOXES[0]), tmp_path / "train2017" / f"{0:012}.png")
    runs = {"size": [64, 72], "counts": "abc"}
    write_annotations(tmp_path, [{"image_id": 10, "category_id": 3, "bbox": [1, 1, 2, 2], "segmentation": runs}])
    with pytest.raises(MissingData, match="no polygons for annotation 0"):
        CocoImages(tmp_path, masks=True)[0]
    assert CocoImages(tmp_path)[0][1]["labels"].tolist() == [2]
    with pytest.raises(MissingData, match=r"000000000001\.png cannot be decoded"):
        CocoImages(tmp_path)[1]


def test_cityscapes_labels_are_train_ids(city: Path) -> None:
    data = cityscapes(city)
    found = {tuple(image.flatten().tolist()): labels for image, labels in (data[i] for i in range(4))}
    for box in BOXES:
        x, y, width, height = box
        expected = torch.zeros(64, 72, dtype=torch.int64)  # road
        expected[y : y + height, x : x + width] = 13  # car
        expected[0] = IGNORED
        assert torch.equal(found[tuple((picture(box) / 255).flatten().tolist())], expected)
    with pytest.raises(MissingData, match=r"expected leftImg8bit/val and gtFine/val"):
        cityscapes(city, "val")


@pytest.mark.parametrize("network", ["faster_rcnn", "mask_rcnn", "deeplabv3", "fcn"])
def test_the_backbone_is_that_of_the_file_and_the_loss_falls(
    network: str, encoder: Path, coco: Path, city: Path
) -> None:
    weights = torch.load(encoder, weights_only=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if network.endswith("rcnn"):
            masks = network == "mask_rcnn"
            model = detection_model(encoder, 2, masks=masks, **SMALL)
            backbone, data = model.get_submodule("backbone.body"), CocoImages(coco, masks=masks)
        else:
            model = segmentation_model(encoder, CITYSCAPES_CLASSES, head=network)
            backbone, data = model.get_submodule("backbone"), cityscapes(city)
        found = backbone.state_dict()
        assert {name for name in weights if "num_batches" not in name} <= found.keys()
        assert all(torch.equal(value, weights[name]) for name, value in found.items())
        losses = fit(model, [data[i] for i in range(4)], steps=12)
    first, last = sum(losses[:2]) / 2, sum(losses[-4:]) / 4  # all images once, and twice
    assert last < 0.75 * first, losses


def fit(model: nn.Module, data: list[Any], steps: int) -> list[float]:
    """The losses of a few steps on two images at a time."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01, momentum=0.9)
    model.train()
    losses = []
    for step in range(steps):
        images, targets = zip(*(data[(2 * step + i) % 4] for i in range(2)), strict=True)
        if isinstance(targets[0], Tensor):
            loss = cross_entropy(model(torch.stack(images))["out"], torch.stack(targets), ignore_index=IGNORED)
        else:
            loss = torch.stack(list(model(images, targets).values())).sum()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_a_detector_sees_the_images_that_the_encoder_saw(encoder: Path) -> None:
    model = detection_model(encoder, 2, min_size=64, max_size=64).eval()
    image = torch.rand(3, 64, 64)
    transformed, _ = model.get_submodule("transform")([image])
    assert torch.equal(transformed.tensors[0], image)


def test_a_segmentation_network_answers_for_every_pixel(encoder: Path) -> None:
    model = segmentation_model(encoder, 5).eval()
    with torch.no_grad():
        assert model(torch.rand(1, 3, 48, 40))["out"].shape == (1, 5, 48, 40)


def test_a_resnet50_is_dilated(tmp_path: Path) -> None:
    export(a_run(tmp_path / "run", "resnet50", 3), tmp_path / "encoder.pt")
    model = segmentation_model(tmp_path / "encoder.pt", 5, head="fcn").eval()
    with torch.no_grad():
        assert model.get_submodule("backbone")(torch.rand(1, 3, 64, 64))["out"].shape == (1, 2048, 8, 8)


def test_encoders_that_are_no_backbone_are_sentences(
    encoder: Path, short_run: tuple[Path, object], tmp_path: Path
) -> None:
    export(short_run[0], tmp_path / "conv.pt")
    export(a_run(tmp_path / "grey", "resnet18", 1), tmp_path / "grey.pt")
    for make in (detection_model, segmentation_model):
        with pytest.raises(TrainError, match=r"no ResNet's"):
            make(tmp_path / "conv.pt", 2)
        with pytest.raises(TrainError, match=r"conv1\.weight \(64, 1, 7, 7\) in place of \(64, 3, 7, 7\)"):
            make(tmp_path / "grey.pt", 2)
    with pytest.raises(TrainError, match="got head 'unet'; expected deeplabv3 or fcn"):
        segmentation_model(encoder, 2, head="unet")
