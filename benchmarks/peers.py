"""One problem, and everybody who solves it: fastcl, plain torch, and the libraries that are installed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as nn_functional
from torch.nn.functional import cross_entropy, normalize

from fastcl import functional, reference
from fastcl._bench import USUAL

TAU = 0.1
QUEUE = 65536
PACKAGES = ("lightly", "open_clip_torch", "pytorch-metric-learning", "inf_cl")


@dataclass(frozen=True)
class Problem:
    """A loss as a function of its leaves, by contender: ``eager`` is ``fastcl.reference`` or its equal."""

    leaves: list[Tensor]
    ours: Callable[..., Tensor]
    others: dict[str, Callable[..., Tensor]]


def problem(
    loss: str,
    n: int,
    d: int,
    *,
    columns: int = QUEUE,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Problem:
    """Random unit rows and the loss over them.

    Args:
        loss: ``"nt_xent"``, ``"supcon"`` (n rows), ``"clip"``, ``"siglip"`` (n pairs), ``"moco"`` (n queries).
        columns: keys of MoCo's queue.
    """
    generator = torch.Generator().manual_seed(seed)

    def unit(rows: int) -> Tensor:
        return normalize(torch.randn(rows, d, generator=generator), dim=1).to(device, dtype)

    def leaf(t: Tensor) -> Tensor:
        return t.requires_grad_()

    if loss == "nt_xent":
        others: dict[str, Callable[..., Tensor]] = {
            "eager": lambda z: reference.nt_xent(z, temperature=TAU),
            "cross-entropy": lambda z: USUAL["nt_xent"](z, temperature=TAU),
        }
        if lightly := installed("lightly.loss"):
            criterion = lightly.NTXentLoss(temperature=TAU)
            others["lightly"] = lambda z: criterion(*z.chunk(2))
        return Problem([leaf(unit(n))], lambda z: functional.nt_xent(z, temperature=TAU), others)
    if loss == "supcon":
        labels = torch.randint(100, (n,), generator=generator).to(device)
        others = {"eager": lambda z: reference.supcon(z, labels, temperature=TAU)}
        if pml := installed("pytorch_metric_learning.losses"):
            supcon = pml.SupConLoss(TAU)
            others["pytorch-metric-learning"] = lambda z: supcon(z, labels)
        return Problem([leaf(unit(n))], lambda z: functional.supcon(z, labels, temperature=TAU), others)
    if loss == "clip":
        scale = leaf(torch.tensor(14.3, device=device))
        others = {"eager": lambda a, b, s: reference.clip(a, b, scale=s), "cross-entropy": _usual_clip}
        if open_clip := installed("open_clip"):
            clip_loss = open_clip.ClipLoss()
            others["open_clip"] = lambda a, b, s: clip_loss(a, b, s)
        if inf_cl := installed("inf_cl"):

            def inf_clip(a: Tensor, b: Tensor, s: Tensor) -> Tensor:
                head = min(256, d)  # a row is summed in pieces of so many features
                one, other = (inf_cl.cal_flash_loss(*pair, scale=s, head_dim=head) for pair in ((a, b), (b, a)))
                return (one + other).mean() / 2  # type: ignore[no-any-return]

            others["inf_cl"] = inf_clip
        if linear := getattr(nn_functional, "linear_cross_entropy", None):

            def linear_clip(a: Tensor, b: Tensor, s: Tensor) -> Tensor:
                target, s = torch.arange(len(a), device=a.device), s.to(a.dtype)
                return (linear(a * s, b, target) + linear(b * s, a, target)) / 2  # type: ignore[no-any-return]

            others["F.linear_cross_entropy"] = linear_clip
        return Problem([leaf(unit(n)), leaf(unit(n)), scale], lambda a, b, s: functional.clip(a, b, scale=s), others)
    if loss == "siglip":
        numbers = [leaf(torch.tensor(value, device=device)) for value in (10.0, -10.0)]
        return Problem(
            [leaf(unit(n)), leaf(unit(n)), *numbers],
            lambda a, b, s, c: functional.siglip(a, b, scale=s, bias=c),
            {"eager": lambda a, b, s, c: reference.siglip(a, b, scale=s, bias=c)},
        )
    if loss != "moco":
        raise ValueError(f"got the loss {loss!r}; expected nt_xent, supcon, clip, siglip or moco. Check the spelling.")
    keys, queue = unit(n), unit(columns)

    def usual_moco(q: Tensor) -> Tensor:
        logits = torch.cat([(q * keys).sum(1, keepdim=True), q @ queue.to(q.dtype).T], 1) / TAU
        return cross_entropy(_at_least_fp32(logits), torch.zeros(n, dtype=torch.long, device=device))

    return Problem(
        [leaf(unit(n))], lambda q: functional.info_nce(q, keys, queue, temperature=TAU), {"eager": usual_moco}
    )


def installed(module: str) -> Any:
    """The module, or ``None``."""
    try:
        return import_module(module)
    except ImportError:
        return None


def package_versions() -> dict[str, str | None]:
    """Versions of the packages compared with; ``None`` where one is not installed."""

    def found(package: str) -> str | None:
        try:
            return version(package)
        except PackageNotFoundError:
            return None

    return {package: found(package) for package in PACKAGES}


def _at_least_fp32(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _usual_clip(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    logits, target = _at_least_fp32(scale * image @ text.T), torch.arange(len(image), device=image.device)
    return (cross_entropy(logits, target) + cross_entropy(logits.T, target)) / 2
