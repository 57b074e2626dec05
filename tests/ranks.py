"""One rank of tests/test_distributed.py, which keeps what it finds: python -m tests.ranks RANK WORLD FOLDER."""

from __future__ import annotations

import copy
import inspect
import os
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import normalize

import fastcl
from fastcl import functional
from fastcl.distributed import Ranks, all_rows, bytes_sent, evaluate, shuffle_batch
from fastcl.testing import CASES, LossCase

DIM = 5
TIMEOUT = 60  # seconds after which a rank gives up waiting for the others
BATCHES = {1: [[5]], 2: [[6, 6], [8, 5]], 3: [[7, 0, 3]], 4: [[1, 1, 9, 2]]}
SHARED = {("info_nce", "negatives"), ("cosface", "proxies"), ("sampled_info_nce", "table")}
APART = {"extra_negatives", "guide_negatives", ("gist", "negatives")}
RINGS = [
    "nt_xent", "nt_xent-views", "dcl", "info_nce", "info_nce-ids", "moco_v3", "n_pair", "clip", "clip-two-scales",
]  # fmt: skip
Found = dict[str, Any]


# ---- every loss -----------------------------------------------------------------------------------------------------


def inputs(case: LossCase, batches: list[int]) -> dict[str, Any]:
    """Arguments of one process by name, all of them."""
    args, kwargs = case.inputs(sum(batches), DIM, dtype=torch.float64, seed=len(batches))
    return dict(inspect.signature(getattr(functional, case.name)).bind(*args, **kwargs).arguments)


def rows_of(case: LossCase, given: dict[str, Any], batches: list[int], rank: int) -> dict[str, Tensor]:
    """Which rows of every tensor are this rank's; a tensor that all ranks share is left out."""
    images, start = sum(batches), sum(batches[:rank])
    labelled = "labels" in given and "anchors" not in given  # rows are in no order: rank by rank
    found = {}
    for key, t in given.items():
        if not isinstance(t, Tensor) or not t.ndim or (case.name, key) in SHARED:
            continue
        if key in APART or (case.name, key) in APART:
            bounds = [len(t) * r // len(batches) for r in range(len(batches) + 1)]
            found[key] = torch.arange(bounds[rank], bounds[rank + 1])
        elif labelled:
            each = len(t) // images
            found[key] = torch.arange(each * start, each * (start + batches[rank]))
        else:
            found[key] = torch.arange(len(t)).view(-1, images)[:, start : start + batches[rank]].flatten()
    return found


def part(case: LossCase, given: dict[str, Any], batches: list[int], rank: int) -> dict[str, Any]:
    """The arguments of one rank: leaves of its own."""
    rows = rows_of(case, given, batches, rank)
    mine: dict[str, Any] = {}
    for key, t in given.items():
        if isinstance(t, Tensor):
            mine[key] = (t.detach()[rows[key]] if key in rows else t.detach().clone()).requires_grad_(t.requires_grad)
        else:
            mine[key] = batches[rank] if key == "anchors" else t
    return mine


def run(function: Callable[..., Tensor], given: dict[str, Any], upstream: Tensor | None = None) -> Found:
    """Loss, and the gradient of every leaf by its name."""
    loss = function(**given)
    leaves = {key: t for key, t in given.items() if isinstance(t, Tensor) and t.requires_grad}
    grads = torch.autograd.grad(loss, list(leaves.values()), upstream, allow_unused=True)
    zeros = (
        torch.zeros_like(leaf) if grad is None else grad for leaf, grad in zip(leaves.values(), grads, strict=True)
    )
    return {"loss": loss.detach(), **dict(zip(leaves, zeros, strict=True))}


def every_loss(group: Any, world: int) -> Found:
    found = {}
    for batches in BATCHES[world]:
        for case in CASES:
            mine = part(case, inputs(case, batches), batches, dist.get_rank())
            function = getattr(functional, case.name)
            for strategy in ("gather", "ring") if case.label in RINGS else ("gather",):
                ranks = Ranks(group, strategy=strategy)
                found[case.label, strategy, tuple(batches)] = run(partial(evaluate, function, ranks), mine)
    return found


# reduction, and whether rows are weighted
REDUCTIONS = [("mean", True), ("sum", False), ("sum", True), ("none", False), ("none", True)]
REDUCED = ["nt_xent", "supcon", "clip", "siglip", "triplet", "moco_v3"]


def weighted(case: LossCase, batches: list[int], reduction: str, is_weighted: bool) -> dict[str, Any]:
    given = {**inputs(case, batches), "reduction": reduction}
    if is_weighted:
        losses = getattr(functional, case.name)(**{**given, "reduction": "none"})
        given["weights"] = torch.linspace(0.5, 2, len(losses), dtype=torch.float64).requires_grad_()
    return given


def reductions(group: Any, world: int) -> Found:
    found = {}
    batches = BATCHES[world][-1]
    for case in CASES:
        for reduction, is_weighted in REDUCTIONS if case.label in REDUCED else ():
            given = weighted(case, batches, reduction, is_weighted)
            mine = part(case, given, batches, dist.get_rank())
            upstream = None
            if reduction == "none":  # every row another one, by its place among all
                everything = getattr(functional, case.name)(**given).detach()
                upstream = part(case, {**given, "losses": everything}, batches, dist.get_rank())["losses"]
            function = getattr(functional, case.name)
            found[case.label, reduction, is_weighted] = run(partial(evaluate, function, Ranks(group)), mine, upstream)
    return found


# ---- modules under DDP, FSDP and by hand ----------------------------------------------------------------------------


class Model(nn.Module):
    """An encoder, and a loss with what it learns."""

    def __init__(self, name: str, options: dict[str, Any]) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.encoder = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, DIM))
        self.loss = MODULES[name][0](options)
        self.scale, self.bias = (nn.Parameter(torch.tensor(value)) for value in (2.0, -1.0))
        self.name = name
        self.double()

    def forward(self, x: Tensor, y: Tensor, labels: Tensor) -> Tensor:
        a, b = self.encoder(x), self.encoder(y)
        loss: Tensor = MODULES[self.name][1](self, a, b, labels)
        return loss + 0 * (self.scale + self.bias)  # DDP wants all parameters used


