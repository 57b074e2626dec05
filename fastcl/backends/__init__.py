"""Which kernels run, and why not others: the contract of a backend and the one dispatch table.

A backend is a module with three kernels over the same :class:`Pairs` (their mathematics stands in ``fastcl._ops``) ::

    unsupported(op, x) -> str | None                  # a reason in words, or None: "I can do this for rows like x"
    reduce(link, pairs, both, keep) -> (row, col)     # keep: grad will follow, and what eases it may be kept
    grad(link, pairs, sides, want_dx, want_dy, want_sums) -> (dx, dy, row_sum, col_sum)
    topk(pairs, topk) -> (values, indices)

and may have more, each of which ``chunked`` or the kernels above replace where it is absent (or returns ``None``) ::

    reduce_grad(link, pairs, want_dx, want_dy, want_sums) -> (row, dx, dy, row_sum) | None     # one pass for two
    normalize(x) -> (unit, length)
    normalize_grad(x, length, grad) -> dx
    contrastive(x, y, scale, dtype, normalize, both, keep) -> (loss, *saved)      # raw rows to losses
    contrastive_grad(x, y, scale, grad, saved, want_x, want_y) -> (dx, dy, dots)

``op`` is one of ``OPS``, or the name of one of these: a module that has one for some rows only says so in
``unsupported``. ``"guided"`` asks for the kernels above over pairs that a second similarity forgets (``guide_x``). To
add a backend, add a file here and its name to ``PREFERENCE``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import lru_cache
from importlib import import_module
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from .. import _settings

# Device type -> backends, best first. One that is not listed is there on request only.
PREFERENCE = {
    "cuda": ("triton", "chunked"),
    "cpu": ("native", "chunked", "triton"),  # triton runs on CPU tensors in its interpreter only: for tests
}
OTHER_DEVICES = ("chunked", "triton")
NAMES = ("native", "chunked", "triton")
OPS = ("reduce", "grad", "topk")


class Pairs(NamedTuple):
    """The implicit matrix: how a logit is formed, and which pairs are kept. It travels as one thing."""

    x: Tensor  # (M, D) rows
    y: Tensor  # (N, D) columns, same dtype
    scale: Tensor  # () fp32, or fp64 for fp64 rows
    row_bias: Tensor | None = None  # (M,)
    col_bias: Tensor | None = None  # (N,)
    drop_x: Tensor | None = None  # (M,) integers: pairs whose drop keys are equal are forgotten
    drop_y: Tensor | None = None  # (N,)
    only_x: Tensor | None = None  # (M,) integers: pairs whose only keys differ are forgotten
    only_y: Tensor | None = None  # (N,)
    row_ceiling: Tensor | None = None  # (M,): pairs whose logit is above it are forgotten
    col_ceiling: Tensor | None = None  # (N,)
    guide_x: Tensor | None = None  # (M, G): pairs with <guide_x, guide_y> above a limit are forgotten
    guide_y: Tensor | None = None  # (N, G)
    row_limit: Tensor | None = None  # (M,)
    col_limit: Tensor | None = None  # (N,)
    symmetric: bool = False  # y is x, s_ij = s_ji and both are kept or forgotten together

    @property
    def vectors(self) -> tuple[Tensor | None, ...]:
        """Biases, keys and ceilings, in their order: what every kernel takes."""
        return self[3:11]

    def swapped(self) -> Pairs:
        """The transposed matrix: columns become rows."""
        return Pairs(
            self.y, self.x, self.scale, self.col_bias, self.row_bias,
            self.drop_y, self.drop_x, self.only_y, self.only_x,
            self.col_ceiling, self.row_ceiling, self.guide_y, self.guide_x, self.col_limit, self.row_limit,
            self.symmetric,
        )  # fmt: skip

    def sliced(self, rows: slice, cols: slice) -> Pairs:
        """Some rows against some columns."""

        def row(t: Tensor | None) -> Tensor | None:
            return None if t is None else t[rows]

        def col(t: Tensor | None) -> Tensor | None:
            return None if t is None else t[cols]

        return Pairs(
            self.x[rows], self.y[cols], self.scale, row(self.row_bias), col(self.col_bias),
            row(self.drop_x), col(self.drop_y), row(self.only_x), col(self.only_y),
            row(self.row_ceiling), col(self.col_ceiling),
            row(self.guide_x), col(self.guide_y), row(self.row_limit), col(self.col_limit),
        )  # fmt: skip


def unit_pairs(z: Tensor, keys: Tensor, scale: Tensor, one_set: bool) -> Pairs:
    """Every row against the rows of other pairs; of two sets, the first half against the second."""
    if one_set:
        return Pairs(z, z, scale, drop_x=keys, drop_y=keys, symmetric=True)
    half = z.shape[0] // 2
    return Pairs(z[:half], z[half:], scale, drop_x=keys[:half], drop_y=keys[:half])


class Sides(NamedTuple):
    """Upstream gradients of the row and the column results; the exponential link also needs those results."""

    row_lse: Tensor | None = None  # (M,), +inf for a row with no kept pair
    row_grad: Tensor | None = None  # (M,)
    col_lse: Tensor | None = None  # (N,)
    col_grad: Tensor | None = None  # (N,)

    def swapped(self) -> Sides:
        return Sides(self.col_lse, self.col_grad, self.row_lse, self.row_grad)

    def sliced(self, rows: slice, cols: slice) -> Sides:
        return Sides(*(t if t is None else t[part] for t, part in zip(self, (rows, rows, cols, cols), strict=True)))


_NOTHING = nullcontext()

# A plain global: autograd runs backward on threads of its own, which do not inherit a ContextVar. A loss reads it once,
# in forward, and its backward runs on the same backend even if the context has ended.
_forced: str = _settings.backend


def forced() -> str:
    """The backend that ``use_backend`` or ``FASTCL_BACKEND`` asks for, or ``"auto"``."""
    return _forced


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every loss called inside the block, and later its backward, on one backend.

    Args:
        name: ``"native"``, ``"chunked"``, ``"triton"``, or ``"auto"`` for the dispatch table.

    Raises:
        ValueError: no backend has that name.
        RuntimeError: raised by the loss, when the backend cannot do what the loss needs; it says why.

    Example:
        >>> with fastcl.use_backend("chunked"):
        ...     value = loss(view0, view1)
    """
    global _forced
    _check_name(name)
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def select(op: str, x: Tensor, name: str = "auto") -> ModuleType:
    """The named backend, or the first in ``PREFERENCE`` that can do ``op`` on rows like these."""
    _check_name(name)
    for candidate in _order(x) if name == "auto" else (name,):
        reason = why_not(candidate, op, x)
        backend = _load(candidate)
        if reason is None and isinstance(backend, ModuleType):
            return backend
    raise RuntimeError(
        f"fastcl backend {name!r} cannot run pair_{op} on {tuple(x.shape)} {x.dtype} on {x.device}: {reason}. "
        "Use fastcl.use_backend('auto') to let fastcl choose."
    )


