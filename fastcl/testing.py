"""One table of losses and inputs, shared by tests and benchmarks.

A row names a loss that ``fastcl.functional`` and ``fastcl.reference`` both have, and says how to make its inputs. A new
loss is one new row here: tests, benchmarks and ``fastcl selftest`` follow.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize


@dataclass(frozen=True)
class LossCase:
    """A loss by its name, the shapes of its embeddings, and its other arguments.

    Attributes:
        name: in ``fastcl.functional`` and ``fastcl.reference``.
        rows: batch -> rows of each embedding argument.
        numbers: scalar arguments by name, such as ``{"temperature": 0.1}``; made 0-d tensors that want a gradient.
        labels: whether a tensor of labels follows the embeddings.
        row_arguments: keywords of the last embeddings, where those are not positional.
    """

    name: str
    rows: Callable[[int], tuple[int, ...]]
    numbers: dict[str, float]
    labels: bool = False
    row_arguments: tuple[str, ...] = ()

    def inputs(
        self,
        batch: int,
        dim: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        seed: int = 0,
        easy: bool = False,
        **numbers: float,
    ) -> tuple[list[Tensor], dict[str, Any]]:
        """Positional and keyword arguments; every floating-point tensor wants a gradient.

        Args:
            easy: positives that nearly coincide, for the digits of tiny losses.
            numbers: replace values of ``self.numbers``.
        """
        generator = torch.Generator().manual_seed(seed)

        def unit(n: int) -> Tensor:
            return normalize(torch.randn(n, dim, generator=generator, dtype=torch.float64), dim=-1)

        embeddings = [unit(n) for n in self.rows(batch)]
        if easy and len(embeddings) == 1:  # stacked views
            half = len(embeddings[0]) // 2
            embeddings = [torch.cat([embeddings[0][:half], embeddings[0][:half] + 0.01 * embeddings[0][half:]])]
        elif easy:
            embeddings[1] = embeddings[0] + 0.01 * embeddings[1]
        rows = [normalize(e, dim=-1).to(device, dtype).requires_grad_() for e in embeddings]
        number_dtype = torch.promote_types(dtype, torch.float32)
        kwargs: dict[str, Any] = {
            name: torch.tensor(value, dtype=number_dtype, device=device).requires_grad_()
            for name, value in {**self.numbers, **numbers}.items()
        }
        split = len(rows) - len(self.row_arguments)
        kwargs.update(zip(self.row_arguments, rows[split:], strict=True))
        args = rows[:split]
        if self.labels:
            n = rows[0].shape[0]
            args.append(torch.randint(n // 2 + 1, (n,), generator=generator).to(device))  # classes of 0 to about 6 rows
        return args, kwargs


CASES = (
    LossCase("nt_xent", lambda b: (2 * b,), {"temperature": 0.1}),
    LossCase("dcl", lambda b: (2 * b,), {"temperature": 0.1}),
    LossCase("info_nce", lambda b: (b, b), {"temperature": 0.07}),
    LossCase("info_nce", lambda b: (b, b, 3 * b + 1), {"temperature": 0.07}),
    LossCase("info_nce", lambda b: (b, b, b // 2 + 1), {"temperature": 0.07}, row_arguments=("extra_negatives",)),
    LossCase("clip", lambda b: (b, b), {"scale": 14.0}),
    LossCase("siglip", lambda b: (b, b), {"scale": 10.0, "bias": -3.0}),
    LossCase("supcon", lambda b: (2 * b,), {"temperature": 0.1}, labels=True),
)
