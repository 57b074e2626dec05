"""Images that are decoded when they are asked for, from files or from members of shards, and those that cannot be.

Data sets of millions of images have broken ones. One that cannot be decoded gets a stand-in: the next one of the same
half and class, in the order of the data set, that can. So what reading an image gives is a function of the files alone,
the same in every epoch, at any number of threads and after a resume; labels stay right, test images never stand in for
training images, and a class keeps its size.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .checkpoint import write_json
from .errors import MissingData, need

_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # not EPS, for which Pillow runs another program
_ENOUGH = 1000  # images that are judged as if they were at least so many: of few, some are broken by chance
_SHOWN = 3  # images that an error names
_UNREAD, _DECODED, _BROKEN = 0, 1, 2


class Part(NamedTuple):
    """Where an image is: ``size`` bytes of a file from ``offset`` on (-1: all), called ``name`` in it."""

    file: str
    offset: int = 0
    size: int = -1
    name: str = ""

    def __str__(self) -> str:
        return f"{self.file}/{self.name}" if self.name else self.file


class Decoder:
    """Any selection of images as a tensor.

    Args:
        parts: where the N images are.
        groups: ``(N,)`` int64; an image that cannot be decoded is replaced by one of its group.
        size: pixels per side, to which images are cropped in the middle and resized.
        threads: that decode; as many as cores and 4, at most 32, where it is None. No result depends on it.
        max_corrupt: share of the images read so far, 0 to 1, that may be broken.

    Attributes:
        state: ``(N,)`` uint8, what is known of each image: 0, not read yet, 1, decoded, 2, broken. Nothing that
            :meth:`read` and :meth:`shown` give depends on it, but for whether there are too many broken ones.
    """

    def __init__(
        self,
        parts: Sequence[Part] = (),
        groups: Tensor | None = None,
        size: int = 0,
        threads: int | None = None,
        max_corrupt: float = 0.0,
    ) -> None:
        self.parts, self.size, self.max_corrupt = parts, size, max_corrupt
        self.groups = torch.zeros(len(parts), dtype=torch.int64) if groups is None else groups
        self.state = torch.zeros(len(parts), dtype=torch.uint8)
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="fastcl-decode")

    def read(self, at: Tensor) -> Tensor:
        """Images ``at`` ``(B,)`` or their stand-ins: ``(B, 3, size, size)``, fp32, 0 to 1.

        Raises:
            MissingData: too many are broken, all of a group are, or a file cannot be read for a reason that may pass.
        """
        images: dict[int, Tensor] = {}
        while missing := [i for i in dict.fromkeys(self._sound(at)) if i not in images]:
            images |= self._decode(missing)
        pixels = torch.empty(len(at), 3, self.size, self.size)
        for row, i in zip(pixels, self._sound(at), strict=True):
            row.copy_(images[i])
        return pixels / 255

    def shown(self, at: Tensor) -> Tensor:
        """Which images ``(B,)`` :meth:`read` gives for ``at`` ``(B,)``; free after it. Raises what it raises."""
        while unread := [i for i in dict.fromkeys(self._sound(at)) if self.state[i] == _UNREAD]:
            self._decode(unread)
        return torch.tensor(self._sound(at), dtype=torch.int64)

    def broken(self) -> list[str]:
        """The images that were found broken, each once, in the order of the data set."""
        return [str(self.parts[i]) for i in (self.state == _BROKEN).nonzero().squeeze(1).tolist()]

    def list_broken(self, file: Path) -> None:
        """Write :meth:`broken` as JSON, where there are any."""
        if broken := self.broken():
            write_json(file, broken)

    def _sound(self, at: Tensor) -> list[int]:
        """Each image, or the next of its group that is not known to be broken."""
        sound = at.tolist()
        for k in (self.state[at] == _BROKEN).nonzero().squeeze(1).tolist():
            first = sound[k]
            while self.state[sound[k]] == _BROKEN:
                sound[k] = int(self._next[sound[k]])
                if sound[k] == first:
                    raise MissingData(
                        f"none of the {int((self.groups == self.groups[first]).sum())} images of a class can be decoded"
                        f" ({self.parts[first]} is one); expected at least one of each class that can. Repair one, or "
                        "remove the class."
                    )
        return sound

    @cached_property
    def _next(self) -> Tensor:
        """The image ``(N,)`` after each in its group; after the last, the first."""
        order = self.groups.sort(stable=True).indices
        after = torch.empty_like(order)
        for group in order.split(self.groups.unique(return_counts=True)[1].tolist()):
            after[group] = group.roll(-1)
        return after

    def _decode(self, at: list[int]) -> dict[int, Tensor]:
        """Those that can be decoded, ``(3, size, size)`` uint8."""
        images = dict(zip(at, self._pool.map(self._image, at), strict=True))
        for i, image in images.items():
            self.state[i] = _BROKEN if image is None else _DECODED
        self._check()
        return {i: image for i, image in images.items() if image is not None}

    def _image(self, index: int) -> Tensor | None:
        part = self.parts[index]
        try:
            with open(part.file, "rb") as file:  # of its own, so that threads do not share a position in it
                file.seek(part.offset)
                content = file.read(part.size)
        except (FileNotFoundError, PermissionError):  # as lasting as a broken image
            return None
        except OSError as error:  # a disk or a network may recover, and then the run would be another one
            raise MissingData(
                f"{part} cannot be read ({error}); expected a disk that answers. The run goes on from its last "
                "checkpoint with: fastcl train --resume."
            ) from error
        return _pixels(content, self.size)

    def _check(self) -> None:
        broken, seen = int((self.state == _BROKEN).sum()), int((self.state != _UNREAD).sum())
        if broken > self.max_corrupt * max(seen, min(len(self.state), _ENOUGH)):
            names = self.broken()
            more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
            raise MissingData(
                f"{broken} of the {seen} images read so far cannot be decoded ({', '.join(names[:_SHOWN])}{more}); "
                f"expected at most {self.max_corrupt:.3g} of them. Repair them, or raise --max-corrupt."
            )


def _pixels(content: bytes, size: int) -> Tensor | None:
    """The middle of an image as ``(3, size, size)`` uint8, or None where it cannot be decoded."""
    image_module: Any = need("PIL.Image", "a folder of images", "Install it: pip install pillow.")
    fit = need("PIL.ImageOps", "a folder of images").fit
    try:
        image = image_module.open(io.BytesIO(content), formats=_FORMATS)
        if image.mode.startswith("I"):  # 16 bits, whose upper 8 count; Pillow would cut them off at 255
            image = image.convert("I").point(lambda value: value * (1 / 256)).convert("L")
        if image.mode == "P" and "transparency" in image.info:  # which Pillow warns of otherwise
            image = image.convert("RGBA")
        image = image.convert("RGB")
        pixels = fit(image, (size, size), image_module.Resampling.BILINEAR).tobytes()
    except MemoryError:
        raise
    except Exception:  # Pillow raises almost anything for a damaged file
        return None
    return torch.frombuffer(bytearray(pixels), dtype=torch.uint8).view(size, size, 3).permute(2, 0, 1)
