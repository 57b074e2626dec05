"""``fastcl selftest``: every backend of this machine, every loss, against the dense definition in fp64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import inf, isfinite
from typing import Any

import torch
from torch import Tensor

from . import _settings, functional, reference
from ._info import devices, versions
from ._measure import nan_last, relative_error
from .backends import NAMES, tf32_is_allowed, use_backend, why_not
from .testing import CASES, HOT, LossCase

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# Largest relative error of a loss, and relative Frobenius error of a gradient, from the same rounded inputs.
# fp32: products and sums of unit rows in fp32 stay within a few roundings (6e-8); gradients also carry the exp() of a
#       logit, whose relative error is the logit's absolute one: 6e-8 * |logit|, and |logit| <= 20 here.
# fp16, bf16: logits and sums are fp32 too (tensor cores keep slightly fewer bits of a sum); a gradient is rounded to
#       its dtype (unit roundoff 4.9e-4, 3.9e-3), and so may be the weights that it is summed from.
# TF32: what the user allowed: operands of 11 bits, like fp16, under logits of up to 20.
# bf16x3: the same; both operands of GPU kernels are off by 2^-18, and logits of up to 20 by 1.5e-4 at most. (Triton's
#       interpreter, which cuts numbers where GPUs round them, stays within that too.)
_TOLERANCES = {torch.float32: (1e-6, 1e-5), torch.float16: (1e-5, 1e-3), torch.bfloat16: (1e-5, 5e-3)}
_TF32_TOLERANCES = (1e-3, 1e-2)
_BF16X3_TOLERANCES = (5e-5, 2e-4)
_FP32_EPS, _BF16X3_EPS = 1.2e-7, 2**-17

_DIMS = (37, 40)  # the second where a backend wants whole groups of eight
_BATCH = 301  # 602 rows: several tiles of every backend, the last ones not full
_OTHER_BATCH = 45  # of losses that are built of the same kernels
_INTERPRETED_BATCH = 21  # Triton's interpreter is slow, and its tiles are small

_HARD_NUMBERS = {  # that break losses written as lse - positive, or without subtracting the largest logit
    "nt_xent, easy positives, temperature 0.02": (True, 0.02),
    "nt_xent, temperature 0.001": (False, 0.001),
}


@dataclass
class Row:
    """One line of the table: the worst errors of a loss on a backend.

    ``loss_error`` and ``grad_error`` are relative; ``None`` where the result was not finite or the kernel raised.
    """

    device: str
    backend: str
    dtype: str
    loss: str
    loss_error: float | None
    grad_error: float | None
    passed: bool
    error: str | None = None  # what was raised


def run(dtypes: Sequence[torch.dtype] = _DTYPES) -> dict[str, Any]:
    """Compare loss and every gradient with ``fastcl.reference`` in fp64, in about ten seconds.

    The first time on a GPU, Triton compiles a few hundred kernels for it, which takes minutes.

    Returns:
        ``rows`` (see :class:`Row`), ``not_run`` (device, backend, dtype, reason), ``passed``, ``versions``: plain
        values for ``json.dumps``. Nothing tested at all is not a pass.
    """
    rows: list[Row] = []
    not_run = []
    for device in devices():
        for backend in NAMES:
            for dtype in dtypes:
                if isinstance(dim := _dim(backend, device, dtype), str):
                    not_run.append({"device": str(device), "backend": backend, "dtype": _short(dtype), "reason": dim})
                else:
                    rows += _test(device, backend, dtype, dim)
    return {
        "passed": bool(rows) and all(row.passed for row in rows),
        "rows": [asdict(row) for row in rows],
        "not_run": not_run,
        "versions": versions(),
    }


def text(result: dict[str, Any]) -> str:
    """The table for people."""
    rows = result["rows"]
    width = max([len(row["loss"]) for row in rows] + [4])
    head = f"{'device':<8} {'backend':<8} {'dtype':<9} {'loss':<{width}}  {'loss error':>10}  {'gradient error':>14}"
    lines = [head, "-" * (len(head) + 6)]
    for row in rows:
        verdict = "pass" if row["passed"] else "FAIL"
        lines.append(
            f"{row['device']:<8} {row['backend']:<8} {row['dtype']:<9} {row['loss']:<{width}}"
            f"  {_shown(row['loss_error']):>10}  {_shown(row['grad_error']):>14}  {verdict}"
        )
        if row["error"]:
            lines.append(f"    raised {row['error']}")
    for (device, backend, reason), dtypes in _grouped(result["not_run"]).items():
        lines.append(f"{backend} on {device}, {', '.join(dtypes)}: not run ({reason})")
    failed = sum(not row["passed"] for row in rows)
    lines.append(f"all {len(rows)} checks pass" if result["passed"] else f"FAIL: {failed} of {len(rows)} checks")
    return "\n".join(lines)


def _test(device: torch.device, backend: str, dtype: torch.dtype, dim: int) -> list[Row]:
    batch = _INTERPRETED_BATCH if backend == "triton" and device.type == "cpu" else _BATCH
    is_tf32 = device.type == "cuda" and dtype == torch.float32 and tf32_is_allowed()
    by_gpu_kernels = backend == "triton" or (backend == "native" and device.type == "cuda")
    is_bf16x3 = by_gpu_kernels and dtype == torch.float32 and _settings.fp32 == "bf16x3"
    loss_tolerance, grad_tolerance = (
        _BF16X3_TOLERANCES if is_bf16x3 else _TF32_TOLERANCES if is_tf32 else _TOLERANCES[dtype]
    )

    def row(loss: str, cases: list[LossCase], extra: float = 0.0, **inputs: Any) -> Row:
        n = batch if all(case.hot for case in cases) else min(batch, _OTHER_BATCH)
        worst = [0.0, 0.0]
        failure = None
        try:
            for case in cases:
                errors = _errors(case, backend, n, dim, dtype=dtype, device=device, **inputs)
                worst = [max(a, b, key=nan_last) for a, b in zip(worst, errors, strict=True)]
        except Exception as raised:  # a broken kernel is a line of the table, whatever it raises
            worst, failure = [inf, inf], f"{type(raised).__name__}: {raised}"
        # written so that a NaN fails
        passed = worst[0] <= loss_tolerance + extra and worst[1] <= grad_tolerance + extra
        loss_error, grad_error = (e if isfinite(e) else None for e in worst)
        return Row(str(device), backend, _short(dtype), loss, loss_error, grad_error, passed, failure)

    guides = why_not(backend, "guided", torch.ones(2, dim, device=device, dtype=dtype)) is None
    cases = [case for case in CASES if guides or not case.guided]
    rows = [row(label, [case]) for label, case in {case.label: case for case in cases}.items()]
    if dtype == torch.float32:
        nt_xent = [case for case in HOT if case.name == "nt_xent"]
        for name, (easy, temperature) in _HARD_NUMBERS.items():
            # e^logit is off by its logit's rounding, about eps / temperature, whoever computes it
            extra = 4 * (_BF16X3_EPS if is_bf16x3 else _FP32_EPS) / temperature
            rows.append(row(name, nt_xent, extra, easy=easy, temperature=temperature))
    return rows


def _errors(case: LossCase, backend: str, batch: int, dim: int, **inputs: Any) -> tuple[float, float]:
    """Relative error of the loss, and the largest of all gradients' relative Frobenius errors."""
    args, kwargs = case.inputs(batch, dim, **inputs)
    with use_backend(backend):
        loss, grads = _value_and_grads(getattr(functional, case.name), args, kwargs, batch)
    exact_args = [_exact(a) for a in args]
    exact_kwargs = {name: _exact(a) for name, a in kwargs.items()}
    exact_loss, exact_grads = _value_and_grads(getattr(reference, case.name), exact_args, exact_kwargs, batch)
    grad_errors = [relative_error(got, want) for got, want in zip(grads, exact_grads, strict=True)]
    return relative_error(loss, exact_loss), max(grad_errors, key=nan_last)


