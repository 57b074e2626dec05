"""Losses over the rows of all ranks: what they cost, and whose gradients are those of one process.

    torchrun --nproc-per-node 8 -m benchmarks.ranks --rows 8192 --dim 512 --dtype bfloat16 --json FILE
    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 -m benchmarks.ranks --json benchmarks/results/ranks-cpu.json

NCCL where there are GPUs, else gloo. Contenders: *fastcl* by gathering, by the ring, and with rows that travel in bf16;
*dense*: rows gathered with their gradients, and the usual cross-entropy of a rank's rows against all; open_clip,
lightly, pytorch-metric-learning, and GradCache and Inf-CL's ring where ``$FASTCL_UPSTREAM`` has their clones.

* *Time* is that of the slowest rank, forward and backward, contenders in turns; *peak* is the largest of all ranks;
  *sent* is what fastcl's losses count.
* *Gradients*: a linear encoder and a scale under DDP, five rows on each rank, fp64 (fp32 where a library knows no
  other). The factor by which a gradient differs from that of one process with all rows, and what no factor explains.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from fastcl import functional
from fastcl._info import cpu_model, provenance
from fastcl._measure import interleaved_seconds, peak_bytes
from fastcl.distributed import Ranks, Wire, bytes_sent, evaluate, gathered

from .dropins import clone, missing, original, upstream_version
from .record import write

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # of rows, their partners, and a scale
EXACT_ROWS = 5
COMPARED = ("lightly", "pytorch_metric_learning", "open_clip", "grad_cache", "inf_cl")


@dataclass(frozen=True)
class Contender:
    """A loss over the ranks of a group, and the same over one process."""

    loss: str
    name: str
    over_ranks: Loss
    alone: Loss
    largest: int = 10**9  # rows of a rank that it survives
    dtype: torch.dtype = torch.float64  # of the comparison of gradients


def _ours(loss: str, name: str, group: Any, **options: Any) -> Contender:
    ranks = Ranks(group, **options)

    def run(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
        return evaluate(_formula(loss), ranks, *_arguments(loss, x, y), **_scale(loss, scale))

    return Contender(loss, name, run, _alone(loss))


def _formula(loss: str) -> Callable[..., Tensor]:
    return functional.nt_xent if loss == "nt_xent" else functional.clip


def _arguments(loss: str, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    return (torch.cat([x, y]),) if loss == "nt_xent" else (x, y)


def _scale(loss: str, scale: Tensor) -> dict[str, Tensor]:
    return {"temperature": 1 / scale} if loss == "nt_xent" else {"scale": scale}


def _alone(loss: str) -> Loss:
    return lambda x, y, scale: _formula(loss)(*_arguments(loss, x, y), **_scale(loss, scale))


def _dense(loss: str, group: Any) -> Loss:
    """As people write it: all rows are gathered, and a rank has the logits of its own against them."""
    wire = Wire(group)

    def run(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
        b, w = len(x), wire.size
        counts = [b] * w
        own = torch.arange(b, device=x.device) + wire.rank * b
        if loss == "clip":
            all_x, all_y = gathered(x, counts, wire), gathered(y, counts, wire)
            return (cross_entropy(scale * x @ all_y.T, own) + cross_entropy(scale * y @ all_x.T, own)) / 2
        everyone = torch.cat([gathered(t, counts, wire) for t in (x, y)])
        own = torch.cat([own, own + b * w])
        logits = scale * torch.cat([x, y]) @ everyone.T
        logits = logits.scatter(1, own[:, None], -torch.inf)
        return cross_entropy(logits, own.roll(b))

    return run


def _peers(group: Any) -> list[Contender]:
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    found = []
    if not missing("lightly"):

        def lightly(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
            return original("lightly").NTXentLoss(1 / scale, gather_distributed=world > 1)(x, y)

        found.append(Contender("nt_xent", "lightly, gather_distributed", lightly, _alone("nt_xent")))
    if not missing("pytorch_metric_learning"):
        losses = original("pytorch_metric_learning")

        def pml(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
            from pytorch_metric_learning.utils.distributed import DistributedLossWrapper

            labels = torch.arange(len(x), device=x.device) + rank * len(x)
            loss = DistributedLossWrapper(losses.NTXentLoss(1 / scale))
            return loss(torch.cat([x, y]), labels.repeat(2))

        name = "pytorch-metric-learning, DistributedLossWrapper"
        found.append(Contender("nt_xent", name, pml, _alone("nt_xent"), largest=128))
    if not missing("open_clip"):
        for name, options in {
            "open_clip": {},
            "open_clip, local_loss": {"local_loss": True},
            "open_clip, gather_with_grad": {"gather_with_grad": True},
            "open_clip, local_loss, gather_with_grad": {"local_loss": True, "gather_with_grad": True},
        }.items():

            def open_clip(x: Tensor, y: Tensor, scale: Tensor, options: Any = options) -> Tensor:
                loss = original("open_clip").ClipLoss(**options, rank=rank, world_size=world)
                return loss(x, y, scale)

            found.append(Contender("clip", name, open_clip, _alone("clip")))
    if not missing("grad_cache"):

        def grad_cache(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
            return original("grad_cache").DistributedContrastiveLoss()(scale * x, y)

        found.append(Contender("info_nce", "GradCache, DistributedContrastiveLoss", grad_cache, _one_way))
    if os.path.isdir(clone("Inf-CLIP")) and world > 1:
        found.append(Contender("info_nce", "Inf-CL, ring", _inf_cl, _one_way, dtype=torch.float32))
    return found


def _one_way(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    return functional.info_nce(x, y, temperature=1 / scale)


def _inf_cl(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    import sys
    from importlib import import_module

    if clone("Inf-CLIP") not in sys.path:
        sys.path.append(clone("Inf-CLIP"))
    labels = torch.arange(len(x), device=x.device)
    return import_module("inf_cl").cal_ring_loss(x, y, labels, scale, x.shape[1])


class Encoder(nn.Module):
    """Rows of length 1 that have gone through a matrix, and a scale."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(8, 8, generator=generator, dtype=torch.float64).to(dtype))
        self.scale = nn.Parameter(torch.tensor(5.0, dtype=dtype))

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, y = (normalize(rows @ self.weight, dim=1) for rows in (x, y))
        return x, y, self.scale


