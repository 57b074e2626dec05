"""Several processes that train one network, as ``torchrun`` starts them: each has its rows of every batch.

The loss is that of the whole batch (``fastcl.distributed``), and DistributedDataParallel averages gradients, so the
weights are those of one process, but for dropout, and for BatchNorm, which sees the rows of its rank unless
``sync_batchnorm`` is set: for MoCo, that is one process with as many ``bn_splits``. (Siamese pairs its images with
their neighbours within a rank.) The first rank probes, writes and speaks; the checkpoint has its running statistics.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from .. import distributed as losses
from .batchnorm import split_batchnorm
from .config import TrainConfig
from .errors import TrainError
from .method import Method

_LETTING_GO = 0.2  # seconds


@dataclass(frozen=True)
class Ranks:
    """This process among ``count``."""

    rank: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        return self.rank == 0

    def rows(self, config: TrainConfig) -> Tensor:
        """Which rows of a batch are this rank's: of every micro-batch an equal part."""
        micro_batches = torch.arange(config.batch_size).view(config.accumulate, self.count, -1)
        return micro_batches[:, self.rank].flatten()

    def parallel(self, method: Method, config: TrainConfig) -> nn.Module:
        """What is called in place of ``method``: gradients of its parameters become the mean over ranks.

        BatchNorm of ``method`` itself then sees the rows that the config says.
        """
        if config.bn_splits > 1:
            split_batchnorm(method, config.bn_splits)
        if self.count == 1:
            return method
        method.loss.ranks = losses.Ranks(distributed.group.WORLD)  # type: ignore[assignment]
        if config.sync_batchnorm:
            nn.SyncBatchNorm.convert_sync_batchnorm(method)
        # buffers stay: a queue is the same on all ranks, and is large
        return DistributedDataParallel(method, broadcast_buffers=False)

    def sum(self, values: Tensor) -> Tensor:
        """Over ranks, in fp64 where there are others."""
        if self.count == 1:
            return values
        total = values.double()
        distributed.all_reduce(total)
        return total

    def unite(self, known: Tensor, device: torch.device) -> None:
        """``known`` on every rank becomes the largest of all ranks, element by element."""
        if self.count == 1 or not known.numel():
            return
        largest = known.to(device)
        distributed.all_reduce(largest, distributed.ReduceOp.MAX)
        known.copy_(largest)

    def told(self, result: Any) -> Any:
        """What the first rank has, on all."""
        if self.count == 1:
            return result
        box = [result]
        distributed.broadcast_object_list(box, 0)
        return box[0]


def launched() -> Ranks:
    """What the environment says, which ``torchrun`` writes."""
    return Ranks(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))


@contextmanager
def joined(config: TrainConfig) -> Iterator[Ranks]:
    """The ranks of this run, which can talk to each other inside.

    Raises:
        TrainError: they cannot share a batch equally, nor cut their parts into ``bn_splits``, or BatchNorm across ranks
            is asked for without GPUs.
    """
    ranks = launched()
    if (config.batch_size // config.accumulate) % ranks.count:
        raise TrainError(
            f"got batch_size / accumulate = {config.batch_size // config.accumulate} for {ranks.count} ranks; expected "
            "a multiple of the ranks. Choose another --batch-size."
        )
    rows = config.batch_size // config.accumulate // ranks.count
    chunk = min(config.chunk or rows, rows)
    if any(n % config.bn_splits or 0 < n < 2 * config.bn_splits for n in (chunk, rows % chunk) if config.bn_splits > 1):
        raise TrainError(
            f"got bn_splits = {config.bn_splits} for {rows} images of a rank's micro-batch in chunks of {chunk}; "
            "expected equal parts of at least 2 images in each. Choose a smaller divisor of both."
        )
    if config.sync_batchnorm and config.device != "cuda":
        raise TrainError(
            "got sync_batchnorm on the CPU; expected GPUs, which torch has it for. Leave it out, or use --device cuda."
        )
    if ranks.count == 1:
        yield ranks
        return
    if config.device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    distributed.init_process_group("nccl" if config.device == "cuda" else "gloo")
    try:
        yield ranks
    finally:
        # Gloo's threads let go of a tensor a moment after it has arrived, and take Python's lock for that. What follows
        # keeps the lock while it waits for these threads (torch 2.6), or leaves them to find that Python has ended.
        time.sleep(_LETTING_GO)
        distributed.destroy_process_group()