MODULES: dict[str, tuple[Callable[[dict[str, Any]], nn.Module], Callable[[Model, Tensor, Tensor, Tensor], Any]]] = {
    "nt_xent": (
        lambda options: fastcl.NTXentLoss(0.3, learn_temperature=True, **options),
        lambda m, a, b, labels: m.loss(a, b),
    ),
    "nt_xent, stacked": (
        lambda options: fastcl.NTXentLoss(0.3, **options),
        lambda m, a, b, labels: m.loss(torch.stack([a, b, a * b], 1)),
    ),
    "clip": (
        lambda options: fastcl.CLIPLoss(**options),
        lambda m, a, b, labels: m.loss(a, b, m.scale.exp()),
    ),
    "siglip": (
        lambda options: fastcl.SigLIPLoss(**options),
        lambda m, a, b, labels: m.loss(a, b, m.scale.exp(), m.bias),
    ),
    "supcon": (
        lambda options: fastcl.SupConLoss(0.3, learn_temperature=True, **options),
        lambda m, a, b, labels: m.loss(torch.stack([a, b], 1), labels),
    ),
    "supcon, first views of images": (
        lambda options: fastcl.SupConLoss(0.3, contrast_mode="one", **options),
        lambda m, a, b, labels: m.loss(torch.stack([a, b], 1)),
    ),
    "supcon, mask": (
        lambda options: fastcl.SupConLoss(0.3, **options),
        lambda m, a, b, labels: m.loss(torch.stack([a, b], 1), mask=torch.eye(len(a))),
    ),
    "moco": (
        lambda options: fastcl.MoCoLoss(DIM, 16, 0.3, **options),
        lambda m, a, b, labels: m.loss(a, b, b, a),
    ),
    "triplets": (
        lambda options: fastcl.BatchTripletLoss(**options),
        lambda m, a, b, labels: m.loss(torch.cat([a, b]), labels.repeat(2)),
    ),
    "cosface": (
        lambda options: fastcl.CosFaceLoss(7, DIM, **options),
        lambda m, a, b, labels: m.loss(a, labels),
    ),
}  # fmt: skip


def batch(rows: slice) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    x, y = (torch.randn(64, 4, generator=generator, dtype=torch.float64)[rows] for _ in range(2))
    return x, y, torch.randint(4, (64,), generator=generator)[rows]


