"""Random views of every image of a batch, as tensor operations on the whole batch: no torchvision, no loop.

What happens to an image is a function of a key and the image's number alone, whatever batch, rank or process it is in.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample

_DRAWS = 10  # random numbers that a view takes


@dataclass(frozen=True)
class Augmentation:
    """What may happen to a view. SimCLR (Chen et al. 2020, arXiv:2002.05709, appendix A) is the model.

    Attributes:
        area: least and largest share of the image that a crop shows.
        aspect: largest width over height of a crop; the smallest is its inverse.
        degrees: largest rotation, either way.
        contrast, brightness, saturation: largest relative change (brightness: of the full range), either way.
        flip, grey: probabilities of a mirror image and of losing all colour.
    """

    area: tuple[float, float]
    aspect: float = 4 / 3
    degrees: float = 0.0
    contrast: float = 0.4
    brightness: float = 0.2
    saturation: float = 0.0
    flip: float = 0.0
    grey: float = 0.0

    def views(
        self,
        images: Tensor,
        at: Tensor,
        key: tuple[object, ...],
        *,
        count: int = 2,
        local_crops: int = 0,
        local_size: int | None = None,
    ) -> tuple[Tensor, ...]:
        """Views of each image, drawn independently; then small ones of a small part of it, which cost less.

        Multi-crop is SwAV's (Caron et al. 2020, arXiv:2006.09882, section 3.3). Local crops show less of the image
        than the others: from its 5/14 up to the least share of theirs, as there.

        Args:
            images: ``(B, C, H, W)``, 0 to 1, on any device.
            at: ``(B,)``, the numbers of the images in their data set.
            key: what else decides, such as the seed and the epoch.
            count: of views.
            local_crops: of small ones.
            local_size: pixels per side of those; 3/7 of the image's where it is None, as 96 of 224.

        Returns:
            ``count`` of ``(B, C, H, W)``, and ``local_crops`` of ``(B, C, local_size, local_size)``, 0 to 1.
        """
        height, width = images.shape[2:]
        local = replace(self, area=(self.area[0] * 5 / 14, self.area[0]))
        side = local_size or usual_local_size(height, width)
        kinds = [(self, (height, width))] * count + [(local, (side, side))] * local_crops
        return tuple(
            augmentation._view(images, uniform((*key, number), at, _DRAWS), size)
            for number, (augmentation, size) in enumerate(kinds)
        )

    def _view(self, images: Tensor, draws: Tensor, size: tuple[int, int]) -> Tensor:
        batch, channels = images.shape[:2]
        draw = iter(draws.unbind(1))

        def between(low: float, high: float) -> Tensor:
            return next(draw) * (high - low) + low

        # Crop, mirror and rotation are one affine map from places in the view to places in the image, both -1 to 1.
        area, log_aspect = between(*self.area), between(-math.log(self.aspect), math.log(self.aspect))
        width = (area * log_aspect.exp()).sqrt().clamp(max=1)
        height = (area / log_aspect.exp()).sqrt().clamp(max=1)
        across, down = between(-1, 1) * (1 - width), between(-1, 1) * (1 - height)
        angle = between(-self.degrees, self.degrees).deg2rad()
        mirrored = torch.where(between(0, 1) < self.flip, -width, width)
        theta = torch.stack(
            [mirrored * angle.cos(), -height * angle.sin(), across, mirrored * angle.sin(), height * angle.cos(), down],
            dim=1,
        ).view(batch, 2, 3)
        grid = affine_grid(theta.to(images.device), [batch, channels, *size], align_corners=False)
        # Outside the image is black, as the paper that grey images stand on; colour photographs go on as they end.
        outside = "zeros" if channels == 1 else "border"
        view = grid_sample(images, grid, padding_mode=outside, align_corners=False)

        def each(values: Tensor) -> Tensor:
            return values.to(images.device).view(batch, 1, 1, 1)

        saturation = between(1 - self.saturation, 1 + self.saturation)
        saturation = torch.where(between(0, 1) < self.grey, 0, saturation)
        contrast = each(between(1 - self.contrast, 1 + self.contrast))
        brightness = each(between(-self.brightness, self.brightness))
        if channels > 1:
            luma = view.mean(1, keepdim=True)
            view = luma + each(saturation) * (view - luma)
        mean = view.mean((1, 2, 3), keepdim=True)
        return (mean + contrast * (view - mean) + brightness).clamp(0, 1)


def uniform(key: tuple[object, ...], at: Tensor, count: int) -> Tensor:
    """``count`` random numbers of the key for each of the indices ``at`` ``(B,)``: ``(B, count)``, fp32, 0 to below 1.

    Counted, not drawn one after another: those of an index do not depend on which others are asked for.
    """
    digest = hashlib.sha256(repr(key).encode()).digest()
    bits = _splitmix64(int.from_bytes(digest[:8], "little", signed=True), at[:, None] * count + torch.arange(count))
    return _shifted(bits, 40).float() / 2**24


def _splitmix64(seed: int, n: Tensor) -> Tensor:
    """Numbers ``n``, from 0, of the generator that has ``seed``: their 64 bits as int64, whose arithmetic wraps.

    SplitMix64 (Steele et al. 2014, doi:10.1145/2660193.2660195) mixes up multiples of the golden ratio; the constants
    are those of Java's SplittableRandom.
    """
    z = (n + 1) * _signed(0x9E3779B97F4A7C15) + seed
    z = (z ^ _shifted(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ _shifted(z, 27)) * _signed(0x94D049BB133111EB)
    return z ^ _shifted(z, 31)


def _shifted(z: Tensor, bits: int) -> Tensor:
    """To the right, as if int64 had no sign."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    return value - (1 << 64)


def usual_local_size(height: int, width: int) -> int:
    """Pixels per side of a local crop of such images."""
    return max(round(min(height, width) * 3 / 7), 1)


DIGITS = Augmentation(area=(0.5, 1.0), degrees=20)  # no mirror: a mirrored digit is no digit
GREY = Augmentation(area=(0.3, 1.0), degrees=10, flip=0.5)
RGB = Augmentation(area=(0.2, 1.0), flip=0.5, brightness=0.4, saturation=0.4, grey=0.2)
