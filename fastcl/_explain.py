"""Which backend would run a loss, and why the others would not."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from . import functional, pairwise
from ._checks import function
from .backends import Pairs, choose

_OPS = {"pair_reduce_grad": "grad", "contrastive_grad": "contrastive"}  # of operators named otherwise
_GUIDE = Pairs._fields.index("guide_x")
_SOME_VALUE = {"temperature": 1.0, "scale": 1.0, "bias": 0.0, "topk": 1, "margin": 0.2}


def explain(loss: str | Callable[..., Any], *args: Any, **kwargs: Any) -> str:
    """Say which backend runs each kernel of a loss on tensors like these, and why the others do not.

    The loss is traced without computing or changing anything, forward and (where an input wants a gradient) backward.

    Args:
        loss: a module or function, or a name in ``fastcl.functional`` or ``fastcl.pairwise``.
        args, kwargs: its arguments; for a name, temperature, scale, bias, margin and topk may be left out.

    Raises:
        TypeError: neither a name nor something that can be called.
        ValueError: no function has that name.

    Example:
        >>> print(fastcl.explain("nt_xent", torch.randn(512, 128)))
        pair_reduce (512 x 512 x 128, float32 on cpu): chunked
          not triton: needs CUDA tensors or TRITON_INTERPRET=1, got cpu
    """
    from torch._subclasses.fake_tensor import (
        DataDependentOutputException,
        DynamicOutputShapeException,
        FakeTensorMode,
    )
    from torch.func import functional_call
    from torch.utils._python_dispatch import TorchDispatchMode

    if isinstance(loss, str):
        loss, kwargs = _named(loss, kwargs)
    function("loss", loss)
    calls: dict[tuple[Any, ...], tuple[str, str, Tensor, int]] = {}
    untraced: list[str] = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            name = func._schema.name.removeprefix("fastcl::")
            if func.namespace == "fastcl" and name.startswith(("pair_", "contrastive")):
                operands = args[1:] if isinstance(args[0], str) else args  # after `link`
                x, y = operands[:2]
                n = len(x if y is None else y)
                if name == "contrastive":  # raw rows
                    x = x.to(args[3])
                elif name == "contrastive_grad":
                    x = x.to(args[4].dtype)
                op = _OPS.get(name, name.removeprefix("pair_"))
                if name.startswith("pair_") and operands[_GUIDE] is not None:
                    op = "guided"
                calls.setdefault((name, x.shape, n, x.dtype), (name, op, x, n))
            return func(*args, **(kwargs or {}))

    with FakeTensorMode(allow_non_fake_inputs=True) as fake, Recorder():

        def faked(value: Any) -> Any:
            return fake.from_tensor(value) if isinstance(value, Tensor) else value

        try:
            inputs, named = tuple(map(faked, args)), {name: faked(value) for name, value in kwargs.items()}
            state = {}
            if isinstance(loss, nn.Module):  # a queue must not move on, nor a parameter get a gradient
                state = {name: faked(t) for name, t in (*loss.named_parameters(), *loss.named_buffers())}
                result = functional_call(loss, state, inputs, named)
            else:
                result = loss(*inputs, **named)
            tensors = [t for t in (*inputs, *named.values(), *state.values()) if isinstance(t, Tensor)]
            leaves = [t for t in tensors if t.requires_grad]
            if leaves and isinstance(result, Tensor) and result.requires_grad:
                torch.autograd.grad(result.sum(), leaves, allow_unused=True)
        except (DataDependentOutputException, DynamicOutputShapeException):  # the way of labels into shapes
            untraced = ["what follows reads a size from the device, and was not traced"]
    lines = [_describe(*call) for call in calls.values()] + untraced
    return "\n".join(lines) or "no fastcl kernel is called"


def _named(name: str, kwargs: dict[str, Any]) -> tuple[Callable[..., Any], dict[str, Any]]:
    found = getattr(functional, name, None) or getattr(pairwise, name, None)
    if name.startswith("_") or not inspect.isfunction(found):
        raise ValueError(
            f"got the name {name!r}; expected a function of fastcl.functional or fastcl.pairwise. Check the spelling."
        )
    needed = {n: v for n, v in _SOME_VALUE.items() if n in inspect.signature(found).parameters}
    return found, {**needed, **kwargs}


def _describe(name: str, op: str, x: Tensor, n: int) -> str:
    m, d = x.shape
    dtype = str(x.dtype).removeprefix("torch.")
    chosen, error, others = choose(op, x)
    head = f"{name} ({m} x {n} x {d}, {dtype} on {x.device}): {chosen or f'none ({error})'}"
    return "\n".join([head, *(f"  not {other}: {reason}" for other, reason in others.items())])