def steps(model: nn.Module, rows: slice, own: Callable[[], None] = lambda: None) -> list[float]:
    """Two steps of an optimiser; ``own`` averages gradients by hand."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
    losses = []
    for _ in range(2):
        loss = model(*batch(rows))
        optimizer.zero_grad()
        loss.backward()
        own()
        optimizer.step()
        losses.append(loss.item())
    return losses


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: t.detach().clone() for name, t in model.state_dict().items()}


def own_rows(world: int) -> slice:
    batches, rank = BATCHES[world][-1], dist.get_rank()
    return slice(sum(batches[:rank]), sum(batches[: rank + 1]))


def under_ddp(group: Any, world: int) -> Found:
    found = {}
    for name in MODULES:
        model = Model(name, {"process_group": group})
        wrapped = nn.parallel.DistributedDataParallel(model)
        losses = steps(wrapped, own_rows(world))
        found[name] = (losses, state(model))
    return found


def otherwise(group: Any, world: int) -> Found:
    """Averaged by hand, under FSDP, compiled, by the ring, in fp32 with rows that travel in bf16."""
    from torch.distributed.fsdp import fully_shard

    rows, found = own_rows(world), {}
    model = Model("nt_xent", {"process_group": group})

    def average() -> None:
        for parameter in model.parameters():
            assert parameter.grad is not None
            dist.all_reduce(parameter.grad)
            parameter.grad /= world

    found["by hand"] = (steps(model, rows, average), state(model))

    class Sharded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = Model("nt_xent, stacked", {"process_group": group})
            del self.model.scale, self.model.bias
            self.model.scale = self.model.bias = torch.zeros(())
            fully_shard(self.model.encoder)

        def forward(self, *given: Tensor) -> Tensor:
            loss: Tensor = self.model(*given)
            return loss

    try:
        sharded = Sharded()
        losses = steps(sharded, rows)
        found["fsdp"] = (losses, {name: t.full_tensor() for name, t in sharded.model.encoder.state_dict().items()})
    except AttributeError as error:  # torch 2.6: it wants the streams of a GPU
        found["fsdp"] = str(error)

    torch.compiler.reset()
    model = Model("clip", {"process_group": group})
    compiled = torch.compile(model, backend="aot_eager")
    found["compiled"] = (steps(compiled, rows, average), state(model))
    model = Model("clip", {"process_group": group, "strategy": "ring"})
    found["ring"] = (steps(model, rows, average), state(model))
    model = Model("moco", {"process_group": group})
    with torch.no_grad():  # every rank draws its own queue; that of rank 0 is for all
        model.loss.queue.features.mul_(1 - 2 * dist.get_rank())
    found["queue"] = (steps(model, rows, average), state(model))
    return found


# ---- what can differ ------------------------------------------------------------------------------------------------


def disagreements(group: Any, world: int) -> Found:
    """What every rank is told where the last one does something else, and how long that takes."""
    odd = dist.get_rank() == world - 1
    z = torch.randn(4, DIM)

    def loss(*rows: Tensor, name: str = "NTXentLoss", **options: Any) -> None:
        getattr(fastcl, name)(process_group=group, **options)(*rows)

    attempts: dict[str, Callable[[], object]] = {
        "dimension": lambda: loss(z[:, : DIM - odd]),
        "dtype": lambda: loss(z.double() if odd else z),
        "loss": lambda: loss(z, name="DCLLoss" if odd else "NTXentLoss"),
        "temperature": lambda: loss(z, temperature=0.2 if odd else 0.1),
        "strategy": lambda: loss(z, strategy="ring" if odd else "gather"),
        "views": lambda: loss(z, *[z[:3]] * odd),
        "no matrix": lambda: loss(z[0] if odd else z),
        "no tensor": lambda: loss("rows" if odd else z),  # type: ignore[arg-type]
        "labels": lambda: loss(z, torch.zeros(3 if odd else 4, dtype=torch.long), name="SINCERELoss"),
        "normalization": lambda: functional_loss(normalize=bool(odd)),
        "a type": lambda: functional_loss(normalize="no" if odd else True),
        "an argument": lambda: functional_loss(**({"ids": torch.arange(2)} if odd else {})),
        "a gradient of the scale": lambda: functional_loss(
            temperature=torch.tensor(0.1, requires_grad=odd)
        ),
    }  # fmt: skip

    def functional_loss(**options: Any) -> None:
        evaluate(functional.nt_xent, Ranks(group), z, **{"temperature": 0.1, **options})

    found = {}
    for name, attempt in attempts.items():
        began = time.monotonic()
        try:
            attempt()
            found[name] = ("nothing raised", 0.0)
        except Exception as error:
            found[name] = (f"{type(error).__name__}: {error}", time.monotonic() - began)
    # after all of these the ranks still understand each other
    evaluate(functional.nt_xent, Ranks(group), z, temperature=0.1)
    return found


def details(group: Any, world: int) -> Found:
    rank, found = dist.get_rank(), {}
    generator = torch.Generator().manual_seed(1)
    z = normalize(torch.randn(2 * 4 * world, 16, generator=generator, dtype=torch.float64), dim=1)
    views = z.view(2, 4 * world, 16)[:, 4 * rank : 4 * rank + 4]

    def step(ranks: Ranks, wants: bool = True, name: str = "nt_xent") -> tuple[Tensor, Tensor | None]:
        x, y = (view.to(torch.float32).clone().requires_grad_(wants) for view in views)
        if name == "clip":
            loss = evaluate(functional.clip, ranks, x, y, scale=8.0)
        else:
            loss = evaluate(functional.nt_xent, ranks, torch.cat([x, y]), temperature=0.2)
        loss.backward()
        return loss.detach(), None if x.grad is None or y.grad is None else torch.stack([x.grad, y.grad])

    found["exchanged"], found["even"] = step(Ranks(group)), step(Ranks(group, even=True))
    found["frozen"] = step(Ranks(group), wants=rank > 0)
    for strategy in ("gather", "ring"):
        before = bytes_sent()
        found[f"bytes, {strategy}"] = (step(Ranks(group, strategy=strategy, even=True)), bytes_sent() - before)
        before = bytes_sent()
        step(Ranks(group, strategy=strategy, even=True), name="clip")
        found[f"bytes, {strategy}, clip"] = bytes_sent() - before
        for name in ("nt_xent", "clip"):
            ranks = Ranks(group, strategy=strategy, wire_dtype=torch.bfloat16)
            found[f"bf16, {strategy}, {name}"] = step(ranks, name=name)
    before = bytes_sent()
    step(Ranks(group, strategy="gather", even=True, wire_dtype=torch.bfloat16))
    found["bytes, bf16"] = bytes_sent() - before

    with torch.autocast("cpu", torch.bfloat16):
        found["autocast"] = step(Ranks(group), name="clip")
    try:
        evaluate(
            functional.sincere, Ranks(group, strategy="ring"), z, torch.zeros(len(z), dtype=torch.long), temperature=1
        )
    except ValueError as error:
        found["no ring"] = str(error)
    config, dist.get_backend_config = dist.get_backend_config, lambda group: "cuda:nccl"  # type: ignore[assignment]
    found["companion"] = step(Ranks(group))  # the exchange goes over another group then, of the same ranks
    dist.get_backend_config = config
    nothing = torch.zeros(0, DIM, requires_grad=True)
    for strategy in ("gather", "ring"):
        ranks = Ranks(group, strategy=strategy)
        found[f"nobody has a row, {strategy}"] = [
            run(partial(evaluate, functional.nt_xent, ranks), {"z": nothing, "temperature": 0.1})["loss"],
            run(partial(evaluate, functional.clip, ranks), {"image": nothing, "text": nothing, "scale": 9.0})["loss"],
        ]
    no_labels = {"z": nothing, "labels": torch.zeros(0, dtype=torch.long), "temperature": 0.1}
    found["nobody has a label"] = [run(partial(evaluate, functional.supcon, Ranks(group)), no_labels)["loss"]]
    copied = copy.deepcopy(fastcl.NTXentLoss(process_group=group))
    found["copied"] = repr(copied), copied(z[:4].float())

    images = torch.arange(3 * rank, 3 * rank + 2 + rank)
    shuffled, restore = shuffle_batch(images, group)
    found["images"], found["shuffled"], found["restored"] = images, shuffled, restore(10 * shuffled)
    drawn = [shuffle_batch(images, group, generator=torch.Generator().manual_seed(n)) for n in (1, 1, 2)]
    found["drawn"] = [own for own, _ in drawn]
    found["all"] = all_rows(images, group)
    return found


def dies(group: Any, world: int) -> Found:
    """The last rank is gone before the loss; the others find out."""
    if dist.get_rank() == world - 1:
        os._exit(9)
    began = time.monotonic()
    try:
        evaluate(functional.nt_xent, Ranks(group), torch.randn(4, DIM), temperature=0.1)
    except RuntimeError as error:
        return {"error": str(error), "seconds": time.monotonic() - began}
    return {"error": "", "seconds": 0.0}


def main() -> None:
    rank, world, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", f"file://{folder}/{world}.store", timeout=timedelta(seconds=TIMEOUT), rank=rank, world_size=world
    )
    work = [every_loss]
    if world > 1:
        work += [reductions, under_ddp]
    if world == 2:
        work += [otherwise, disagreements, details]
    if world == 3:
        work += [disagreements, details]
    found = {function.__name__: function(dist.group.WORLD, world) for function in work}
    file = folder / f"{world}-{rank}.pt"
    torch.save(found, file)
    if world != 3:
        dist.destroy_process_group()
        return
    found["dies"] = dies(dist.group.WORLD, world)
    torch.save(found, file)
    os._exit(0)  # nobody answers a farewell


if __name__ == "__main__":
    main()