def factors(contender: Contender, group: Any, device: torch.device) -> dict[str, Any]:
    """Of the gradient of every parameter that DDP has averaged: its factor, and the rest, relative."""
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    generator = torch.Generator().manual_seed(1)
    x, y = (torch.randn(world * EXACT_ROWS, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    x, y = x.to(device, contender.dtype), y.to(device, contender.dtype)
    own = slice(rank * EXACT_ROWS, (rank + 1) * EXACT_ROWS)
    alone = Encoder(contender.dtype).to(device)
    contender.alone(*alone(x, y)).backward()
    encoder = nn.parallel.DistributedDataParallel(Encoder(contender.dtype).to(device), process_group=group)
    contender.over_ranks(*encoder(x[own], y[own])).backward()
    found = {}
    for (name, exact), parameter in zip(alone.named_parameters(), encoder.parameters(), strict=True):
        assert exact.grad is not None
        assert parameter.grad is not None
        factor = (exact.grad * parameter.grad).sum() / exact.grad.square().sum()
        rest = (parameter.grad - factor * exact.grad).norm() / exact.grad.norm()
        found[name] = {"factor": float(factor), "rest": float(rest)}
    return found


def measure(contenders: list[Contender], n: int, d: int, dtype: torch.dtype, device: torch.device, rounds: int) -> Any:
    """Seconds, peak and bytes sent of every contender, of this rank."""
    generator = torch.Generator().manual_seed(dist.get_rank())
    x, y = (normalize(torch.randn(n, d, generator=generator), dim=1).to(device, dtype) for _ in range(2))
    leaves = [x.requires_grad_(), y.requires_grad_(), torch.tensor(10.0, device=device, requires_grad=True)]

    def step(contender: Contender) -> Callable[[], object]:
        return lambda: torch.autograd.grad(contender.over_ranks(*leaves), leaves, allow_unused=True)

    steps = {f"{c.loss} {c.name}": step(c) for c in contenders if n <= c.largest}
    rows: dict[str, dict[str, Any]] = {}
    for name, run in steps.items():
        before = bytes_sent()
        run()
        rows[name] = {"sent_bytes": bytes_sent() - before, "peak_bytes": peak_bytes(run, device)}
    for name, seconds in interleaved_seconds(steps, rounds=rounds, device=device).items():
        rows[name]["seconds"] = seconds
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ranks", description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=1024, help="of every rank")
    parser.add_argument("--dim", type=int, default=128, help="features (default: %(default)s)")
    parser.add_argument("--dtype", default="float32", help="of the rows (default: %(default)s)")
    parser.add_argument(
        "--rounds", type=int, default=7, help="calls of each contender, in turns (default: %(default)s)"
    )
    parser.add_argument("--json", type=Path, help="write the record here")
    args = parser.parse_args()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    dist.init_process_group("cuda:nccl,cpu:gloo" if device.type == "cuda" else "gloo")
    group = dist.group.WORLD
    world = dist.get_world_size()
    contenders = [
        contender
        for loss in ("nt_xent", "clip")
        for contender in (
            Contender(loss, "dense, gathered", _dense(loss, group), _alone(loss)),
            _ours(loss, "fastcl, gather", group, strategy="gather", even=True),
            _ours(loss, "fastcl, gather, exchange", group, strategy="gather"),
            _ours(loss, "fastcl, ring", group, strategy="ring", even=True),
            _ours(loss, "fastcl, gather, bf16", group, strategy="gather", even=True, wire_dtype=torch.bfloat16),
        )
    ] + _peers(group)
    ratios = {f"{c.loss} {c.name}": factors(c, group, device) for c in contenders}
    mine = measure(contenders, args.rows, args.dim, getattr(torch, args.dtype), device, args.rounds)
    everyone: list[Any] = [None] * world
    dist.all_gather_object(everyone, mine)
    rows = []
    for contender in contenders:
        name = f"{contender.loss} {contender.name}"
        row: dict[str, Any] = {"loss": contender.loss, "contender": contender.name, "gradients": ratios[name]}
        if name in mine:
            by_round = zip(*(rank[name]["seconds"] for rank in everyone), strict=True)
            row["median_seconds"] = median(max(seconds) for seconds in by_round)
            row["peak_bytes"] = max(rank[name]["peak_bytes"] for rank in everyone)
            row["sent_bytes"] = mine[name]["sent_bytes"] if contender.name.startswith("fastcl") else None
        rows.append(row)
    if dist.get_rank() == 0:
        for row in rows:
            print(_line(row), flush=True)
        if args.json:
            result = {
                **provenance(
                    f"torchrun --nproc-per-node {world} -m benchmarks.ranks --rows {args.rows} --dim {args.dim}"
                    f" --dtype {args.dtype} --rounds {args.rounds}"
                ),
                "peers": {name: upstream_version(name) for name in COMPARED if not missing(name)},
                "machine": {
                    "device": torch.cuda.get_device_name() if device.type == "cuda" else cpu_model(),
                    "ranks": world, "threads": torch.get_num_threads(),
                },
                "rows": rows,
            }  # fmt: skip
            write(args.json, result)
    dist.destroy_process_group()


def _line(row: dict[str, Any]) -> str:
    factors = ", ".join(f"{name} x {g['factor']:.4f} (rest {g['rest']:.0e})" for name, g in row["gradients"].items())
    time = (
        f"{row['median_seconds'] * 1e3:>9.2f} ms {row['peak_bytes'] / 1e6:>7.1f} MB"
        if "median_seconds" in row
        else " " * 23
    )
    sent = f"{row['sent_bytes'] / 1e6:>7.2f} MB sent" if row.get("sent_bytes") is not None else " " * 15
    return f"{row['loss']:>8} {row['contender']:<48}{time}{sent}  {factors}"


if __name__ == "__main__":
    main()