def why_not(name: str, op: str, x: Tensor) -> str | None:
    """The reason why a backend cannot do ``op`` on rows like these, or ``None``."""
    backend = _load(name)
    return backend if isinstance(backend, str) else backend.unsupported(op, x)


class Choice(NamedTuple):
    """What dispatch answers: the backend that runs, or the error; and a reason for each of the others."""

    chosen: str | None
    error: str | None
    others: dict[str, str]


def choose(op: str, x: Tensor) -> Choice:
    """Which backend would run ``op`` on rows like these now, and why the others would not."""
    chosen = error = None
    try:
        chosen = select(op, x, _forced).__name__.rpartition(".")[2]
    except (RuntimeError, ValueError) as refusal:  # what is forced cannot, or does not exist
        error = str(refusal)

    def passed_over(name: str) -> str:
        if _forced != "auto":
            return f"{_forced} is forced"
        if name in _order(x):
            return f"{chosen} comes first"
        return f"no GPU has run its kernels yet: fastcl.use_backend({name!r}) asks for them"

    return Choice(chosen, error, {n: why_not(n, op, x) or passed_over(n) for n in NAMES if n != chosen})


def available_backends(x: Tensor | None = None) -> list[str]:
    """Backends that can compute a loss and its gradient on rows like these, best first.

    Args:
        x: ``(M, D)``; fp32 on the CPU when omitted.

    Raises:
        TypeError: not a tensor.
    """
    rows = torch.empty(2, 8) if x is None else x
    if not isinstance(rows, Tensor):
        raise TypeError(
            f"got x of type {type(x).__name__}; expected a torch.Tensor (rows, features). Pass such as a loss is given."
        )
    return [n for n in _order(rows) if all(why_not(n, op, rows) is None for op in ("reduce", "grad"))]


def on_device_of(x: Tensor) -> AbstractContextManager[object]:
    """``torch.cuda.device_of``, which takes microseconds to find that nothing has to change, as nearly always."""
    here = not x.is_cuda or x.get_device() == torch.cuda.current_device()
    return _NOTHING if here else torch.cuda.device_of(x)


def tf32_is_allowed() -> bool:
    """Whether the user lets torch's own fp32 matrix products on CUDA run in TF32; kernels follow."""
    matmul = torch.backends.cuda.matmul
    # Since torch 2.9 there is a new attribute, and once a user sets that the old getter raises: it is read first.
    precision = getattr(matmul, "fp32_precision", None)
    return bool(matmul.allow_tf32 if precision is None else precision == "tf32")


def _order(x: Tensor) -> tuple[str, ...]:
    return PREFERENCE.get(x.device.type, OTHER_DEVICES)


def _check_name(name: str) -> None:
    if name not in (*NAMES, "auto"):
        raise ValueError(
            f"got backend {name!r}; expected one of {', '.join(NAMES)}, auto. "
            "Mend the name given to fastcl.use_backend or FASTCL_BACKEND."
        )


@lru_cache(maxsize=None)
def _load(name: str) -> ModuleType | str:
    """The backend's module, or the reason why it cannot be imported; tried once."""
    try:
        return import_module(f"{__name__}.{name}")
    except ImportError as error:
        return f"{error.name or error} is not installed"
    except Exception as error:  # a broken installation of one backend must not take the others down
        return f"cannot be imported: {type(error).__name__}: {error}"
