"""Losses of several processes are those of one process with all rows: value, gradients, and what is told of mistakes.

The processes are ``tests/ranks.py``, on gloo; here stands what one process finds, and what ranks should.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from benchmarks import scaling
from fastcl import NTXentLoss, functional
from fastcl.distributed import Ranks, bytes_sent
from fastcl.testing import CASES, LossCase

from . import ranks as worker
from .oracle import error
from .processes import together
from .ranks import BATCHES, MODULES, REDUCED, REDUCTIONS, RINGS, Model, batch, inputs, part, rows_of, run, state, steps

LIMIT = 240  # seconds for all processes of a group; they take about 15
EXACT = 1e-12
PROBLEMS = [
    pytest.param(world, batches, case, strategy, id=f"{batches}-{case.label}-{strategy}")
    for world, lists in BATCHES.items()
    for batches in lists
    for case in CASES
    for strategy in (("gather", "ring") if case.label in RINGS else ("gather",))
]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], list[dict[str, Any]]]:
    """What every rank of a group found, by the size of the group; groups run once, when they are asked for."""
    folder = tmp_path_factory.mktemp("ranks")
    done: dict[int, list[dict[str, Any]] | BaseException] = {}

    def ask(world: int) -> list[dict[str, Any]]:
        if world not in done:
            try:
                done[world] = _started(world, folder)
            except BaseException as failure:  # of all that ask, and not run again for each
                done[world] = failure
        known = done[world]
        if isinstance(known, BaseException):
            raise known
        return known

    return ask


def _started(world: int, folder: Path) -> list[dict[str, Any]]:
    arguments = [["-m", "tests.ranks", str(rank), str(world), str(folder)] for rank in range(world)]
    for rank, (code, text) in enumerate(together(arguments, LIMIT)):
        assert code == (9 if world == 3 and rank == world - 1 else 0), text  # one is to die
    return [torch.load(folder / f"{world}-{rank}.pt") for rank in range(world)]


def everyone(
    case: LossCase, given: dict[str, Any], batches: list[int], ranks: list[dict[str, Tensor]]
) -> dict[str, Tensor]:
    """What DDP would make of the findings of ranks: gradients averaged, rows put where they belong."""
    whole = {}
    for name, first in ranks[0].items():
        places = [rows_of(case, given, batches, rank).get(name) for rank in range(len(ranks))]
        parts = [rank[name] for rank in ranks]
        if places[0] is None:
            whole[name] = torch.stack(parts).mean(0)
        else:
            whole[name] = first.new_zeros(given[name].shape)
            for place, rows in zip(places, parts, strict=True):
                whole[name][place] = rows / len(ranks)
    return whole


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float = EXACT) -> None:
    assert got.keys() == want.keys()
    for name, exact in want.items():
        # what is 0 in theory, such as a gradient that cancels, is not divided by
        assert error(got[name], exact) <= tolerance or (got[name] - exact).abs().max() < 1e-15, name


@pytest.mark.parametrize(("world", "batches", "case", "strategy"), PROBLEMS)
def test_every_loss_is_that_of_one_process(
    world: int, batches: list[int], case: LossCase, strategy: str, found: Callable[[int], list[dict[str, Any]]]
) -> None:
    ranks = [rank["every_loss"][case.label, strategy, tuple(batches)] for rank in found(world)]
    given = inputs(case, batches)
    want = run(getattr(functional, case.name), given)
    if world == 1:
        for name, exact in want.items():
            assert torch.equal(ranks[0][name], exact), name
    assert_same(everyone(case, given, batches, ranks), want)


@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize(("reduction", "is_weighted"), REDUCTIONS)
@pytest.mark.parametrize("label", REDUCED)
def test_the_share_of_a_rank(
    world: int, reduction: str, is_weighted: bool, label: str, found: Callable[[int], list[dict[str, Any]]]
) -> None:
    """W times the weighted sum of its rows; for the mean over the sum of the weights of all."""
    case = next(case for case in CASES if case.label == label)
    batches = BATCHES[world][-1]
    ranks = [rank["reductions"][label, reduction, is_weighted] for rank in found(world)]
    given = worker.weighted(case, batches, reduction, is_weighted)
    function = getattr(functional, case.name)
    losses = function(**{**given, "reduction": "none"}).detach()
    counted = losses != 0 if label == "supcon" else losses == losses  # rows without a positive do not count
    total = given["weights"].detach()[counted].sum() if is_weighted and reduction == "mean" else 1
    for rank, own in enumerate(ranks):
        mine = part(case, {**given, "losses": losses}, batches, rank)["losses"]
        assert error(own.pop("loss"), mine if reduction == "none" else world * mine.sum() / total) <= EXACT
    # rows on their own are summed over ranks, and the mean of gradients is 1 / W of that
    want = run(function, given, losses / world if reduction == "none" else None)
    del want["loss"]
    assert_same(everyone(case, given, batches, ranks), want)


@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize("name", MODULES)
def test_two_steps_under_ddp_give_the_weights_of_one_process(
    world: int, name: str, found: Callable[[int], list[dict[str, Any]]]
) -> None:
    model = Model(name, {})
    losses = steps(model, slice(0, sum(BATCHES[world][-1])))
    ranks = [rank["under_ddp"][name] for rank in found(world)]
    means = [sum(step) / world for step in zip(*(found_losses for found_losses, _ in ranks), strict=True)]
    assert means == pytest.approx(losses, rel=1e-11)
    for _, weights in ranks:
        assert_same(weights, state(model), 1e-11)


@pytest.mark.parametrize(
    ("way", "name"), [("by hand", "nt_xent"), ("compiled", "clip"), ("ring", "clip"), ("queue", "moco")]
)
def test_two_steps_otherwise(way: str, name: str, found: Callable[[int], list[dict[str, Any]]]) -> None:
    model = Model(name, {})
    losses = steps(model, slice(0, sum(BATCHES[2][-1])))
    ranks = [rank["otherwise"][way] for rank in found(2)]
    assert [sum(step) / 2 for step in zip(*(them for them, _ in ranks), strict=True)] == pytest.approx(
        losses, rel=1e-11
    )
    for _, weights in ranks:
        assert_same(weights, state(model), 1e-11)


def test_two_steps_under_fsdp(found: Callable[[int], list[dict[str, Any]]]) -> None:
    model = Model("nt_xent, stacked", {})
    losses = steps(model, slice(0, sum(BATCHES[2][-1])))
    ranks = [rank["otherwise"]["fsdp"] for rank in found(2)]
    if "record_event" in ranks[0]:
        pytest.skip(f"FSDP2 of torch {torch.__version__} runs on GPUs only: {ranks[0]}")
    assert [sum(step) / 2 for step in zip(*(them for them, _ in ranks), strict=True)] == pytest.approx(
        losses, rel=1e-11
    )
    for _, weights in ranks:
        assert_same(weights, state(model.encoder), 1e-11)


@pytest.mark.parametrize("world", [2, 3])
def test_a_mistake_of_one_rank_is_told_to_all(world: int, found: Callable[[int], list[dict[str, Any]]]) -> None:
    ranks = [rank["disagreements"] for rank in found(world)]
    expected = {
        "dimension": "the shape of z beyond its rows",
        "dtype": "the dtype of z",
        "loss": "the loss",
        "temperature": "temperature",
        "strategy": "strategy",
        "views": "view",
        "no matrix": "",
        "no tensor": "",
        "labels": "labels",
        "normalization": "normalize",
        "a type": "normalize of type str",
        "an argument": "ids",
        "a gradient of the scale": "temperature",
    }
    assert ranks[0].keys() == expected.keys()
    for name, words in expected.items():
        told = {rank[name][0] for rank in ranks}
        assert len(told) == 1, told
        (text,) = told
        shape = r"ValueError: (rank \d cannot go on, and so no rank does: )?got .+; expected .+\. [A-Z]"
        assert re.match(shape, text), text
        assert words in text, text
        assert f"rank {world - 1}" in text, text
        assert max(rank[name][1] for rank in ranks) < worker.TIMEOUT  # nobody waited in vain


def test_a_rank_that_is_gone_is_an_error_and_no_hang(found: Callable[[int], list[dict[str, Any]]]) -> None:
    *others, dead = found(3)
    assert "dies" not in dead
    for rank in others:
        assert rank["dies"]["error"]
        assert rank["dies"]["seconds"] < worker.TIMEOUT


@pytest.mark.parametrize("world", [2, 3])
def test_without_an_exchange_and_with_rows_that_want_no_gradient(
    world: int, found: Callable[[int], list[dict[str, Any]]]
) -> None:
    for number, rank in enumerate(found(world)):
        (loss, grad), (even_loss, even_grad), (other_loss, other_grad), (frozen_loss, frozen_grad) = (
            rank["details"][name] for name in ("exchanged", "even", "companion", "frozen")
        )
        for same, same_grad in ((even_loss, even_grad), (other_loss, other_grad)):
            assert torch.equal(loss, same)
            assert torch.equal(grad, same_grad)
        assert torch.equal(loss, frozen_loss)
        if number == 0:
            assert frozen_grad is None
        else:
            assert torch.equal(grad, frozen_grad)


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("strategy", ["gather", "ring"])
@pytest.mark.parametrize("name", ["nt_xent", "clip"])
def test_rows_that_travel_in_bf16(
    world: int, strategy: str, name: str, found: Callable[[int], list[dict[str, Any]]]
) -> None:
    """The loss is that of rounded rows; gradients are summed in fp32, and rounded where they travel."""
    ranks = [rank["details"][f"bf16, {strategy}, {name}"] for rank in found(world)]
    generator = torch.Generator().manual_seed(1)
    z = normalize(torch.randn(8 * world, 16, generator=generator, dtype=torch.float64), dim=1).float()
    rounded = z.bfloat16().double().requires_grad_()
    if name == "clip":
        want = functional.clip(*rounded.chunk(2), scale=8.0)
    else:
        want = functional.nt_xent(rounded, temperature=0.2)
    want.backward()
    own_positives = 3e-3  # a rank's own positives never travelled, and are not rounded
    assert error(torch.stack([loss for loss, _ in ranks]).mean(), want) < own_positives
    got = torch.cat([grad for _, grad in ranks], 1) / world  # of both views
    assert rounded.grad is not None
    for side, exact in zip(got, rounded.grad.chunk(2), strict=True):
        assert error(side, exact) < 6e-3


@pytest.mark.parametrize("world", [2, 3])
def test_under_autocast(world: int, found: Callable[[int], list[dict[str, Any]]]) -> None:
    ranks = [rank["details"]["autocast"] for rank in found(world)]
    generator = torch.Generator().manual_seed(1)
    z = normalize(torch.randn(8 * world, 16, generator=generator, dtype=torch.float64), dim=1).float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = functional.clip(*z.chunk(2), scale=8.0)
    loss.backward()
    assert error(torch.stack([loss for loss, _ in ranks]).mean(), loss) < 1e-6
    assert z.grad is not None
    got = torch.cat([grad for _, grad in ranks], 1) / world
    for side, exact in zip(got, z.grad.chunk(2), strict=True):
        assert error(side, exact) < 5e-3  # weights are bf16


@pytest.mark.parametrize("world", [2, 3])
def test_what_a_module_over_ranks_is(world: int, found: Callable[[int], list[dict[str, Any]]]) -> None:
    for rank in found(world):
        details = rank["details"]
        assert "strategy='ring' for sincere" in details["no ring"]
        for name in ("nobody has a row, gather", "nobody has a row, ring", "nobody has a label"):
            assert all(loss == 0 for loss in details[name])
        shown, loss = details["copied"]
        assert "strategy='auto' over ranks" in shown
        assert loss.isfinite()


@pytest.mark.parametrize("world", [2, 3])
def test_bytes_on_the_wire(world: int, found: Callable[[int], list[dict[str, Any]]]) -> None:
    """What is sent is what ``benchmarks.scaling`` says: of rows of 16 fp32 features, or of bf16."""
    for rank in found(world):
        details = rank["details"]
        for way in (scaling.gather, scaling.ring):
            name = f"bytes, {way.__name__}"
            assert details[name][1] == way("nt_xent", world, 8 * world, row=64, gradient=64).sent_bytes
            assert details[f"{name}, clip"] == way("clip", world, 4 * world, row=64, gradient=64).sent_bytes
        assert details["bytes, bf16"] == scaling.gather("nt_xent", world, 8 * world, row=32).sent_bytes
        for got, want in zip(details["bytes, ring"][0], details["bytes, gather"][0], strict=True):
            assert error(got, want) < 1e-6


@pytest.mark.parametrize("world", [2, 3])
def test_shuffled_batches_come_home(world: int, found: Callable[[int], list[dict[str, Any]]]) -> None:
    ranks = [rank["details"] for rank in found(world)]
    images = torch.cat([rank["images"] for rank in ranks])
    shuffled = torch.cat([rank["shuffled"] for rank in ranks])
    assert sorted(shuffled.tolist()) == images.tolist()
    assert shuffled.tolist() != images.tolist()
    for rank in ranks:
        assert len(rank["shuffled"]) == len(rank["images"])
        assert torch.equal(rank["restored"], 10 * rank["images"])
        assert torch.equal(rank["all"], images)
    one, again, other = (torch.cat(parts) for parts in zip(*(rank["drawn"] for rank in ranks), strict=True))
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(1))
    assert torch.equal(one, images[order]) and torch.equal(again, one) and not torch.equal(other, one)


@pytest.mark.parametrize("world", [2, 3, 4])
def test_queues_of_all_ranks_are_one(world: int, found: Callable[[int], list[dict[str, Any]]]) -> None:
    first, *others = (rank["under_ddp"]["moco"][1] for rank in found(world))
    for other in others:
        for name in ("loss.queue.features", "loss.queue.pointer"):
            assert torch.equal(first[name], other[name])


def test_options_of_ranks_are_checked() -> None:
    with pytest.raises(ValueError, match="got strategy = 'tree'"):
        Ranks(None, strategy="tree")
    with pytest.raises(ValueError, match="wire_dtype"):
        Ranks(None, wire_dtype=torch.int8)
    with pytest.raises(TypeError, match="even without process_group"):
        NTXentLoss(even=True)
    assert bytes_sent() == 0
    assert batch(slice(0, 3))[0].shape == (3, 4)
