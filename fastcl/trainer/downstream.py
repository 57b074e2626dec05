"""An exported ResNet as the backbone of torchvision's detectors and segmentation networks, and their data as COCO and
Cityscapes lay them out.

Images are 0 to 1, as in training: the models below neither take a mean off nor divide by a deviation.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from .errors import MissingData, TrainError, need
from .export import load_weights, read_weights, resnet_name

IGNORED = 255  # the label of pixels that no loss should see
CITYSCAPES_CLASSES = 19


def detection_model(
    file: Path | str, classes: int, *, masks: bool = False, trainable_layers: int = 3, **options: Any
) -> nn.Module:
    """Faster R-CNN (Ren et al. 2015, arXiv:1506.01497) with a feature pyramid (Lin et al. 2017, arXiv:1612.03144).

    Its BatchNorm is frozen at the statistics of the file, as is usual for batches of few large images.

    Args:
        file: a ResNet of RGB images that ``fastcl export`` wrote, ``.pt`` or ``.safetensors``.
        classes: kinds of objects, without the background, whose label is 0.
        masks: Mask R-CNN (He et al. 2017, arXiv:1703.06870), which finds the outline of objects too.
        trainable_layers: how many of the five stages, from the last one, are trained.
        options: for torchvision's ``FasterRCNN`` or ``MaskRCNN``, for instance ``min_size``.

    Raises:
        TrainError: the file cannot be read, or is not such a ResNet.
        MissingPackage: torchvision is not there.
    """
    weights, name = _resnet(file)
    detection = need("torchvision.models.detection", "detection")
    backbones = need("torchvision.models.detection.backbone_utils", "detection")
    backbone = backbones.resnet_fpn_backbone(backbone_name=name, weights=None, trainable_layers=trainable_layers)
    load_weights(backbone.body, weights, str(file))
    kind = detection.MaskRCNN if masks else detection.FasterRCNN
    model: nn.Module = kind(
        backbone, num_classes=classes + 1, **{"image_mean": [0.0] * 3, "image_std": [1.0] * 3, **options}
    )
    return model


def segmentation_model(file: Path | str, classes: int, *, head: str = "deeplabv3") -> nn.Module:
    """DeepLabV3 (Chen et al. 2017, arXiv:1706.05587) or an FCN (Long et al. 2015, arXiv:1411.4038).

    The last two stages are dilated instead of strided, as in torchvision; ResNet-18 and 34 have no such form there and
    keep their strides.

    Args:
        file: a ResNet of RGB images that ``fastcl export`` wrote, ``.pt`` or ``.safetensors``.
        classes: kinds of pixels.
        head: ``"deeplabv3"`` or ``"fcn"``.

    Returns:
        A module from images ``(B, 3, H, W)`` to ``{"out": (B, classes, H, W)}``; in training B is at least 2.

    Raises:
        TrainError: the file cannot be read, is not such a ResNet, or there is no such head.
        MissingPackage: torchvision is not there.
    """
    if head not in ("deeplabv3", "fcn"):
        raise TrainError(f"got head {head!r}; expected deeplabv3 or fcn. Choose one.")
    weights, name = _resnet(file)
    models = need("torchvision.models", "segmentation")
    extraction = need("torchvision.models.feature_extraction", "segmentation")
    part = need(f"torchvision.models.segmentation.{head}", "segmentation")
    dilated = {"replace_stride_with_dilation": [False, True, True]} if name not in ("resnet18", "resnet34") else {}
    resnet = getattr(models, name)(weights=None, **dilated)
    features, resnet.fc = resnet.fc.in_features, nn.Identity()
    load_weights(resnet, weights, str(file))
    backbone = extraction.create_feature_extractor(resnet, {"layer4": "out"})
    if head == "fcn":
        fcn: nn.Module = part.FCN(backbone, part.FCNHead(features, classes))
        return fcn
    deeplab: nn.Module = part.DeepLabV3(backbone, part.DeepLabHead(features, classes))
    return deeplab


class CocoImages(Dataset[tuple[Tensor, dict[str, Tensor]]]):
    """Images and objects of ``FOLDER/SPLIT/`` and ``FOLDER/annotations/instances_SPLIT.json``, without pycocotools.

    An item is an image ``(3, H, W)``, fp32, 0 to 1, and its ``boxes`` ``(N, 4)``, fp32, left, top, right and bottom in
    pixels, ``labels`` ``(N,)``, int64, from 1 in the order of the file's categories, and where they are asked for
    ``masks`` ``(N, H, W)``, uint8, 1 where the centre of a pixel is inside. Crowds and empty boxes are left out.

    Attributes:
        classes: names of the categories; that of label 1 comes first.

    Raises:
        MissingData: there is no such file, it is not COCO's, or, from an item, an image is not there or a mask is not
            given by polygons.
    """

    def __init__(self, folder: Path | str, split: str = "train2017", *, masks: bool = False) -> None:
        self.folder, self.masks = Path(folder) / split, masks
        file = Path(folder) / "annotations" / f"instances_{split}.json"
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            self.classes = [category["name"] for category in content["categories"]]
            labels = {category["id"]: i for i, category in enumerate(content["categories"], 1)}
            self.images = [(image["file_name"], image["id"]) for image in content["images"]]
            self.objects: dict[int, list[dict[str, Any]]] = {id: [] for _, id in self.images}
            for found in content["annotations"]:
                if not found.get("iscrowd") and min(found["bbox"][2:]) > 0:
                    self.objects[found["image_id"]].append(found | {"label": labels[found["category_id"]]})
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise MissingData(
                f"{file} cannot be read ({type(error).__name__}: {error}); expected COCO's categories, images and "
                "annotations. Name the folder that holds annotations/."
            ) from error

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        name, id = self.images[index]
        image, objects = _read_image(self.folder / name), self.objects[id]
        boxes = torch.tensor([found["bbox"] for found in objects], dtype=torch.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        target = {"boxes": boxes, "labels": torch.tensor([found["label"] for found in objects], dtype=torch.int64)}
        if self.masks:
            masks = [self._mask(found, image.shape[1], image.shape[2]) for found in objects]
            target["masks"] = torch.stack(masks) if masks else torch.zeros(0, *image.shape[1:], dtype=torch.uint8)
        return image, target

    def _mask(self, found: dict[str, Any], height: int, width: int) -> Tensor:
        polygons = found.get("segmentation")
        if not isinstance(polygons, list) or not polygons:
            raise MissingData(
                f"got no polygons for annotation {found.get('id')} of {self.folder.name}; expected them, as COCO has "
                "for all but crowds. Leave that object out, or train without masks."
            )
        inside = [polygon_mask(torch.tensor(p, dtype=torch.float64).view(-1, 2), height, width) for p in polygons]
        return torch.stack(inside).any(0).to(torch.uint8)


def cityscapes(folder: Path | str, split: str = "train") -> Dataset[tuple[Tensor, Tensor]]:
    """Images ``(3, H, W)``, fp32, 0 to 1, and labels ``(H, W)``, int64, 0 to 18 or :data:`IGNORED`.

    Of ``FOLDER/leftImg8bit/SPLIT/`` and the ``labelIds`` in ``FOLDER/gtFine/SPLIT/``, by torchvision's ``Cityscapes``;
    labels are the benchmark's train ids (Cordts et al. 2016, arXiv:1604.01685).

    Raises:
        MissingData: the folders are not there.
        MissingPackage: torchvision is not there.
    """
    sets = need("torchvision.datasets", "Cityscapes")
    tensors = need("torchvision.transforms.v2.functional", "Cityscapes")
    train_id = torch.full((256,), IGNORED)
    for kind in sets.Cityscapes.classes:
        if 0 <= kind.train_id < CITYSCAPES_CLASSES:
            train_id[kind.id] = kind.train_id

    def both(image: Any, labels: Any) -> tuple[Tensor, Tensor]:
        return tensors.pil_to_tensor(image).float() / 255, train_id[tensors.pil_to_tensor(labels)[0].long()]

    try:
        found: Dataset[tuple[Tensor, Tensor]] = sets.Cityscapes(
            str(folder), split, target_type="semantic", transforms=both
        )
    except (RuntimeError, OSError) as error:
        raise MissingData(
            f"got no Cityscapes in {folder} ({str(error).splitlines()[0]}); expected leftImg8bit/{split} and "
            f"gtFine/{split}. It is handed out at cityscapes-dataset.com to those who register."
        ) from error
    return found


def polygon_mask(corners: Tensor, height: int, width: int) -> Tensor:
    """Pixels whose centre is inside a polygon, by the even-odd rule.

    Args:
        corners: ``(P, 2)``, fp64: x to the right, y down, from the corner of the image, in pixels.

    Returns:
        ``(height, width)``, bool.
    """
    x, y = torch.arange(width) + 0.5, torch.arange(height) + 0.5
    inside = torch.zeros(height, width, dtype=torch.bool)
    for (x0, y0), (x1, y1) in zip(corners.tolist(), corners.roll(-1, 0).tolist(), strict=True):
        if y0 == y1:
            continue  # a level edge crosses no row of centres
        crossed = (y >= min(y0, y1)) & (y < max(y0, y1))
        at = x0 + (y.double() - y0) * (x1 - x0) / (y1 - y0)
        inside ^= crossed[:, None] & (x[None] < at[:, None])
    return inside


def _resnet(file: Path | str) -> tuple[dict[str, Tensor], str]:
    weights = {name: value for name, value in read_weights(file).items() if not name.startswith("fc.")}
    return weights, resnet_name(weights, str(file))


def _read_image(path: Path) -> Tensor:
    pil = need("PIL.Image", "reading images", "Install it: pip install pillow.")
    tensors = need("torchvision.transforms.v2.functional", "reading images")
    try:
        with pil.open(path) as opened:
            image: Tensor = tensors.pil_to_tensor(opened.convert("RGB")).float() / 255
    except OSError as error:
        raise MissingData(f"{path} cannot be decoded ({error}). Remove or replace it.") from error
    return image
