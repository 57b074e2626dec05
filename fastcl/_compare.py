"""``fastcl bench --peers``: fastcl beside every library that is installed, in one process and one run.

Four things of each contender: the time of forward and backward, its peak memory, how far loss and gradient are from
fp64, and the largest batch that a memory budget allows. Who is not here, or cannot, is listed with the reason.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from . import _peers
from ._bench import (
    DTYPES,
    about,
    at_least_one,
    check_rows,
    device_named,
    legend,
    looks_of,
    need_matplotlib,
    nothing_kept,
    result_row,
    time_and_memory,
    where,
)
from ._checks import choice, sentence
from ._info import cpu_model
from ._measure import beyond, interleaved_seconds, median_ratio, nan_last, peak_bytes, relative_error
from ._peers import LOSSES, PEERS, Loss, Problem
from .backends import NAMES, available_backends, native, use_backend

TEMPERATURES = (0.5, 0.07, 0.01)
BATCHES = ("easy", "hard")
ERROR_DTYPES = ("float32", "bfloat16", "float16")
ROUNDED = "fp64, rounded"  # to the dtype of the rows, and the loss to fp32: nobody can do better
COMPILED = "torch.compile, "
_OURS = "fastcl "
_ERROR_ROWS, _ERROR_QUEUE = 256, 4096  # a batch whose errors are those of larger ones, and quick in fp64
_CHECKED = 2**24  # logits whose fp64 form is computed beside a measured time
_MATRICES = 12  # as many matrices of logits may live at once, where a contender was not seen at a smaller size
_DRAWN = 10.0  # the largest error in a plot
_FIRST, _LAST = 64, 2**24  # rows that the search for the largest batch begins and ends with
_PRECISION = 32  # it ends where the next step would change the batch by less than one in so many

Step = Callable[[], object]
Oracle = Callable[[bool], tuple[Tensor, list[Tensor]]]


@dataclass(frozen=True)
class Settings:
    """What is measured; the fields are the flags of ``fastcl bench --peers``."""

    peers: tuple[str, ...] = LOSSES
    rows: tuple[int, ...] = (256, 1024, 4096)
    dim: int = 128
    dtype: str = "float32"
    device: str = "auto"
    rounds: int = 7
    threads: int | None = None
    dense_limit_gb: float = 8.0
    backends: tuple[str, ...] = ()
    queue: int = _peers.QUEUE
    call_seconds: float = 10.0
    memory_mb: float | None = None
    compile: bool = True


def run(settings: Settings, progress: Callable[[str], None] = print) -> dict[str, Any]:
    """Measure, one loss after the other. Contenders take turns in every round, after one warm-up call.

    *eager* is the dense loss in plain torch, *cross-entropy* its usual short form. *torch.compile* is either of them
    compiled, beside the measured times only: it compiles anew for every size and temperature. Ratios are medians over
    rounds of a contender's time over eager's in the same round.

    Args:
        progress: receives the lines of the tables as they are measured.

    Returns:
        Plain values for ``json.dumps``: ``command``, ``date``, ``commit``, ``versions``, ``peers`` (versions),
        ``missing`` (peer: reason), ``machine``, ``settings``, and three lists; ``None`` where nothing was measured:

        - ``rows``: ``loss``, ``rows``, ``columns``, ``contender``, ``seconds`` (one per round), ``median_seconds``,
          ``of_eager``, ``peak_bytes``, ``loss_error``, ``gradient_error``, ``skipped`` (a reason);
        - ``errors``: ``loss``, ``dtype``, ``temperature``, ``batch`` (easy or hard), ``contender``, ``loss_error``,
          ``gradient_error`` (the largest of the embeddings'), ``number_error`` (of scale and bias), ``failed``;
        - ``largest``, with a budget: ``loss``, ``contender``, ``rows``, ``peak_bytes``, ``limited_by`` (memory, time,
          size or an error).

        Errors are relative, of gradients in the Frobenius norm; ``None`` and a reason where one is not finite.

    Raises:
        ValueError: a setting out of range, or a device that is not there.
    """
    settings, device = _checked(settings)
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    machine = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_model(),
        "instructions": native.isa(),
        "threads": torch.get_num_threads(),
    }
    missing = _peers.missing()
    progress(f"D = {settings.dim}, {settings.dtype} on {where(machine)}, {settings.rounds} rounds")
    for name, reason in missing.items():
        progress(f"not here: {name} ({reason})")
    rows: list[dict[str, Any]] = []
    errors: list[dict[str, Any]] = []
    largest: list[dict[str, Any]] = []
    for loss in settings.peers:
        progress(f"\n{loss}\n{_TIMES_HEAD}")
        for row in times(loss, settings, device):
            progress(_times_line(row))
            rows.append(row)
        progress(_errors_head())
        for group in accuracy(loss, settings, device):
            progress(_errors_line(group))
            errors += group
        if settings.memory_mb is not None:
            progress(f"{'contender':<34}  largest batch within {settings.memory_mb:g} MB")
            for row in within(loss, settings, device):
                progress(_largest_line(row))
                largest.append(row)
    return {
        **about(settings, machine),
        "peers": _peers.package_versions(),
        "missing": missing,
        "rows": rows,
        "errors": errors,
        "largest": largest,
    }


def contenders(task: Problem, backends: Iterable[str], compiled: bool) -> dict[str, Loss]:
    """The loss as a function of its leaves by contender: plain torch, compiled, libraries, then fastcl's backends."""
    dense = {name: function for name, function in task.others.items() if name not in PEERS}
    functions = dict(dense)
    if compiled:
        torch.compiler.reset()  # or a new size is one too many, and runs as it is
        for name, function in dense.items():
            functions[COMPILED + name] = torch.compile(function, dynamic=False, fullgraph=True)
    functions.update(task.others)
    for backend in backends:
        functions[_OURS + backend] = _by(backend, task.ours)
    return functions


def times(loss: str, settings: Settings, device: torch.device) -> Iterator[dict[str, Any]]:
    """Rows of time, peak memory and error, over the batch sizes in ascending order."""
    before: dict[str, dict[str, Any]] = {}
    for n in sorted(settings.rows):
        task = _problem(loss, n, settings, device)
        columns = settings.queue if loss == "moco" else n
        functions, oracle = contenders(task, _backends(settings, device), settings.compile), _oracle(task)
        rows, ready = {}, {}
        for name, function in functions.items():
            row = rows[name] = result_row(
                _TIMES, loss=loss, rows=n, columns=columns, contender=name, skipped=_too_much(
                    name, loss, n, columns, settings, before.get(name)
                ),
            )  # fmt: skip
            if row["skipped"]:
                continue
            try:
                ready[name] = _step(function, task.leaves)
                ready[name]()
                if n * columns <= _CHECKED:
                    row.update(_only(errors(loss, name, function, task, oracle), ("loss_error", "gradient_error")))
            except Exception as error:  # whatever a peer raises: the others are measured all the same
                ready.pop(name, None)
                row["skipped"] = _said(error)
        seconds = interleaved_seconds(ready, rounds=settings.rounds, device=device)
        for name, step in ready.items():
            native.release_workspace()  # so that taking it is counted
            rows[name].update(
                seconds=seconds[name],
                median_seconds=median(seconds[name]),
                of_eager=median_ratio(seconds[name], seconds["eager"]) if "eager" in seconds else None,
                peak_bytes=peak_bytes(step, device),
            )
        before = rows
        yield from rows.values()


def accuracy(loss: str, settings: Settings, device: torch.device) -> Iterator[list[dict[str, Any]]]:
    """Errors of small batches by dtype, temperature and hardness; a list for each dtype and contender."""
    for dtype in ERROR_DTYPES:
        by: dict[str, list[dict[str, Any]]] = {}
        for batch in BATCHES:
            for temperature in TEMPERATURES:
                task = _peers.problem(
                    loss, _ERROR_ROWS, settings.dim, columns=min(settings.queue, _ERROR_QUEUE), device=device,
                    dtype=getattr(torch, dtype), temperature=temperature, easy=batch == "easy",
                )  # fmt: skip
                # compiling takes seconds each time, for the operations of what is compiled
                functions = contenders(task, _backends(settings, device, getattr(torch, dtype)), compiled=False)
                oracle = _oracle(task)
                for name, function in [(ROUNDED, task.exact), *functions.items()]:
                    row = result_row(
                        _ERRORS, loss=loss, dtype=dtype, temperature=temperature, batch=batch, contender=name
                    )  # fmt: skip
                    try:
                        row.update(errors(loss, name, function, task, oracle))
                    except Exception as error:  # a dtype that a peer does not take
                        row["failed"] = _said(error)
                    by.setdefault(name, []).append(row)
        yield from by.values()


def errors(loss: str, contender: str, function: Loss, task: Problem, oracle: Oracle) -> dict[str, float | str | None]:
    """Relative errors of a contender against ``fastcl.reference`` in fp64, on the very same rounded leaves.

    The gradient that comes in is N, as from a GradScaler: else that of a mean over N rows would vanish in fp16. A
    contender that normalises is held to the loss that normalises.
    """
    normalizes = contender in PEERS and loss in PEERS[contender].normalizes
    want, exact = oracle(normalizes)
    if contender == ROUNDED:
        got, grads = want.float(), [g.to(t.dtype) for g, t in zip(exact, task.leaves, strict=True)]
    else:
        got, grads = _value_and_gradients(function, task.leaves)
    of_grads = [relative_error(g, e) for g, e in zip(grads, exact, strict=True)]
    of_rows = [e for e, t in zip(of_grads, task.leaves, strict=True) if t.ndim]
    of_numbers = [e for e, t in zip(of_grads, task.leaves, strict=True) if not t.ndim]
    found = {
        "loss_error": relative_error(got, want),
        "gradient_error": max(of_rows, key=nan_last, default=None),
        "number_error": max(of_numbers, key=nan_last, default=None),
    }  # fmt: skip
    wild = [name for name, error in found.items() if error is not None and not math.isfinite(error)]
    return {
        **{name: None if name in wild else error for name, error in found.items()},
        "failed": f"not finite: {', '.join(wild)}" if wild else None,
    }


def _oracle(task: Problem) -> Oracle:
    """Loss and gradients in fp64, of the loss that normalises or does not; each is computed once."""

    def exact(normalizes: bool) -> tuple[Tensor, list[Tensor]]:
        doubles = [t.detach().double().requires_grad_() for t in task.leaves]
        return _value_and_gradients(partial(task.exact, normalize=normalizes), doubles)

    return cache(exact)


def within(loss: str, settings: Settings, device: torch.device) -> Iterator[dict[str, Any]]:
    """The largest batch of every contender within the budget; fastcl keeps nothing for its backward there."""
    assert settings.memory_mb is not None
    budget = int(settings.memory_mb * 1e6)
    small = _problem(loss, _FIRST, settings, device)
    for name in contenders(small, _backends(settings, device), compiled=False):

        def probe(n: int, name: str = name) -> tuple[int, float]:
            task = _problem(loss, n, settings, device)
            step = _step(contenders(task, _backends(settings, device), compiled=False)[name], task.leaves)
            keeping: AbstractContextManager[None] = nothing_kept() if name.startswith(_OURS) else nullcontext()
            with keeping:
                start = time.perf_counter()
                peak = peak_bytes(step, device)
                return peak, time.perf_counter() - start

        yield {"loss": loss, "contender": name, **largest_batch(probe, budget, settings.call_seconds)}


def largest_batch(probe: Callable[[int], tuple[int, float]], budget: int, call_seconds: float) -> dict[str, Any]:
    """The largest even N whose peak stays within a budget, by doubling and then bisecting, to one part in 32.

    Args:
        probe: takes N, returns peak bytes and seconds; it is called with up to twice the N that fits.
        budget: in bytes.
        call_seconds: no call is made that would take longer, as far as the one before tells, time being quadratic.

    Returns:
        ``rows`` and ``peak_bytes`` (``None`` where not even the smallest fits), ``limited_by``: ``"memory"``;
        ``"time"`` or ``"size"`` where more would fit; or what was raised.
    """
    fits: dict[str, Any] = {"rows": None, "peak_bytes": None}
    low, high = 0, 0
    n = _FIRST
    while not high or high - low > max(2, low // _PRECISION):
        try:
            peak, seconds = probe(n)
        except (MemoryError, torch.cuda.OutOfMemoryError):
            peak, seconds = budget + 1, 0.0
        except Exception as error:  # whatever a peer raises at a size it does not take
            return {**fits, "limited_by": _said(error)}
        if peak > budget:
            high = n
            if n == _FIRST:
                break
        else:
            low, fits = n, {"rows": n, "peak_bytes": peak}
        if not high:
            if 4 * seconds > call_seconds:
                return {**fits, "limited_by": "time"}
            if 2 * n > _LAST:
                return {**fits, "limited_by": "size"}
        n = (low + high) // 4 * 2 if high else 2 * n
    return {**fits, "limited_by": "memory"}


def plot(result: dict[str, Any], folder: str) -> None:
    """Write ``LOSS.png`` (time and memory over N) and ``LOSS-errors-DTYPE.png`` (over the temperature) into a folder.

    Raises:
        RuntimeError: matplotlib is not installed.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    settings = result["settings"]
    title = f"D = {settings['dim']}, {settings['dtype']}, {where(result['machine'])}"
    for loss in settings["peers"]:
        rows = [row for row in result["rows"] if row["loss"] == loss]
        errors = [row for row in result["errors"] if row["loss"] == loss]
        looks = looks_of(row["contender"] for row in (*rows, *errors))
        looks[ROUNDED] = {"color": "black", "linestyle": ":"}
        figure = time_and_memory(rows, f"{loss}, {title}", looks)
        figure.savefig(Path(folder, f"{loss}.png"), format="png", dpi=120)
        for dtype in ERROR_DTYPES:
            chosen = [row for row in errors if row["dtype"] == dtype]
            figure = _errors_figure(chosen, f"{loss}, {dtype} rows, against fp64", looks)
            figure.savefig(Path(folder, f"{loss}-errors-{dtype}.png"), format="png", dpi=120)


def _errors_figure(rows: list[dict[str, Any]], title: str, looks: dict[str, dict[str, str]]) -> Any:
    figure = need_matplotlib().Figure(figsize=(10, 7), layout="constrained")
    panels = figure.subplots(2, 2, sharex=True, sharey="row")
    for line, (key, label) in zip(panels, (("loss_error", "loss"), ("gradient_error", "gradient")), strict=True):
        scale = "log" if any(row[key] for row in rows) else "linear"
        for axes, batch in zip(line, BATCHES, strict=True):
            for name in dict.fromkeys(row["contender"] for row in rows):
                of = [row for row in rows if (row["contender"], row["batch"]) == (name, batch) and row[key]]
                x, y = [r["temperature"] for r in of], [min(r[key], _DRAWN) for r in of]
                axes.plot(x, y, marker="" if name == ROUNDED else "o", label=name, markersize=4, **looks[name])
            axes.set(title=f"{batch} batch", xscale="log", yscale=scale)
            axes.set_xticks(TEMPERATURES, [f"{tau:g}" for tau in TEMPERATURES])
            axes.xaxis.set_minor_formatter("")
            axes.grid(alpha=0.3)
        line[0].set(ylabel=f"relative error of the {label}")
    for axes in panels[1]:
        axes.set(xlabel="temperature")
    legend(figure, panels[0][0])
    figure.suptitle(f"{title}; {_DRAWN:g} stands for more, and what is exact or not finite is not drawn")
    return figure


def _problem(loss: str, n: int, settings: Settings, device: torch.device) -> Problem:
    return _peers.problem(
        loss, n, settings.dim, columns=settings.queue, device=device, dtype=getattr(torch, settings.dtype)
    )


def _backends(settings: Settings, device: torch.device, dtype: torch.dtype | None = None) -> list[str]:
    """Those asked for, or all that take such rows; not Triton's interpreter, whose speed says nothing."""
    rows = torch.ones(2, settings.dim, device=device, dtype=dtype or getattr(torch, settings.dtype))
    able = [name for name in available_backends(rows) if not (name == "triton" and device.type == "cpu")]
    return list(settings.backends) or able


def _by(backend: str, function: Loss) -> Loss:
    def loss(*leaves: Tensor) -> Tensor:
        with use_backend(backend):
            return function(*leaves)  # its backward is bound to the backend too

    return loss


def _step(function: Loss, leaves: list[Tensor]) -> Step:
    return lambda: torch.autograd.grad(function(*leaves), leaves, allow_unused=True)


def _too_much(
    name: str, loss: str, n: int, columns: int, settings: Settings, before: dict[str, Any] | None
) -> str | None:
    """Why a contender is not run at N rows: what it took at the size before, or what matrices of logits take."""
    power = 3 if name in PEERS and loss in PEERS[name].cubic else 2
    if before is None:
        if name.startswith(_OURS):
            return None
        numbers = n * columns * (n if power == 3 else 1)
        peak = _MATRICES * numbers * getattr(torch, settings.dtype).itemsize
        return beyond(peak, 0.0, settings.dense_limit_gb, settings.call_seconds)
    if before["skipped"]:
        return str(before["skipped"])
    factor = (n / before["rows"]) ** (power if loss != "moco" else 1)
    peak, seconds = before["peak_bytes"] * factor, before["median_seconds"] * factor
    return beyond(peak, seconds, settings.dense_limit_gb, settings.call_seconds)


def _value_and_gradients(function: Loss, leaves: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    loss = function(*leaves)
    grads = torch.autograd.grad(loss, leaves, torch.full_like(loss, len(leaves[0])), allow_unused=True)
    return loss.detach(), [torch.zeros_like(t) if g is None else g for t, g in zip(leaves, grads, strict=True)]


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


_TIMES = ("seconds", "median_seconds", "of_eager", "peak_bytes", "loss_error", "gradient_error", "skipped")
_ERRORS = ("loss_error", "gradient_error", "number_error", "failed")


def _only(values: dict[str, Any], keys: tuple[str, ...]) -> dict[str, Any]:
    return {key: values[key] for key in keys}


_TIMES_HEAD = (
    f"{'N':>8}  {'contender':<34}  {'median ms':>10}  {'of eager':>8}  {'peak MB':>9}"
    f"  {'loss error':>10}  {'gradient error':>14}"
)


def _times_line(row: dict[str, Any]) -> str:
    start = f"{row['rows']:>8}  {row['contender']:<34}"
    if row["skipped"]:
        return f"{start}  skipped: {row['skipped']}"
    ratio = "" if row["of_eager"] is None else f"{row['of_eager']:.2f} x"
    far = (_shown(row[key]) for key in ("loss_error", "gradient_error"))
    return (
        f"{start}  {row['median_seconds'] * 1e3:>10.2f}  {ratio:>8}  {row['peak_bytes'] / 1e6:>9.2f}"
        f"  {next(far):>10}  {next(far):>14}"
    )


def _errors_head() -> str:
    cells = "".join(f"{batch + f' {tau:g}':>10}" for batch in BATCHES for tau in TEMPERATURES)
    return f"{'relative error of':<9}  {'rows':<8}  {'contender':<24}{cells}"


def _errors_line(rows: list[dict[str, Any]]) -> str:
    """Two lines: of the loss and of the gradient, over batches and temperatures."""
    lines = []
    for key, what in (("loss_error", "loss"), ("gradient_error", "gradient")):
        cells = "".join(f"{_shown(row[key], row['failed']):>10}" for row in rows)
        lines.append(f"{what:<17}  {rows[0]['dtype']:<8}  {rows[0]['contender']:<24}{cells}")
    failed = list(dict.fromkeys(row["failed"] for row in rows if row["failed"]))
    return "\n".join([*lines, *(f"    {reason}" for reason in failed)])


def _largest_line(row: dict[str, Any]) -> str:
    more = "" if row["limited_by"] == "memory" else f"  (ended by {row['limited_by']})"
    found = "none" if row["rows"] is None else f"{row['rows']:,}"
    return f"{row['contender']:<34}  {found:>13}{more}"


def _shown(error: float | None, failed: str | None = None) -> str:
    return ("failed" if failed else "") if error is None else f"{error:.1e}"


def _checked(settings: Settings) -> tuple[Settings, torch.device]:
    for loss in settings.peers:
        choice("loss after --peers", loss, LOSSES)
    for backend in settings.backends:
        choice("backend", backend, NAMES)
    choice("dtype", settings.dtype, DTYPES)
    at_least_one(settings, "dim", "rounds", "threads", "queue")
    check_rows(settings.rows, 2 if "nt_xent" in settings.peers else 1)
    for name in ("memory_mb", "call_seconds"):
        value = getattr(settings, name)
        if value is not None and not value > 0:
            raise ValueError(sentence(f"{name} = {value:g}", "more than 0", "Choose a larger number."))
    device = device_named(settings.device)
    return replace(settings, device=device.type), device
