"""Whether a batch may change anything, which all ranks decide alike, and what undoes it where it may not."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from .errors import TrainError
from .method import Method
from .ranks import Ranks
from .run_folder import SKIPPED
from .signals import SIGNALS, Request

_PATIENCE = 5  # batches in a row that are not finite: then it is not the batches


class Guard:
    """Asked twice in a step: before the loss sees the embeddings, and before the optimizer sees the gradients.

    A batch that is refused leaves no trace: weights have not moved yet, and what moves earlier, slow networks, running
    statistics and queues, is put back to what it was.

    Attributes:
        skipped: how many batches in a row have been refused.
        bad: what of the last batch was not finite: "views", "embeddings", "loss" or "gradients"; "" where nothing.
        rehearsal: whether the next step is one: it goes through to the gradients whatever the numbers are, and is then
            refused, without being counted. The first backward pass of DistributedDataParallel decides in which order
            the later ones sum over ranks; had it been step 1 of a run, and step 9 of the same run resumed, three ranks
            would end with other bits.
        stop: the signal that a rank had received before the end of the last step, the same on all ranks; 0 for none.
    """

    def __init__(
        self, method: Method, ranks: Ranks | None = None, request: Request | None = None, skipped: int = 0
    ) -> None:
        self.skipped = skipped
        self.method, self.ranks, self.request = method, ranks or Ranks(), request or Request()
        self.bad, self.stop, self.rehearsal = "", 0, False
        self._kept: list[Tensor] = []

    def begin(self) -> None:
        """Before anything of the method moves in a step."""
        self.bad = ""
        self._kept = [tensor.detach().clone() for tensor in self._moved_by_forward()]

    def admits(self, views: Sequence[Tensor], embeddings: Sequence[Tensor]) -> bool:
        """Whether the embeddings of a micro-batch, and what they were made of, are finite on all ranks.

        One tensor of two numbers is reduced and read, where the device is waited for anyway, to time the loss.
        """
        largest = torch.stack([_largest(views), _largest(embeddings)])
        for what, ranks in zip(("views", "embeddings"), self.ranks.sum(~largest.isfinite()).tolist(), strict=True):
            if ranks and not self.bad:
                self.bad = what
        return not self.bad or self.rehearsal

    def settle(self, losses: Sequence[Tensor], scaled: bool) -> float:
        """The mean loss of a step over its micro-batches and all ranks; NaN, and everything put back, if it is refused.

        Loss, gradients and signals are one tensor of fp64, reduced and read once.

        Args:
            losses: of the micro-batches, ``()`` each.
            scaled: whether a gradient scaler looks at the gradients itself: an overflow is its daily bread.
        """
        device = next(self.method.parameters()).device
        told = torch.zeros(2 + len(SIGNALS), dtype=torch.double, device=device)
        if not self.bad:
            told[0] = sum(loss.double() for loss in losses) / len(losses)
            if not scaled:
                told[1] = ~_largest(p.grad for p in self.method.parameters() if p.grad is not None).isfinite()
        if self.request.received:
            told[2 + SIGNALS.index(self.request.received)] = 1
        total, broken, *requested = self.ranks.sum(told).tolist()
        self.stop = next((number for number, ranks in zip(SIGNALS, requested, strict=True) if ranks), 0)
        mean = float(total) / self.ranks.count
        if not self.bad and not math.isfinite(mean):
            self.bad = "loss"
        if not self.bad and broken:
            self.bad = "gradients"
        if not self.bad and not self.rehearsal:
            self.skipped = 0
            return mean
        self.skipped += not self.rehearsal
        self.rehearsal = False
        with torch.no_grad():
            for tensor, kept in zip(self._moved_by_forward(), self._kept, strict=True):
                tensor.copy_(kept)
        return math.nan

    def lose_patience(self, step: int, steps: int, folder: Path) -> None:
        """After a step, of ``steps``.

        Raises:
            TrainError: it is one of too many in a row that were refused, or of a run that had no others.
        """
        if self.skipped >= min(_PATIENCE, steps):
            raise TrainError(
                f"got {self.skipped} batches in a row that are not finite, the last in step {step} (its {self.bad}); "
                f"expected numbers. Lower --learning-rate or raise --temperature. {SKIPPED} lists their images; the "
                f"last checkpoint is in {folder}."
            )

    def _moved_by_forward(self) -> Iterable[Tensor]:
        """All state but what the optimizer moves."""
        yield from (p for p in self.method.parameters() if not p.requires_grad)
        yield from self.method.buffers()


def _largest(tensors: Iterable[Tensor]) -> Tensor:
    """The largest absolute value ``()``; not finite where a number is not. Integers, such as tokens, have no say."""
    return torch.nn.utils.get_total_norm([t.detach() for t in tensors if t.is_floating_point()], math.inf).double()
