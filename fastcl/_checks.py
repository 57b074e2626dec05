"""Bad input is refused in one sentence: what came, what was expected, how to mend it.

Only shapes, dtypes, devices and Python numbers are looked at; a value on a device is never read.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

ROW_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
REDUCTIONS = ("mean", "sum", "none")
DISTANCES = ("euclidean", "squared", "cosine")
FORMS = ("out", "in")  # of SupCon
MARGIN_STRATEGIES = ("absolute", "relative")  # of GISTEmbed
Scalar = float | Tensor


def sentence(got: str, expected: str, mend: str) -> str:
    return f"got {got}; expected {expected}. {mend}"


def tensor(name: str, value: object, kind: str) -> None:
    """A dense tensor; ``kind`` says of what."""
    if not isinstance(value, Tensor):
        raise TypeError(
            sentence(f"{name} of type {type(value).__name__}", f"a torch.Tensor {kind}", "Convert it first.")
        )
    if value.layout != torch.strided:
        raise TypeError(sentence(f"{name} of layout {value.layout}", "a dense tensor", f"Call {name}.to_dense()."))


def rows(**tensors: Tensor) -> None:
    """Every tensor is a strided 2-D floating-point matrix; all have one width and one device."""
    for name, t in tensors.items():
        tensor(name, t, "(rows, features)")
        if t.dtype not in ROW_DTYPES:
            raise TypeError(
                sentence(
                    f"{name} of dtype {t.dtype}",
                    "float16, bfloat16, float32 or float64",
                    f"Call {name}.float(); complex and integer embeddings have no inner product here.",
                )
            )
        if t.ndim != 2:
            raise ValueError(
                sentence(
                    f"{name} of shape {tuple(t.shape)}",
                    "two dimensions (rows, features)",
                    f"Use {name}.flatten(0, -2) to make every leading index a row.",
                )
            )
    (first, a), *others = tensors.items()
    for name, b in others:
        if a.shape[1] != b.shape[1]:
            raise ValueError(
                sentence(
                    f"{first} of shape {tuple(a.shape)} and {name} of shape {tuple(b.shape)}",
                    "the same number of features",
                    "Project both to one dimension.",
                )
            )
        if a.device != b.device:
            raise ValueError(
                sentence(
                    f"{first} on {a.device} and {name} on {b.device}", "one device", f"Call {name}.to({first}.device)."
                )
            )


def same_rows(**tensors: Tensor) -> None:
    """Like :func:`rows`, and row ``i`` of one belongs to row ``i`` of the others."""
    rows(**tensors)
    (first, a), *others = tensors.items()
    for name, b in others:
        if a.shape != b.shape:
            raise ValueError(
                sentence(
                    f"{first} of shape {tuple(a.shape)} and {name} of shape {tuple(b.shape)}",
                    "equal shapes: row i of one is the positive of row i of the other",
                    "Check that both come from the same batch.",
                )
            )


def stacked(z: Tensor, views: int = 2) -> None:
    """``z`` holds several views of each image: a multiple of so many rows."""
    rows(z=z)
    count("views", views, least=2, mend="Make two views of every image.")
    if z.shape[0] % views:
        raise ValueError(
            sentence(
                f"z of shape {tuple(z.shape)}",
                f"{'an even number' if views == 2 else f'a multiple of {views}'} of rows: view 0 of every image, then "
                "view 1 of every image",
                "Stack the views with torch.cat([view0, view1]).",
            )
        )


def labelled(z: Tensor, labels: Tensor) -> None:
    """Rows and one integer label for each."""
    rows(z=z)
    vector("labels", labels, z.shape[0], z, integer=True)


def elements(name: str, t: Tensor, *, integer: bool = False) -> None:
    """``t`` is a tensor of integers, or of floating-point numbers."""
    kind = "integers" if integer else "floating-point numbers"
    tensor(name, t, f"of {kind}")
    is_integer = not (t.dtype.is_floating_point or t.dtype.is_complex or t.dtype == torch.bool)
    if not (is_integer if integer else t.dtype.is_floating_point):
        raise TypeError(
            sentence(f"{name} of dtype {t.dtype}", kind, f"Call .{'long' if integer else 'float'}() on it.")
        )


def vector(name: str, t: Tensor, length: int, like: Tensor, *, integer: bool = False) -> None:
    """``t`` is one number per row: ``(length,)``, on the device of ``like``, integer or floating as asked."""
    elements(name, t, integer=integer)
    if t.shape != (length,):
        raise ValueError(
            sentence(f"{name} of shape {tuple(t.shape)}", f"shape ({length},): one per row", "Match it to the rows.")
        )
    _beside(name, t, like)


def matrix(name: str, t: Tensor, length: int, like: Tensor) -> None:
    """``t`` is a row of integers per row: ``(length, any)``, on the device of ``like``."""
    elements(name, t, integer=True)
    if t.ndim != 2 or t.shape[0] != length:
        got, expected = f"{name} of shape {tuple(t.shape)}", f"shape ({length}, any): a row of integers per row"
        raise ValueError(sentence(got, expected, "Match it to the rows."))
    _beside(name, t, like)


def _beside(name: str, t: Tensor, like: Tensor) -> None:
    if t.device != like.device:
        raise ValueError(
            sentence(f"{name} on {t.device}", f"the device of the rows, {like.device}", "Call .to(...) on it.")
        )


def scalar(name: str, value: Scalar, *, positive: bool = False) -> None:
    """A finite number, or a 0-d floating-point tensor, whose value is not read."""
    if isinstance(value, Tensor):
        if value.ndim != 0:
            raise ValueError(
                sentence(f"{name} of shape {tuple(value.shape)}", "a number or a 0-d tensor", f"Use {name}.squeeze().")
            )
        if not value.dtype.is_floating_point:
            raise TypeError(sentence(f"{name} of dtype {value.dtype}", "a floating-point tensor", "Call .float()."))
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(
            sentence(f"{name} of type {type(value).__name__}", "a number or a 0-d tensor", "Call float() on it.")
        )
    if not -math.inf < value < math.inf or (positive and value <= 0):  # a NaN compares false
        what = "a finite number above 0" if positive else "a finite number"
        mend = "Choose one; 0.05 to 0.5 are usual." if name.endswith("temperature") else "Check how it was computed."
        raise ValueError(sentence(f"{name} = {value}", what, mend))


def number(name: str, value: float, *, low: float = -math.inf, high: float = math.inf) -> None:
    """A Python number within [low, high]."""
    scalar(name, value)
    if isinstance(value, Tensor) or not low <= value <= high:
        got = f"{name} as a tensor" if isinstance(value, Tensor) else f"{name} = {value}"
        raise ValueError(sentence(got, f"a number from {low} to {high}", "Pass a plain float in this range."))


def count(name: str, value: int, *, least: int = 1, most: int | None = None, mend: str = "Pass 1 or more.") -> None:
    """A Python integer within [least, most]."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least or (most is not None and value > most):
        expected = f"an integer of at least {least}" if most is None else f"an integer from {least} to {most}"
        raise ValueError(sentence(f"{name} = {value!r}", expected, mend))


def flag(**values: bool) -> None:
    """Every value is true or false, or 1 or 0: what is merely not empty is a mistake."""
    for name, value in values.items():
        if not isinstance(value, int) or value not in (0, 1):
            got = f"{name} = {value!r}" if isinstance(value, int) else f"{name} of type {type(value).__name__}"
            raise TypeError(sentence(got, "True or False", "Pass one of the two."))


def function(name: str, value: object) -> None:
    """Something that can be called, such as a module."""
    if not callable(value):
        got = f"{name} of type {type(value).__name__}"
        raise TypeError(sentence(got, "a module or a function", "Pass what is to be called."))


def choice(name: str, value: str, options: tuple[str, ...]) -> None:
    if value not in options:
        raise ValueError(sentence(f"{name} = {value!r}", f"one of {', '.join(map(repr, options))}", "Choose one."))
