"""Which backend would run a loss, and why the others would not."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from . import functional, pairwise
from .backends import Pairs, choose

_SOME_VALUE = {"temperature": 1.0, "scale": 1.0, "bias": 0.0, "topk": 1}


def explain(loss: str | Callable[..., Any], *args: Any, **kwargs: Any) -> str:
    """Say which backend runs each kernel of a loss on tensors like these, and why the others do not.

    The loss is traced without computing or changing anything, forward and (where an input wants a gradient) backward.

    Args:
        loss: a module or function, or a name in ``fastcl.functional`` or ``fastcl.pairwise``.
        args, kwargs: its arguments; for a name, temperature, scale, bias and topk may be left out.

    Raises:
        ValueError: no function has that name.

    Example:
        >>> print(fastcl.explain("nt_xent", torch.randn(512, 128)))
        pair_reduce (512 x 512 x 128, float32 on cpu): chunked
          not triton: needs CUDA tensors or TRITON_INTERPRET=1, got cpu
    """
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.func import functional_call
    from torch.utils._python_dispatch import TorchDispatchMode

    if isinstance(loss, str):
        loss, kwargs = _named(loss, kwargs)
    calls: dict[tuple[Any, ...], tuple[str, Pairs]] = {}

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.namespace == "fastcl" and "pair_" in func._schema.name:
                name = func._schema.name.removeprefix("fastcl::")
                start = 0 if name == "pair_topk" else 1  # after `link`
                pairs = Pairs(*args[start : start + len(Pairs._fields)])
                calls.setdefault((name, pairs.x.shape, pairs.y.shape, pairs.x.dtype), (name, pairs))
            return func(*args, **(kwargs or {}))

    with FakeTensorMode(allow_non_fake_inputs=True) as fake, Recorder():

        def faked(value: Any) -> Any:
            return fake.from_tensor(value) if isinstance(value, Tensor) else value

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
    return "\n".join(_describe(*call) for call in calls.values()) or "no fastcl kernel is called"


def _named(name: str, kwargs: dict[str, Any]) -> tuple[Callable[..., Any], dict[str, Any]]:
    function = getattr(functional, name, None) or getattr(pairwise, name, None)
    if name.startswith("_") or not inspect.isfunction(function):
        raise ValueError(
            f"got the name {name!r}; expected a function of fastcl.functional or fastcl.pairwise. Check the spelling."
        )
    needed = {n: v for n, v in _SOME_VALUE.items() if n in inspect.signature(function).parameters}
    return function, {**needed, **kwargs}


def _describe(name: str, pairs: Pairs) -> str:
    op = "grad" if name == "pair_reduce_grad" else name.removeprefix("pair_")
    (m, d), n = pairs.x.shape, pairs.y.shape[0]
    dtype = str(pairs.x.dtype).removeprefix("torch.")
    chosen, error, others = choose(op, pairs.x)
    head = f"{name} ({m} x {n} x {d}, {dtype} on {pairs.x.device}): {chosen or f'none ({error})'}"
    return "\n".join([head, *(f"  not {other}: {reason}" for other, reason in others.items())])
