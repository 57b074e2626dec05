"""Images in memory, from Python, as a data set."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .augment import GREY, RGB, Augmentation
from .data import Data, Images, class_names, in_memory
from .errors import MissingData


def from_tensors(
    images: Tensor,
    labels: Tensor,
    test_images: Tensor,
    test_labels: Tensor,
    classes: Sequence[str] | None = None,
    augmentation: Augmentation | None = None,
) -> Data:
    """Images in memory as a data set, for ``train(TrainConfig(data="given"), data=...)``.

    Args:
        images: ``(N, C, H, W)``, uint8, 0 to 255, or floating point, 0 to 1: without a mean taken off.
        labels: ``(N,)`` of an integer type; -1 for an image without a label.
        test_images, test_labels: as the first two, of images that nothing is trained on.
        classes: names, of 0 and so on; the numbers where it is None.
        augmentation: of views; where it is None, one for photographs, without colour where C is 1. Both mirror images.

    Raises:
        MissingData: another dtype, shape or range, halves that differ in shape, or fewer names than classes.
    """
    train, test = _checked("", images, labels), _checked("test_", test_images, test_labels)
    if images.shape[1:] != test_images.shape[1:]:
        raise MissingData(
            f"got images of {tuple(images.shape[1:])} and test_images of {tuple(test_images.shape[1:])}; expected one "
            "shape (C, H, W). Resize the one or the other."
        )
    return Data(
        train,
        test,
        class_names(classes, train.labels, test.labels),
        augmentation or (GREY if images.shape[1] == 1 else RGB),
    )


def _checked(prefix: str, images: Tensor, labels: Tensor) -> Images:
    for name, tensor in ((f"{prefix}images", images), (f"{prefix}labels", labels)):
        if not isinstance(tensor, Tensor):
            raise MissingData(f"got {name} of type {type(tensor).__name__}; expected a tensor. Try torch.as_tensor.")
    images, labels = images.detach().cpu(), labels.detach().cpu()
    if images.ndim != 4 or not images.numel():
        raise MissingData(
            f"got {prefix}images {tuple(images.shape)}; expected (N, C, H, W), none of them 0. Give grey ones a "
            "C of 1: images[:, None]."
        )
    if images.dtype != torch.uint8 and not images.is_floating_point():
        raise MissingData(f"got {prefix}images of {images.dtype}; expected uint8 or floating point. Convert them.")
    low, high = images.min().item(), images.max().item()  # NaN if there is one
    if images.is_floating_point() and not 0 <= low <= high <= 1:
        raise MissingData(
            f"got {prefix}images from {low:.4g} to {high:.4g}; expected floating point from 0 to 1. Leave out a "
            "normalisation, or divide by 255."
        )
    if (
        labels.is_floating_point()
        or labels.is_complex()
        or labels.dtype == torch.bool
        or labels.shape != images.shape[:1]
    ):
        raise MissingData(
            f"got {prefix}labels {tuple(labels.shape)} of {labels.dtype}; expected {tuple(images.shape[:1])} of int64, "
            "one for each image. Use -1 where there is none."
        )
    if int(labels.min()) < -1:
        raise MissingData(
            f"got {prefix}labels of {int(labels.min())}; expected 0 or more, or -1 for none. Number them."
        )
    return in_memory(images, labels.long(), peak=255 if images.dtype == torch.uint8 else 1)