def _value_and_grads(
    function: Any, args: list[Tensor], kwargs: dict[str, Tensor], upstream: float
) -> tuple[Tensor, list[Tensor]]:
    """The upstream gradient is what a GradScaler is for: 1 / N would push fp16 gradients below its normal numbers."""
    loss = function(*args, **kwargs)
    wanted = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor) and t.requires_grad]
    return loss.detach(), list(torch.autograd.grad(loss, wanted, torch.full_like(loss, upstream)))


def _exact(value: Any) -> Any:
    """The same numbers in fp64 on the CPU; labels stay integers, and what is no tensor as it is."""
    if not isinstance(value, Tensor):
        return value
    t = value.detach().cpu()
    return t.double().requires_grad_(value.requires_grad) if t.is_floating_point() else t


def _dim(backend: str, device: torch.device, dtype: torch.dtype) -> int | str:
    """Features of rows that the backend takes, or the reason why it takes none."""
    for dim in _DIMS:
        rows = torch.ones(2, dim, device=device, dtype=dtype)
        reason = why_not(backend, "reduce", rows) or why_not(backend, "grad", rows)
        if reason is None:
            return dim
    return str(reason)


def _grouped(not_run: list[dict[str, str]]) -> dict[tuple[str, str, str], list[str]]:
    groups: dict[tuple[str, str, str], list[str]] = {}
    for entry in not_run:
        groups.setdefault((entry["device"], entry["backend"], entry["reason"]), []).append(entry["dtype"])
    return groups


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _shown(error: float | None) -> str:
    return "not finite" if error is None else f"{error:.1e}"
