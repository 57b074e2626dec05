"""What test_two_ranks runs twice: every loss that looks at rows of other ranks, under DDP, on gloo.

``python -m tests.integrations.two_ranks RANK FOLDER`` writes ``FOLDER/RANK.pt``: for every name in ``LOSSES`` the loss
and the gradients of the model's parameters that DDP has averaged; and the same of the originals, where they are.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from datetime import timedelta
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from benchmarks.dropins import clone, original
from fastcl.integrations import grad_cache, inf_cl, solo_learn

RANKS, BATCH, WIDTH = 2, 5, 8
LABELS = torch.tensor([[3, 1, 1, 0, 0], [0, 3, 3, 3, 1]])  # of the rows of every rank
ORDER = torch.tensor([[1, 1, 4, 0, 3], [4, 2, 0, 3, 1]])  # positives among the keys of their own rank


class Model(nn.Module):
    """Rows of length 1, and a scale; fp64, so that nothing is hidden by rounding."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(7)
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH, dtype=torch.float64, generator=generator))
        self.scale = nn.Parameter(torch.tensor(5.0, dtype=torch.float64))

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, y = (nn.functional.normalize(rows @ self.weight, dim=1) for rows in (x, y))
        return x, y, self.scale


def inputs() -> tuple[Tensor, Tensor]:
    """Rows of all ranks, ``(RANKS, BATCH, WIDTH)`` and twice as many keys."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(RANKS, BATCH, WIDTH, dtype=torch.float64, generator=generator)
    return x, torch.randn(RANKS, 2 * BATCH, WIDTH, dtype=torch.float64, generator=generator)


def each(table: Tensor, rank: int | None) -> Tensor:
    """What belongs to the rows of one rank, or of all."""
    return table.flatten() if rank is None else table[rank]


def positives(rank: int | None) -> Tensor:
    """Numbers of the positives among the keys of one rank, or of all."""
    shift = 0 if rank is not None else torch.arange(RANKS)[:, None] * 2 * BATCH
    return each(ORDER + shift, rank)


def images(rank: int | None) -> Tensor:
    return each(torch.arange(RANKS * BATCH).view(RANKS, BATCH), rank)


Loss = Callable[[Any, Tensor, Tensor, Tensor, int | None], Tensor]


def _paired(y: Tensor) -> Tensor:
    return y[::2]


def _simclr(indexes: Callable[[int | None], Tensor]) -> Loss:
    return lambda module, x, y, scale, rank: module.simclr_loss_func(
        torch.cat([x, _paired(y)]), indexes(rank).repeat(2), 1 / scale
    )


def _moco_v3(module: Any, x: Tensor, y: Tensor, scale: Tensor, rank: int | None) -> Tensor:
    """Keys of several ranks receive no gradient, and in one process those that ask for none."""
    key = _paired(y).detach() if rank is None else _paired(y)
    loss: Tensor = module.mocov3_loss_func(x, key, 1 / scale)
    return loss


def _grad_cache(**options: Any) -> Loss:
    """One process has the class without ranks."""

    def loss(module: Any, x: Tensor, y: Tensor, scale: Tensor, rank: int | None) -> Tensor:
        given, reduction = dict(options), options.get("reduction", "mean")
        given.pop("reduction", None)
        name = "SimpleContrastiveLoss" if rank is None else "DistributedContrastiveLoss"
        if rank is None or module is not grad_cache:
            given.pop("strict", None)
        losses: Tensor = getattr(module, name)(1, **given)(scale * x, y, reduction=reduction)
        return (losses * torch.arange(1.0, losses.numel() + 1)).sum() if reduction == "none" else losses

    return loss


def _inf_cl(name: str, **options: Any) -> Loss:
    def loss(module: Any, x: Tensor, y: Tensor, scale: Tensor, rank: int | None) -> Tensor:
        given = options if module is inf_cl else {}
        value: Tensor = getattr(module, name)(x, y, positives(rank), scale, WIDTH, **given)
        return value

    return loss


def _installed(library: str) -> Any:
    """The drop-ins of a library that they need, or nothing where it is not installed."""
    try:
        return import_module(f"fastcl.integrations.{library}")
    except ImportError:
        return None


def _clip(name: str, strict: bool = False, **options: Any) -> Loss:
    def loss(module: Any, x: Tensor, y: Tensor, scale: Tensor, rank: int | None) -> Tensor:
        ranks = {"rank": 0, "world_size": 1} if rank is None else {"rank": rank, "world_size": RANKS}
        given = {"strict": True} if strict and module is open_clip else {}
        bias = () if name == "ClipLoss" else (-scale,)
        value: Tensor = getattr(module, name)(**options, **ranks, **given)(
            x, _paired(y).contiguous(), scale, *bias
        )  # open_clip sends them
        return value

    return loss


def _lightly(name: str) -> Loss:
    return lambda module, x, y, scale, rank: getattr(module, name)(1 / scale, gather_distributed=True)(x, _paired(y))


lightly, open_clip = _installed("lightly"), _installed("open_clip")
LOSSES: dict[str, tuple[Any, Loss]] = {
    "lightly NTXentLoss": (lightly, _lightly("NTXentLoss")),
    "lightly DCLLoss": (lightly, _lightly("DCLLoss")),
    "open_clip": (open_clip, _clip("ClipLoss")),
    "open_clip, strict": (open_clip, _clip("ClipLoss", strict=True)),
    "open_clip, gradients gathered": (open_clip, _clip("ClipLoss", gather_with_grad=True)),
    "open_clip, local": (open_clip, _clip("ClipLoss", local_loss=True, gather_with_grad=True)),
    "open_clip, local without gradients": (open_clip, _clip("ClipLoss", local_loss=True)),
    **{
        f"open_clip SigLipLoss, {way}": (open_clip, _clip("SigLipLoss", dist_impl=way))
        for way in ("bidir", "shift", "reduce", "gather")
    },
    "simclr, images": (solo_learn, _simclr(images)),
    "simclr, labels": (solo_learn, _simclr(lambda rank: each(LABELS, rank))),
    "nnclr": (solo_learn, lambda module, x, y, scale, rank: module.nnclr_loss_func(x, _paired(y), 1 / scale)),
    "mocov3": (solo_learn, _moco_v3),
    "grad_cache": (grad_cache, _grad_cache()),
    "grad_cache, sum": (grad_cache, _grad_cache(reduction="sum")),
    "grad_cache, none": (grad_cache, _grad_cache(reduction="none")),
    "grad_cache, strict": (grad_cache, _grad_cache(strict=True)),
    "inf": (inf_cl, _inf_cl("cal_inf_loss")),
    "ring": (inf_cl, _inf_cl("cal_ring_loss")),
    "inf, strict": (inf_cl, _inf_cl("cal_inf_loss", strict=True)),
    "ring, strict": (inf_cl, _inf_cl("cal_ring_loss", strict=True)),
}


def run(model: nn.Module, module: Any, loss_of: Loss, x: Tensor, y: Tensor, rank: int | None) -> dict[str, Tensor]:
    loss = loss_of(module, *model(x, y), rank)
    loss.backward()
    found = {"loss": loss.detach()}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        found[name.removeprefix("module.")] = parameter.grad.clone()
    return found


def theirs(module: Any) -> Any:
    """The originals, of which Inf-CL's ring loss is plain torch where torch.distributed is initialised."""
    if module is not inf_cl:
        return original(module.__name__.rpartition(".")[2])
    sys.path.append(clone("Inf-CLIP"))
    return import_module("inf_cl")


def main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder / 'store'}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=RANKS, timeout=timedelta(seconds=60))
    x, y = inputs()
    found: dict[str, Any] = {}
    for name, (module, loss_of) in LOSSES.items():
        if module is None:
            continue
        found[name] = run(DistributedDataParallel(Model()), module, loss_of, x[rank], y[rank], rank)
    for name, (module, loss_of) in LOSSES.items():
        if name.startswith("inf") or module is None:
            continue  # its kernels; nothing to compare
        try:
            upstream = theirs(module)
        except ImportError:
            continue
        # the original ring hands gradients over in fp32 only
        dtype = torch.float32 if module is inf_cl else torch.float64
        model = DistributedDataParallel(Model().to(dtype))
        found[f"original {name}"] = run(model, upstream, loss_of, x[rank].to(dtype), y[rank].to(dtype), rank)
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
