"""Measure other tiles of the Triton kernels on this GPU, and keep the faster ones for later runs: ``fastcl tune``.

Nothing else ever does: a loss takes its tiles from a static table. Ranks of one job that shall agree bit for bit must
all have the file, or none of them. Delete it to go back to the table.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from ._checks import sentence
from ._info import versions
from ._measure import graphed, interleaved_seconds
from .backends import Pairs, Sides, use_backend

KINDS = ("sums", "grad", "one_pass", "weights", "product", "argmax", "topk")
WORTH = 0.97  # of the table's time: a smaller gain is not worth leaving the table
_WRONG = 1e-2  # relative: another order of sums differs by far less


@dataclass(frozen=True)
class Settings:
    """What to measure."""

    kinds: tuple[str, ...] = KINDS
    dtype: str = "bfloat16"
    rows: int = 8192
    rounds: int = 5
    workers: int = min(8, os.cpu_count() or 1)  # processes that compile the candidates before they are measured
    device: str = "cuda"


def run(settings: Settings, say: Callable[[str], None]) -> dict[str, Any]:
    """Measure, write the file, and return what is in it.

    Raises:
        ValueError: an unknown kind.
        RuntimeError: Triton cannot run on the device.
    """
    if unknown := set(settings.kinds) - set(KINDS):
        raise ValueError(sentence(f"kinds {sorted(unknown)}", ", ".join(KINDS), "Check the spelling."))
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise RuntimeError(sentence("no CUDA device", "one to tune for", "Run fastcl tune on the machine that trains."))
    from .backends import _triton_configs as configs
    from .backends import triton

    device, dtype = torch.device(settings.device), getattr(torch, settings.dtype)
    sample = torch.zeros(2, 64, device=device, dtype=dtype)
    if reason := triton.unsupported("reduce", sample):
        raise RuntimeError(
            sentence(f"a device where Triton {reason}", "one that it runs on", "Run fastcl info for more.")
        )
    family, gpu = triton._family(sample), triton.limits(device).name
    file = configs.tuned_file(gpu)
    found = _read(file)
    table = found["families"].setdefault(family, {})
    kinds = [kind for kind in settings.kinds if kind != "product" or not triton._by_library(sample)]
    rows = [row for kind in kinds for row in configs.rows(family, kind)]
    _compile([candidate for row in rows for candidate in (row, *_candidates(row))], settings)
    for kind in kinds:
        faster = []
        for row in configs.rows(family, kind):
            best = _best(row, settings, dtype, device, say)
            if best is not None:
                faster.append(list(best[1:]))
        table[kind] = faster
    found.update(gpu=gpu, versions=versions())
    _write(file, found)
    configs.tuned.cache_clear()
    say(f"wrote {file}")
    return found


def _compile(candidates: list[Any], settings: Settings) -> None:
    """Fills Triton's cache from several processes: the compiler takes seconds for a kernel, running it milliseconds."""
    if settings.workers < 2:
        return
    spawn = multiprocessing.get_context("spawn")  # a process that has used CUDA cannot be forked
    try:
        with ProcessPoolExecutor(settings.workers, mp_context=spawn) as pool:
            list(pool.map(_try, candidates, itertools.repeat(settings), chunksize=4))
    except BrokenProcessPool:
        pass  # what one of them broke on is found again, and said, when it is measured


def _try(candidate: Any, settings: Settings) -> bool:
    """Whether a candidate runs."""
    from .backends._triton_configs import trying

    step = _step(candidate.kind, settings.rows, _depth(candidate), getattr(torch, settings.dtype), settings.device)
    try:
        with use_backend("triton"), trying(candidate):
            step()
    except Exception:  # too large for the device, or for the compiler
        return False
    return True


def _depth(row: Any) -> int:
    """Features by which a row is measured."""
    from .backends._triton_configs import ANY

    return 512 if row.depth == ANY else int(row.depth)


def _best(row: Any, settings: Settings, dtype: torch.dtype, device: torch.device, say: Callable[[str], None]) -> Any:
    """The fastest tiles for the depths of a row, or ``None`` where the row itself is good enough."""
    from .backends._triton_configs import trying

    d = _depth(row)
    step = _step(row.kind, settings.rows, d, dtype, settings.device)
    with use_backend("triton"), trying(row):
        want = step()
    seconds = {}
    for candidate in (row, *_candidates(row)):
        try:
            with use_backend("triton"), trying(candidate):
                error = float((step() - want).norm() / want.norm())
                if error <= _WRONG:
                    timed = graphed(step) if device.type == "cuda" else step
                    taken = interleaved_seconds({"": timed}, rounds=settings.rounds, device=device)[""]
                    seconds[candidate] = median(taken)
        except Exception:  # too large for the device, or for the compiler: another will do
            continue
    if row not in seconds:
        say(f"{row.kind:>9} D = {d:<4} the table's own tiles do not run here")
        return None
    best = min(seconds, key=seconds.__getitem__)
    gain = seconds[best] / seconds[row]
    say(f"{row.kind:>9} D = {d:<4} {seconds[best] * 1e6:>10.1f} us, {gain:.2f} of the table's; {_words(best)}")
    return best if gain <= WORTH else None


def _words(row: Any) -> str:
    return f"{row.block_m} x {row.block_n} x {row.block_k}, {row.warps} warps, {row.stages} stages"


def _candidates(row: Any) -> Iterator[Any]:
    """Rows like this one with other tiles, warps and stages."""
    least = min(64, *(b for b in (row.block_m, row.block_n) if b))
    sides = (least, 2 * least)
    steps = (row.block_k,) if row.block_k >= min(row.depth, 1024) else (row.block_k // 2, row.block_k)
    for m, n, k, warps, stages in itertools.product(sides, sides if row.block_n else (0,), steps, (4, 8), (1, 2, 3, 4)):
        candidate = row._replace(block_m=m, block_n=n, block_k=max(k, 16), warps=warps, stages=stages)
        if candidate != row:
            yield candidate


def _step(kind: str, n: int, d: int, dtype: torch.dtype, device: str) -> Callable[[], Tensor]:
    """Calls that spend their time in launches of a kind; what they compute, as one tensor."""
    from .backends import triton

    generator = torch.Generator().manual_seed(0)

    def rows(count: int) -> Tensor:
        return torch.nn.functional.normalize(torch.randn(count, d, generator=generator), dim=1).to(device, dtype)

    z, scale = rows(n), torch.tensor(10.0, device=device)
    one_set = Pairs(z, z, scale, symmetric=True)
    if kind == "sums":
        return lambda: triton.reduce("exp", one_set, False, True)[0]
    if kind in ("argmax", "topk"):
        return lambda: triton.topk(Pairs(z, z, scale), 1 if kind == "argmax" else 20)[0]
    if kind == "one_pass":
        frozen = Pairs(z[: max(n // 8, 1)], z, scale)
        return lambda: triton.reduce_grad("exp", frozen, True, False, False)[1]
    lse, _ = triton.reduce("exp", one_set, False, True)
    side = (lse, torch.full_like(lse, 1 / n))
    return lambda: triton.grad("exp", one_set, Sides(*side, *side), True, False, False)[0]


def _read(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        return found if isinstance(found.get("families"), dict) else {"families": {}}
    except (OSError, ValueError, AttributeError):
        return {"families": {}}


def _write(file: Path, found: dict[str, Any]) -> None:
    """Whole or not at all, and for its owner alone."""
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False, encoding="utf-8") as draft:
        json.dump(found, draft, indent=1)
    os.replace(draft.name, file)
