"""What a step waits for before a GPU has anything to do: the host's time, without its launches, by backend.

python -m benchmarks.host

Needs no GPU. Tensors are the CPU's, kernels are not run: those of CUDA C++ do nothing, and Triton, which compiles them
for Hopper, stops before its launcher. A dense loss of so few rows is all overhead, and does run. Five launches of ours
are left out of every step, and what a GPU's take is not known here.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from statistics import median
from types import SimpleNamespace

import torch

import fastcl
from fastcl import _measure
from fastcl.backends import _cuda, native

from .aot import launch_nothing
from .dense import usual

FEATURES = 128


def stop_before_the_kernels() -> None:
    """From now on both GPU backends take tensors of the CPU, and launch nothing."""
    kernels = _cuda.kernels
    if kernels is None:
        raise SystemExit(f"fastcl {_cuda.unsupported('reduce', torch.ones(2, 8))}")

    def nothing(*args: object) -> None:
        pass

    products = SimpleNamespace(tiles=kernels.hopper.tiles, sums=nothing, grad=nothing)
    constants = {name: getattr(kernels, name) for name in ("parts", "keys_in_a_range", "deepest", "views_rows")}
    launches = dict.fromkeys(("bounds", "finish", "prepare", "restore"), nothing)
    _cuda.kernels = SimpleNamespace(ampere=products, hopper=products, **constants, **launches)  # type: ignore[assignment]
    _cuda.family = lambda device: "hopper"
    _cuda.processors = lambda device: 132  # type: ignore[assignment]
    for name in ("unsupported", "contrastive", "contrastive_grad"):
        setattr(native, name, getattr(_cuda, name))
    launch_nothing(90, "bfloat16", lambda compiled: None)


def _ours(loss: torch.nn.Module, views: list[torch.Tensor], backend: str) -> None:
    with fastcl.use_backend(backend):
        torch.autograd.grad(loss(*views), views)


def _dense(views: list[torch.Tensor]) -> None:
    form = usual("nt_xent", {})
    assert form is not None
    unit = torch.nn.functional.normalize(torch.cat(views), dim=1)
    torch.autograd.grad(form(unit, temperature=0.1), views)


def main() -> None:
    """A line per contender: the median of rounds, in which each had its turn."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.host", description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=8, help="of either view (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=15, help="of each contender (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=200, help="in a round (default: %(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    stop_before_the_kernels()
    loss = fastcl.NTXentLoss(temperature=0.1)
    draw = torch.Generator().manual_seed(0)
    views = [torch.randn(args.rows, FEATURES, generator=draw).requires_grad_() for _ in range(2)]
    halves = [view.detach().bfloat16().requires_grad_() for view in views]

    def often(step: Callable[[], None]) -> None:
        for _ in range(args.steps):
            step()

    steps = {
        "dense, fp32": partial(_dense, views),
        "native, bf16": partial(_ours, loss, halves, "native"),
        "triton, bf16": partial(_ours, loss, halves, "triton"),
    }
    contenders = {name: partial(often, step) for name, step in steps.items()}
    for name, seconds in _measure.interleaved_seconds(contenders, rounds=args.rounds).items():
        print(f"{name:>12}: {1e6 * median(seconds) / args.steps:6.1f} us of the host, without launches of ours")


if __name__ == "__main__":
    main()
