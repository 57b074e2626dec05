"""``fastcl bench``: time and peak memory of a loss, forward and backward, dense against fastcl, over batch sizes."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import cycle
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from . import functional, reference
from ._checks import choice, sentence
from ._info import cpu_model, provenance
from ._measure import interleaved_seconds, median_ratio, peak_bytes
from .backends import NAMES, available_backends, native, use_backend, why_not
from .testing import CASES, LossCase

# The contenders that store the matrix, and how many of its size live at once, rounded up.
DENSE = {"dense": 6, "cross-entropy": 5}
LOSSES: dict[str, LossCase] = {}
for _case in CASES:
    LOSSES.setdefault(_case.name, _case)  # of several rows with one name, the first
DTYPES = ("float32", "float16", "bfloat16", "float64")


@dataclass(frozen=True)
class Settings:
    """What is measured; the fields are the flags of ``fastcl bench``."""

    loss: str = "nt_xent"
    rows: tuple[int, ...] = (512, 1024, 2048, 4096, 8192, 16384)
    dim: int = 128
    dtype: str = "float32"
    device: str = "auto"
    rounds: int = 7
    threads: int | None = None
    dense_limit_gb: float = 8.0


def run(settings: Settings, progress: Callable[[str], None] = print) -> dict[str, Any]:
    """Measure, one batch size after the other.

    Contenders take turns in every round, after one warm-up call. *dense* is ``fastcl.reference``; *cross-entropy* is
    the same loss as people usually write it, where it has such a form; the others are fastcl's backends. A temperature
    is a number; scale and bias receive gradients, as in CLIP and SigLIP.

    Args:
        progress: receives the lines of the table as they are measured.

    Returns:
        Plain values for ``json.dumps``: ``command``, ``date``, ``commit``, ``versions``, ``machine``, ``settings``,
        and ``rows``, each with ``rows`` (N), ``contender``, ``seconds`` (one per round), ``median_seconds``,
        ``peak_bytes``; for fastcl's backends ``times_faster`` (median over rounds) and ``times_less_memory``, each
        against the better of the dense contenders; ``skipped``, a reason. ``None`` where nothing was measured.

    Raises:
        ValueError: a setting out of range, or a device that is not there.
    """
    settings, device = _checked(settings)
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    machine = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_model(),
        "threads": torch.get_num_threads(),
    }
    progress(
        f"{settings.loss}, forward + backward, D = {settings.dim}, {settings.dtype} on {device}: {where(machine)}, "
        f"{settings.rounds} rounds"
    )
    progress(_HEAD)
    rows = []
    for n in settings.rows:
        for row in _measure(settings, device, n):
            progress(_line(row))
            rows.append(row)
    return {**about(settings, machine), "rows": rows}


def contenders(
    case: LossCase, batch: int, dim: int, dtype: torch.dtype, device: torch.device
) -> dict[str, Callable[[], object]]:
    """Forward and backward of a loss by contender, dense ones first, then every backend that can, on the same inputs.

    Triton's interpreter is left out: its speed says nothing.
    """
    args, tensors = case.inputs(batch, dim, dtype=dtype, device=device)
    kwargs: dict[str, Any] = {**tensors}
    if "temperature" in kwargs:
        kwargs["temperature"] = case.numbers["temperature"]
    wanted = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor) and t.requires_grad]

    def step(function: Callable[..., Tensor], backend: str = "auto") -> Callable[[], object]:
        def run() -> object:
            with use_backend(backend):
                return torch.autograd.grad(function(*args, **kwargs), wanted)

        return run

    steps = {"dense": step(getattr(reference, case.name))}
    if case is LOSSES[case.name] and case.name in USUAL:
        steps["cross-entropy"] = step(USUAL[case.name])
    for backend in available_backends(args[0]):
        guideless = case.guided and why_not(backend, "guided", args[0])
        if not guideless and not (backend == "triton" and device.type == "cpu"):
            steps[backend] = step(getattr(functional, case.name), backend)
    return steps


@contextmanager
def nothing_kept() -> Iterator[None]:
    """The native kernels without their cache. FASTCL_WORKSPACE_MB=0 would also shrink the tiles of ``chunked``."""
    native.release_workspace()
    budget, native._WORKSPACE = native._WORKSPACE, 0
    try:
        yield
    finally:
        native._WORKSPACE = budget


def plot(result: dict[str, Any], file: str) -> None:
    """Write time and peak memory over N, both axes logarithmic, as a PNG.

    Raises:
        RuntimeError: matplotlib is not installed.
    """
    settings, machine = result["settings"], result["machine"]
    title = f"{settings['loss']}, D = {settings['dim']}, {settings['dtype']}, {where(machine)}"
    looks = looks_of(row["contender"] for row in result["rows"])
    time_and_memory(result["rows"], title, looks).savefig(file, format="png", dpi=120)


def looks_of(contenders: Iterable[str]) -> dict[str, dict[str, str]]:
    """Colour and line of each contender: backends of fastcl look the same in every picture, others are dashed."""
    ours = dict(zip(NAMES, ("tab:green", "tab:red", "tab:purple"), strict=True))
    others = cycle(("tab:blue", "tab:orange", "tab:brown", "tab:pink", "tab:gray", "tab:olive", "tab:cyan"))
    looks = {}
    for name in dict.fromkeys(contenders):
        color = ours.get(name.removeprefix("fastcl "))
        looks[name] = {"color": color or next(others), "linestyle": "-" if color else "--"}
    return looks


def time_and_memory(rows: list[dict[str, Any]], title: str, looks: dict[str, dict[str, str]]) -> Any:
    """A figure of two panels, a line per contender. Raises as ``plot`` does."""
    figure = need_matplotlib().Figure(figsize=(10, 5), layout="constrained")
    panels = (("median_seconds", 1e3, "ms, forward + backward"), ("peak_bytes", 1e-6, "peak memory, MB"))
    for axes, (key, unit, label) in zip(figure.subplots(1, 2), panels, strict=True):
        for name in dict.fromkeys(row["contender"] for row in rows):
            measured = [row for row in rows if row["contender"] == name and row[key] is not None]
            x, y = [row["rows"] for row in measured], [row[key] * unit for row in measured]
            axes.plot(x, y, marker="o", label=name, markersize=4, **looks[name])
        sizes = sorted({row["rows"] for row in rows})
        axes.set(xlabel="rows N", ylabel=label, yscale="log")
        axes.set_xscale("log", base=2)
        axes.set_xticks(sizes, [f"{n:,}" for n in sizes], fontsize="small")
        axes.yaxis.set_major_formatter("{x:,g}")
        axes.grid(alpha=0.3)
    legend(figure, axes)
    figure.suptitle(title)
    return figure


def about(settings: Any, machine: dict[str, Any]) -> dict[str, Any]:
    """What every result says beside its figures: how to measure the same again, when and on what it was measured."""
    return {**provenance(command(settings)), "machine": machine, "settings": asdict(settings)}


def result_row(keys: Iterable[str], **known: Any) -> dict[str, Any]:
    """A row of a result, of which every one has the same keys: ``None`` where nothing was measured."""
    return {**dict.fromkeys(keys), **known}


def legend(figure: Any, axes: Any) -> None:
    """Below all panels; lines long enough to see which are dashed."""
    names = axes.get_legend_handles_labels()
    figure.legend(*names, loc="outside lower center", ncols=5, fontsize="small", handlelength=3.5)


def where(machine: dict[str, Any]) -> str:
    """The machine of a result, for a title."""
    threads = machine["threads"]
    return f"{machine['device']}, {threads} CPU thread{'s' * (threads != 1)}"


def need_matplotlib() -> Any:
    """The module ``matplotlib.figure``, or a RuntimeError that says how to get it."""
    try:
        return importlib.import_module("matplotlib.figure")
    except ImportError as error:
        raise RuntimeError(
            sentence(
                "--plot or --plots without matplotlib", "matplotlib to be installed", 'Run: pip install "fastcl[bench]"'
            )
        ) from error


def _nt_xent(z: Tensor, *, temperature: float) -> Tensor:
    s = z @ z.T / temperature
    s.fill_diagonal_(-torch.inf)
    return cross_entropy(s, torch.arange(len(z), device=z.device).roll(len(z) // 2))


def _info_nce(q: Tensor, k: Tensor, *, temperature: float) -> Tensor:
    return cross_entropy(q @ k.T / temperature, torch.arange(len(q), device=q.device))


def _clip(image: Tensor, text: Tensor, *, scale: Tensor) -> Tensor:
    s = scale * image @ text.T
    target = torch.arange(len(s), device=s.device)
    return (cross_entropy(s, target) + cross_entropy(s.T, target)) / 2


# The dense loss as people write it: faster and smaller than fastcl.reference, which is written to be exact.
USUAL: dict[str, Callable[..., Tensor]] = {"nt_xent": _nt_xent, "info_nce": _info_nce, "clip": _clip}


def _measure(settings: Settings, device: torch.device, n: int) -> Iterator[dict[str, Any]]:
    case, dtype = LOSSES[settings.loss], getattr(torch, settings.dtype)
    batch = n // case.rows(1)[0]
    steps = contenders(case, batch, settings.dim, dtype, device)
    matrix_gb = case.stored(n, case.rows(batch)[-1], settings.dim) * dtype.itemsize / 1e9
    for name, matrices in DENSE.items():
        if name in steps and matrices * matrix_gb > settings.dense_limit_gb:
            reason = f"would need about {matrices * matrix_gb:.2g} GB, --dense-limit-gb is {settings.dense_limit_gb:g}"
            yield result_row(_KEYS, rows=n, contender=name, skipped=reason)
            del steps[name]
    dense = [name for name in steps if name in DENSE]

    seconds = interleaved_seconds(steps, rounds=settings.rounds, device=device)
    native.release_workspace()  # so that taking it is counted
    memory = {name: peak_bytes(step, device) for name, step in steps.items()}
    fastest = min(dense, key=lambda name: median(seconds[name]), default=None)
    for name in steps:
        row = result_row(
            _KEYS, rows=n, contender=name,
            seconds=seconds[name], median_seconds=median(seconds[name]), peak_bytes=memory[name],
        )  # fmt: skip
        if fastest is not None and name not in dense:
            row["times_faster"] = median_ratio(seconds[fastest], seconds[name])
            row["times_less_memory"] = min(memory[d] for d in dense) / memory[name]
        yield row


_KEYS = (
    "rows", "contender", "seconds", "median_seconds", "peak_bytes", "times_faster", "times_less_memory", "skipped"
)  # fmt: skip
_HEAD = (
    f"{'N':>8}  {'contender':<13}  {'median ms':>10}  {'min - max ms':>21}  {'peak MB':>9}"
    f"  {'times faster':>12}  {'times less memory':>17}"
)


def _line(row: dict[str, Any]) -> str:
    start = f"{row['rows']:>8}  {row['contender']:<13}"
    if row["skipped"]:
        return f"{start}  skipped: {row['skipped']}"
    span = f"{min(row['seconds']) * 1e3:.2f} - {max(row['seconds']) * 1e3:.2f}"
    faster, less = ("" if r is None else f"{r:.2f}" for r in (row["times_faster"], row["times_less_memory"]))
    return (
        f"{start}  {row['median_seconds'] * 1e3:>10.2f}  {span:>21}  {row['peak_bytes'] / 1e6:>9.2f}"
        f"  {faster:>12}  {less:>17}".rstrip()
    )


def _checked(settings: Settings) -> tuple[Settings, torch.device]:
    choice("loss", settings.loss, tuple(LOSSES))
    choice("dtype", settings.dtype, DTYPES)
    at_least_one(settings, "dim", "rounds", "threads")
    check_rows(settings.rows, LOSSES[settings.loss].rows(1)[0])
    device = device_named(settings.device)
    return replace(settings, device=device.type), device


def at_least_one(settings: Any, *names: str) -> None:
    """Each of these numbers is 1 or more, or ``None``."""
    for name in names:
        value = getattr(settings, name)
        if value is not None and value < 1:
            raise ValueError(sentence(f"{name} = {value}", "1 or more", "Choose a larger number."))


def check_rows(rows: Iterable[int], views: int) -> None:
    """Every number of rows is at least 2, and a multiple of so many views."""
    for n in rows:
        if n < 2 or n % views:
            expected = "an even number of rows, at least 2" if views == 2 else "2 rows or more"
            raise ValueError(sentence(f"rows = {n}", expected, "Choose another batch size."))


def device_named(name: str) -> torch.device:
    """The device of ``--device``, which is there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    choice("device", name, ("cpu", "cuda"))
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError(sentence("device = cuda", "a CUDA device that torch can see", "Use --device cpu here."))
    return torch.device(name)


def command(settings: Any) -> str:
    """The words that measure the same again: a field is a flag."""
    words = ["fastcl bench"]
    for name, value in asdict(settings).items():
        flag = f"--{name.replace('_', '-')}"
        if value is True or value is None or value == ():
            continue
        if value is False:
            words.append(flag.replace("--", "--no-", 1))
        else:
            words.append(f"{flag} {','.join(map(str, value)) if isinstance(value, tuple) else value}")
    return " ".join(words)
