"""IDX files of unsigned bytes, the format of MNIST (LeCun, Cortes & Burges 1998), gzipped or not."""

from __future__ import annotations

import gzip
import struct
import zlib
from pathlib import Path

import torch
from torch import Tensor

from .errors import MissingData


def read_idx(folder: Path, name: str, dims: int, mend: str) -> Tensor:
    """The tensor in ``name`` or ``name.gz``: uint8, of ``dims`` dimensions.

    Raises:
        MissingData: it is not there, damaged or of another kind; ``mend`` says how to get it.
    """
    for file in (folder / f"{name}.gz", folder / name):
        if file.is_file():
            break
    else:
        raise MissingData(
            f"got no {name} or {name}.gz in {folder}; expected four IDX files: images and labels of train and t10k. "
            f"{mend}"
        )
    try:
        raw = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
        magic, *shape = struct.unpack(f">{1 + dims}I", raw[: 4 + 4 * dims])
    except (OSError, EOFError, ValueError, zlib.error, struct.error) as error:
        raise MissingData(f"{file} cannot be read ({error}). Install it again.") from error
    body = raw[4 + 4 * dims :]
    if magic != 0x0800 + dims or len(body) != torch.Size(shape).numel():
        raise MissingData(
            f"got {file} with magic number {magic:#06x}, shape {tuple(shape)} and {len(body)} bytes; expected "
            f"{0x0800 + dims:#06x} and as many bytes as the shape says. Install it again."
        )
    return torch.frombuffer(bytearray(body), dtype=torch.uint8).view(shape)
