"""How launches are cut into tiles: a static table, so that every run and every rank computes the same bits.

A kind of launch has a list of rows; the first that serves the depth D, and is not too large for the device, is used.
``python -m benchmarks.aot`` shows that all fit registers and shared memory on their architectures. ``fastcl tune``
measures others on a GPU and writes rows that go before these into the user's cache: nothing is tuned unless asked for.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from .. import _settings


class Config(NamedTuple):
    """Rows and columns of a tile, depth of a step of its product, features of an output tile, warps, and stages."""

    kind: str
    depth: int  # the largest D it serves
    block_m: int
    block_n: int
    block_k: int
    block_d: int
    warps: int
    stages: int


Rows = dict[str, list[Config]]
ANY = 1 << 30


def _table(rows: dict[str, list[tuple[int, ...]]]) -> Rows:
    return {kind: [Config(kind, *row) for row in rows[kind]] for kind in rows}


# depth, block_m, block_n, block_k, block_d, warps, stages
_UNITS_32 = _table({
    "sums": [(ANY, 64, 64, 16, 0, 4, 1)],
    "grad": [(ANY, 32, 32, 16, 64, 8, 1)],
    "one_pass": [],
    "weights": [(ANY, 32, 64, 16, 0, 8, 1)],
    "product": [(ANY, 32, 0, 16, 64, 8, 1)],
    "argmax": [(ANY, 32, 64, 16, 0, 8, 1)],
    "topk": [(ANY, 32, 64, 16, 0, 8, 1)],
    "finish": [(ANY, 32, 64, 16, 0, 8, 1)],
})  # fmt: skip
_UNITS_16 = _table({  # 16 bytes per thread and load want deeper steps
    "sums": [(ANY, 32, 64, 32, 0, 8, 1)],
    "grad": [(ANY, 32, 32, 32, 64, 8, 1)],
    "one_pass": [],
    "weights": [(ANY, 32, 64, 32, 0, 8, 1)],
    "product": [(ANY, 32, 0, 32, 64, 8, 1)],
    "argmax": [(ANY, 32, 64, 32, 0, 8, 1)],
    "topk": [(ANY, 32, 64, 32, 0, 8, 1)],
    "finish": [(ANY, 32, 64, 32, 0, 8, 1)],
})  # fmt: skip
_MMA_SYNC_16 = _table({
    "sums": [(64, 64, 128, 64, 0, 8, 2), (128, 64, 128, 128, 0, 8, 2), (ANY, 128, 64, 32, 0, 8, 3)],
    "sums, crowded": [(64, 64, 64, 64, 0, 4, 2), (128, 64, 64, 128, 0, 8, 2), (ANY, 64, 64, 32, 0, 4, 2)],
    "grad": [
        (64, 128, 64, 64, 64, 8, 2), (128, 128, 64, 128, 128, 8, 2), (ANY, 64, 64, 32, 128, 8, 2),
        (ANY, 64, 64, 32, 64, 8, 2),
    ],
    "grad, crowded": [(64, 64, 64, 64, 64, 8, 1), (128, 64, 64, 128, 128, 8, 2), (ANY, 64, 32, 32, 64, 8, 2)],
    "one_pass": [(64, 64, 64, 64, 64, 4, 2), (128, 64, 64, 128, 128, 4, 2)],
    "weights": [(ANY, 128, 64, 32, 0, 8, 3)],
    "product": [(ANY, 128, 0, 32, 128, 8, 3)],
    "argmax": [(ANY, 64, 64, 32, 0, 8, 2)],
    "topk": [(ANY, 32, 64, 32, 0, 8, 2)],
    "finish": [(ANY, 32, 32, 64, 0, 8, 1)],
})  # fmt: skip
_MMA_SYNC_TMA_16 = {  # tiles come through the copy engine, and registers are fewer
    **_MMA_SYNC_16,
    **_table({
        "grad": [
            (64, 64, 64, 64, 64, 8, 2), (128, 64, 64, 128, 128, 8, 2), (ANY, 64, 64, 32, 128, 8, 2),
            (ANY, 64, 64, 32, 64, 8, 2),
        ],
    }),
}  # fmt: skip
_MMA_SYNC_32 = _table({
    "sums": [(ANY, 64, 64, 32, 0, 8, 2)],
    "grad": [(ANY, 64, 64, 32, 64, 8, 2)],
    "one_pass": [],
    "weights": [(ANY, 64, 64, 32, 0, 4, 2)],
    "product": [(ANY, 64, 0, 32, 64, 4, 2)],
    "argmax": [(ANY, 64, 64, 32, 0, 8, 2)],
    "topk": [(ANY, 32, 64, 32, 0, 8, 2)],
    "finish": [(ANY, 64, 64, 32, 0, 8, 2)],
})  # fmt: skip
_WGMMA_16 = _table({  # measured on an H200: blocks of one warpgroup, several per processor, beat blocks of two
    "sums": [
        (64, 128, 64, 64, 0, 4, 3), (128, 128, 64, 128, 0, 4, 3), (256, 64, 128, 256, 0, 4, 1),
        (ANY, 128, 128, 64, 0, 4, 3),
    ],
    "sums, crowded": [
        (64, 64, 128, 64, 0, 4, 3), (128, 64, 128, 128, 0, 4, 3), (256, 64, 64, 256, 0, 4, 1),
        (ANY, 128, 128, 64, 0, 8, 4),
    ],
    "grad": [
        (64, 128, 128, 64, 64, 4, 3), (128, 64, 128, 128, 128, 4, 3), (256, 64, 64, 256, 256, 4, 2),
        (ANY, 64, 128, 64, 256, 4, 2),
    ],
    "grad, crowded": [
        (64, 128, 64, 64, 64, 8, 3), (128, 128, 64, 128, 128, 8, 3), (256, 64, 64, 256, 256, 8, 2),
        (ANY, 64, 64, 64, 256, 8, 2),
    ],
    "one_pass": [(64, 64, 128, 64, 64, 4, 3), (128, 64, 64, 128, 128, 4, 3), (256, 64, 64, 256, 256, 4, 2)],
    "weights": [(ANY, 128, 128, 64, 0, 4, 3)],
    "weights, crowded": [(ANY, 128, 128, 64, 0, 8, 4)],
    "product": [(ANY, 128, 0, 64, 128, 8, 4)],
    "argmax": [(ANY, 64, 128, 64, 0, 4, 3)],
    "topk": [(ANY, 64, 64, 64, 0, 4, 2)],
    "finish": [(ANY, 64, 64, 64, 0, 4, 2)],
})  # fmt: skip
_WGMMA_32 = _table({
    "sums": [(ANY, 128, 64, 32, 0, 8, 3)],
    "grad": [(ANY, 64, 64, 32, 64, 4, 2)],
    "grad, crowded": [(ANY, 64, 64, 32, 64, 8, 2)],
    "one_pass": [],
    "weights": [(ANY, 128, 64, 32, 0, 8, 3)],
    "product": [(ANY, 128, 0, 32, 64, 8, 3)],
    "argmax": [(ANY, 64, 64, 32, 0, 4, 2)],
    "topk": [(ANY, 64, 64, 32, 0, 8, 2)],
    "finish": [(ANY, 64, 64, 32, 0, 4, 2)],
})  # fmt: skip
_TCGEN05_32 = {  # a thread has 32 columns of a tile of 128 rows, and needs all of their keys at once; of 64 rows, 16
    **_WGMMA_32,
    **_table({"sums, crowded": [(ANY, 64, 64, 32, 0, 8, 3)]}),
}
_TCGEN05_16 = {
    **_WGMMA_16,
    **_table({
        "sums": [
            (64, 128, 64, 64, 0, 8, 3), (128, 128, 64, 128, 0, 8, 3), (256, 128, 64, 256, 0, 8, 2),
            (ANY, 128, 64, 64, 0, 8, 4),
        ],
        "sums, crowded": [(64, 64, 64, 64, 0, 8, 3), (128, 64, 64, 128, 0, 8, 3), (ANY, 64, 64, 64, 0, 8, 4)],
        "grad": [
            (64, 128, 64, 64, 64, 8, 2), (128, 128, 64, 128, 128, 8, 2), (256, 64, 64, 256, 256, 8, 2),
            (ANY, 64, 64, 64, 256, 8, 2),
        ],
        "one_pass": [(64, 128, 64, 64, 64, 8, 3), (128, 128, 64, 128, 128, 8, 3), (256, 64, 64, 256, 256, 8, 2)],
        "weights": [(ANY, 128, 64, 64, 0, 8, 4)],
        "weights, crowded": [(ANY, 128, 64, 64, 0, 8, 4)],
        "argmax": [(ANY, 64, 64, 64, 0, 4, 2)],
        "topk": [(ANY, 64, 64, 64, 0, 8, 2)],
    }),
}  # fmt: skip
_INTERPRETER = _table({
    "sums": [(32, 16, 32, 32, 0, 1, 1), (ANY, 32, 16, 32, 0, 1, 1)],
    "grad": [(32, 16, 32, 32, 32, 1, 1), (ANY, 16, 32, 32, 32, 1, 1)],
    "one_pass": [(32, 16, 32, 32, 0, 1, 1), (64, 16, 32, 64, 0, 1, 1)],
    "weights": [(ANY, 32, 16, 32, 0, 1, 1)],
    "product": [(ANY, 16, 0, 32, 32, 1, 1)],
    "argmax": [(ANY, 16, 32, 32, 0, 1, 1)],
    "topk": [(ANY, 16, 32, 32, 0, 1, 1)],
    "finish": [(ANY, 16, 32, 32, 0, 1, 1)],
})  # fmt: skip
_TABLE = {
    "fp32 units, 32 bits": _UNITS_32,
    "fp32 units, 16 bits": _UNITS_16,
    "mma.sync, 32 bits": _MMA_SYNC_32,
    "mma.sync, 16 bits": _MMA_SYNC_16,
    "mma.sync and TMA, 32 bits": _MMA_SYNC_32,
    "mma.sync and TMA, 16 bits": _MMA_SYNC_TMA_16,
    "wgmma, 32 bits": _WGMMA_32,
    "wgmma, 16 bits": _WGMMA_16,
    "tcgen05, 32 bits": _TCGEN05_32,
    "tcgen05, 16 bits": _TCGEN05_16,
    "interpreter": _INTERPRETER,
}


@lru_cache(maxsize=None)
def family(capability: tuple[int, int], element_size: int, precision: str) -> str:
    """How tiles are multiplied on a device, and how wide their numbers are: the first key of the table."""
    if precision in ("ieee", "upcast"):
        unit = "fp32 units"
    else:
        unit = {8: "mma.sync", 9: "wgmma", 10: "tcgen05"}.get(capability[0], "mma.sync and TMA")
    return f"{unit}, {8 * element_size} bits"


def config(
    family: str, kind: str, d: int, crowded: bool = False, gpu: str = "", refused: Collection[Config] = ()
) -> Config | None:
    """The first row of the table that serves this depth and was not refused by the device, or ``None``.

    ``crowded``: with masks and biases of all sorts, whose numbers want registers, too. ``gpu``: look for tuned rows.
    """
    if kind in _trial:
        return _trial[kind]
    table = _TABLE[family]
    if crowded and f"{kind}, crowded" in table:
        kind = f"{kind}, crowded"
    for rows in (tuned(gpu).get(family, {}).get(kind, ()), table[kind]):
        for row in rows:
            if d <= row.depth and row not in refused:
                return row
    return None


_trial: dict[str, Config] = {}


@contextmanager
def trying(row: Config) -> Iterator[None]:
    """Use one row for its kind, whatever the table says."""
    _trial[row.kind] = row
    try:
        yield
    finally:
        del _trial[row.kind]


def rows(family: str, kind: str) -> list[Config]:
    """The static rows of a kind, one per depth."""
    return list({row.depth: row for row in reversed(_TABLE[family][kind])}.values())[::-1]


def tuned_file(gpu: str) -> Path:
    """Where ``fastcl tune`` keeps what it found for a GPU, by its name; another Triton compiles other code."""
    import triton

    name = "".join(c if c.isalnum() else "-" for c in f"{gpu}-triton-{triton.__version__}").lower()
    return _settings.cache_folder() / f"tuned-{name}.json"


@lru_cache(maxsize=None)
def tuned(gpu: str) -> dict[str, Rows]:
    """Rows by family and kind that were measured on this GPU; none where there is no file, or one that is not ours."""
    if not gpu or not (file := tuned_file(gpu)).exists():
        return {}
    status = file.stat()
    if hasattr(os, "getuid") and (status.st_uid != os.getuid() or status.st_mode & 0o022):
        warnings.warn(f"{file} can be written by other users; it is not used. Run fastcl tune again.", stacklevel=2)
        return {}
    try:
        families = json.loads(file.read_text(encoding="utf-8"))["families"]
        return {
            family: {kind: [Config(kind, *map(int, row)) for row in found] for kind, found in kinds.items()}
            for family, kinds in families.items()
        }
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        warnings.warn(f"{file} cannot be read ({error!r}); it is not used. Run fastcl tune again.", stacklevel=2)
        return {}
