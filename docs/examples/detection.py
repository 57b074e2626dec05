"""From pixels to a detector: an encoder that fastcl trained is the backbone of four networks of torchvision.

``fastcl export`` writes the encoder of a run; on it Faster R-CNN and Mask R-CNN learn boxes and outlines, in COCO's
format, DeepLabV3 and an FCN a label for every pixel, in that of Cityscapes. Images are 0 to 1, as the encoder saw them.

    python docs/examples/detection.py
    python docs/examples/detection.py --encoder encoder.pt --coco COCO --cityscapes CITYSCAPES --steps 1000

Without folders, squares and discs on noise are drawn in both formats, and without a file a ResNet-18 is trained on them
for six steps, which shows the way and no more.

Metric: the training loss of each network, of the first step (``before``) and of the last two (``after``): it falls.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fastcl.trainer import TrainConfig, downstream, export, train
from fastcl.trainer.downstream import CITYSCAPES_CLASSES, IGNORED, CocoImages

SIZE, KINDS, LABEL_IDS = 64, ("square", "disc"), (26, 24)  # Cityscapes' car and person
SMALL = {"min_size": SIZE, "max_size": SIZE, "box_batch_size_per_image": 8, "rpn_post_nms_top_n_train": 50}


def draw(root: Path, count: int = 28) -> None:
    """One square or disc per image: folders by class, and the first eight in COCO's and Cityscapes' formats."""
    photos, masks = "city/leftImg8bit/train/town", "city/gtFine/train/town"
    for name in ("folder/square", "folder/disc", "coco/train2017", "coco/annotations", photos, masks):
        (root / name).mkdir(parents=True)
    images, objects = [], []
    for i in range(count):
        kind, radius = i % 2, 10 + i % 5
        x, y = (torch.rand(2) * (SIZE - 2 * radius) + radius).tolist()
        sides, turn = (4, 0.125) if kind == 0 else (16, 0.0)
        angles = [2 * math.pi * (k / sides + turn) for k in range(sides)]
        outline = [(x + radius * math.cos(a), y + radius * math.sin(a)) for a in angles]
        picture = Image.fromarray(torch.randint(0, 90, (SIZE, SIZE, 3), dtype=torch.uint8).numpy())
        ImageDraw.Draw(picture).polygon(outline, fill=(240, 160, 40) if kind == 0 else (40, 200, 240))
        picture.save(root / "folder" / KINDS[kind] / f"{i}.png")
        if i < 8:
            picture.save(root / "coco/train2017" / f"{i}.png")
            left, top = (min(c) for c in zip(*outline, strict=True))
            right, bottom = (max(c) for c in zip(*outline, strict=True))
            images.append({"id": i, "file_name": f"{i}.png"})
            box, corners = [left, top, right - left, bottom - top], [c for point in outline for c in point]
            objects.append({"image_id": i, "category_id": kind, "bbox": box, "segmentation": [corners]})
            labels = Image.new("L", (SIZE, SIZE), 7)  # road
            ImageDraw.Draw(labels).polygon(outline, fill=LABEL_IDS[kind])
            picture.save(root / photos / f"town_{i}_leftImg8bit.png")
            labels.save(root / masks / f"town_{i}_gtFine_labelIds.png")
    categories = [{"id": i, "name": name} for i, name in enumerate(KINDS)]
    content = {"images": images, "annotations": objects, "categories": categories}
    (root / "coco/annotations/instances_train2017.json").write_text(json.dumps(content))


def fit(model: nn.Module, data: Any, steps: int, batch: int = 2) -> tuple[float, float]:
    """Train on random batches; the losses of the first step and of the last two."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01, momentum=0.9)
    model.train()
    losses = []
    for _ in range(steps):
        images, targets = zip(*(data[i] for i in torch.randperm(len(data))[:batch].tolist()), strict=True)
        if isinstance(targets[0], Tensor):
            loss = cross_entropy(model(torch.stack(images))["out"], torch.stack(targets), ignore_index=IGNORED)
        else:
            loss = torch.stack(list(model(images, targets).values())).sum()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()
        losses.append(loss.item())
    return losses[0], sum(losses[-2:]) / 2


def main(
    steps: int = 12, seed: int = 0, encoder: str | None = None, coco: str | None = None, cityscapes: str | None = None
) -> dict[str, float]:
    """Train the four networks for a few steps; ``before`` and ``after`` are the means of their losses."""
    torch.manual_seed(seed)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        draw(root)
        if encoder is None:
            train(TrainConfig(data="imagefolder", data_dir=str(root / "folder"), image_size=32, encoder="resnet18",
                              steps=6, batch_size=16, seed=seed, output=str(root / "run")))  # fmt: skip
            encoder = str(root / "encoder.pt")
            export(root / "run", encoder)
        options = {} if coco else SMALL
        figures = {}
        for name in ("faster_rcnn", "mask_rcnn", "deeplabv3", "fcn"):
            if name.endswith("rcnn"):
                data: Any = CocoImages(coco or root / "coco", masks=name == "mask_rcnn")
                model = downstream.detection_model(encoder, len(data.classes), masks=name == "mask_rcnn", **options)
            else:
                data = downstream.cityscapes(cityscapes or root / "city")
                model = downstream.segmentation_model(encoder, CITYSCAPES_CLASSES, head=name)
            figures[f"{name}_before"], figures[f"{name}_after"] = fit(model, data, steps)
    means = {when: sum(v for name, v in figures.items() if name.endswith(when)) / 4 for when in ("before", "after")}
    return figures | means


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for flag in ("--encoder", "--coco", "--cityscapes"):
        parser.add_argument(flag)
    parser.add_argument("--steps", type=int, default=12)
    args = parser.parse_args()
    for name, value in main(args.steps, 0, args.encoder, args.coco, args.cityscapes).items():
        print(f"{name:20} {value:.3f}")
