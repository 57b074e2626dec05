"""Every drop-in beside the class or function that it stands in for: one problem, two contenders.

The tests draw small problems and compare values and gradients; ``python -m benchmarks.dropins`` measures large ones.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

LIBRARIES = {  # name in fastcl.integrations: distribution, or the repository where there is none
    "lightly": "lightly",
    "open_clip": "open_clip_torch",
    "pytorch_metric_learning": "pytorch-metric-learning",
    "sentence_transformers": "sentence-transformers",
    "solo_learn": "solo-learn",
    "sup_contrast": "HobbitLong/SupContrast",
    "grad_cache": "luyug/GradCache",
    "inf_cl": "DAMO-NLP-SG/Inf-CLIP",
}


@dataclass(frozen=True)
class Problem:
    """Leaves, and the loss as a function of them: ours and the original's."""

    leaves: list[Tensor]
    ours: Callable[..., Tensor]
    theirs: Callable[..., Tensor]


@dataclass(frozen=True)
class Case:
    """One way to use one drop-in.

    Attributes:
        library: its module in ``fastcl.integrations``.
        label: the class, and what is special.
        build: makes a problem of what is drawn.
        fused: the original stores a matrix, so ours must be faster from 2,048 rows on and grow by O(N D).
        largest: rows that the original survives here; more are not tried.
        tolerance: relative, fp32, of the loss and every gradient; more than rounding only where the original is coarse.
    """

    library: str
    label: str
    build: Callable[[Draw], Problem]
    fused: bool = True
    largest: int = 10**9
    tolerance: float = 1e-5


class Draw:
    """A seeded source of problems of ``n`` rows and ``d`` features.

    Attributes:
        usual: hyperparameters are the library's defaults, as a benchmark wants them, and not random.
    """

    def __init__(self, n: int, d: int, *, seed: int = 0, usual: bool = False) -> None:
        self.n, self.d, self.usual = n, d, usual
        self.generator = torch.Generator().manual_seed(seed)

    def rows(self, n: int | None = None, d: int | None = None) -> Tensor:
        """``(n, d)`` normal rows, of length about the square root of d; a leaf."""
        shape = (self.n if n is None else n, self.d if d is None else d)
        return torch.randn(shape, generator=self.generator).requires_grad_()

    def units(self, n: int | None = None, d: int | None = None) -> Tensor:
        """``(n, d)`` rows of length 1; a leaf."""
        return torch.nn.functional.normalize(self.rows(n, d).detach(), dim=1).requires_grad_()

    def labels(self, n: int | None = None, *, each: int = 8) -> Tensor:
        """``(n,)`` integers; a class has about ``each`` rows, by chance fewer or more, or one alone."""
        n = self.n if n is None else n
        return torch.randint(max(n // each, 2), (n,), generator=self.generator)

    def between(self, low: float, high: float, usual: float) -> float:
        return usual if self.usual else low + (high - low) * torch.rand((), generator=self.generator).item()

    def choice(self, *options: Any, usual: Any) -> Any:
        return usual if self.usual else options[int(torch.randint(len(options), (), generator=self.generator))]


def cases() -> list[Case]:
    """All, library by library. None imports its library before it builds a problem."""
    return [case for name in LIBRARIES for case in import_module(f"{__name__}.{name}").CASES]


def missing(library: str) -> str:
    """Why the original cannot be imported here, or nothing."""
    try:
        original(library)
    except ImportError as error:
        return f"{LIBRARIES[library]}: {error}"
    return ""


def original(library: str) -> Any:
    """The module with the original losses.

    Those without a distribution are looked for in ``$FASTCL_UPSTREAM``, a folder with clones of their repositories.

    Raises:
        ImportError: it is not here, or cannot run here.
    """
    if library == "solo_learn":
        return import_module(f"{__name__}.solo_learn").originals()
    if library == "inf_cl" and not torch.cuda.is_available():
        raise ImportError("its kernels assert CUDA tensors, and Triton's interpreter refuses their inline assembly")
    module, inside = {
        "lightly": ("lightly.loss", ""),
        "open_clip": ("open_clip.loss", ""),
        "pytorch_metric_learning": ("pytorch_metric_learning.losses", ""),
        "sentence_transformers": ("sentence_transformers.sentence_transformer.losses", ""),
        "sup_contrast": ("losses", "SupContrast"),
        "grad_cache": ("grad_cache.loss", "GradCache/src"),
        "inf_cl": ("inf_cl", "Inf-CLIP"),
    }[library]
    path = clone(inside)
    if inside and path and path not in sys.path:
        sys.path.append(path)
    return import_module(module)


def clone(inside: str) -> str:
    """A path inside ``$FASTCL_UPSTREAM``, or nothing where that is not set."""
    folder = os.environ.get("FASTCL_UPSTREAM", "")
    return folder and os.path.join(folder, inside)


def upstream_version(library: str) -> str:
    try:
        return version(LIBRARIES[library])
    except PackageNotFoundError:
        return "not a distribution"


def backward(step: Callable[..., Tensor], leaves: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Loss and gradients (zeros where there is none)."""
    loss = step(*leaves)
    grads = torch.autograd.grad(loss, leaves, allow_unused=True)
    return loss.detach(), [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, grads, strict=True)]
