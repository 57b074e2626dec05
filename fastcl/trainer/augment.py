"""Two random views of every image of a batch, as tensor operations on the whole batch: no torchvision, no loop."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample


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

    def two_views(
        self, images: Tensor, generator: torch.Generator, rows: Tensor | None = None, of: int = 0
    ) -> tuple[Tensor, Tensor]:
        """Two views of each image, drawn independently.

        Args:
            images: ``(B, C, H, W)``, 0 to 1, on any device.
            generator: on the CPU; its state alone decides the views.
            rows: ``(B,)``; the images are these rows of a batch of ``of``, and get the views that they get there.

        Returns:
            Twice ``(B, C, H, W)``, 0 to 1.
        """
        rows, of = (torch.arange(len(images)), len(images)) if rows is None else (rows, of)
        return self._view(images, generator, rows, of), self._view(images, generator, rows, of)

    def _view(self, images: Tensor, generator: torch.Generator, rows: Tensor, of: int) -> Tensor:
        batch = len(images)

        def uniform(low: float, high: float) -> Tensor:
            return torch.rand(of, generator=generator)[rows] * (high - low) + low

        # Crop, mirror and rotation are one affine map from places in the view to places in the image, both -1 to 1.
        area, log_aspect = uniform(*self.area), uniform(-math.log(self.aspect), math.log(self.aspect))
        width = (area * log_aspect.exp()).sqrt().clamp(max=1)
        height = (area / log_aspect.exp()).sqrt().clamp(max=1)
        across, down = uniform(-1, 1) * (1 - width), uniform(-1, 1) * (1 - height)
        angle = uniform(-self.degrees, self.degrees).deg2rad()
        mirrored = torch.where(uniform(0, 1) < self.flip, -width, width)
        theta = torch.stack(
            [mirrored * angle.cos(), -height * angle.sin(), across, mirrored * angle.sin(), height * angle.cos(), down],
            dim=1,
        ).view(batch, 2, 3)
        grid = affine_grid(theta.to(images.device), list(images.shape), align_corners=False)
        # Outside the image is black, as the paper that grey images stand on; colour photographs go on as they end.
        outside = "zeros" if images.shape[1] == 1 else "border"
        view = grid_sample(images, grid, padding_mode=outside, align_corners=False)

        def each(values: Tensor) -> Tensor:
            return values.to(images.device).view(batch, 1, 1, 1)

        saturation = uniform(1 - self.saturation, 1 + self.saturation)
        saturation = torch.where(uniform(0, 1) < self.grey, 0, saturation)
        contrast = each(uniform(1 - self.contrast, 1 + self.contrast))
        brightness = each(uniform(-self.brightness, self.brightness))
        if images.shape[1] > 1:
            luma = view.mean(1, keepdim=True)
            view = luma + each(saturation) * (view - luma)
        mean = view.mean((1, 2, 3), keepdim=True)
        return (mean + contrast * (view - mean) + brightness).clamp(0, 1)


DIGITS = Augmentation(area=(0.5, 1.0), degrees=20)  # no mirror: a mirrored digit is no digit
GREY = Augmentation(area=(0.3, 1.0), degrees=10, flip=0.5)
RGB = Augmentation(area=(0.2, 1.0), flip=0.5, brightness=0.4, saturation=0.4, grey=0.2)
