"""Losses over the rows of all ranks of torch.distributed, equal to those of one process with all rows.

Every loss module takes ``process_group=``; :func:`evaluate` does it for a function of ``fastcl.functional``.

Example:
    >>> loss = fastcl.NTXentLoss(temperature=0.1, process_group=torch.distributed.group.WORLD)
    >>> loss(model(view0), model(view1)).backward()  # model: DistributedDataParallel, FSDP, or averaged by hand

Gradients are those that averaging over ranks turns into the gradient of one process: of embeddings and of parameters of
the loss, which therefore belong inside the wrapped module. Batches may be uneven, or empty. ``docs/distributed.md`` has
the contract, the two strategies, and what they cost.
"""

from ._agreement import together
from ._losses import Ranks, evaluate, told_apart
from ._momentum import all_rows, shuffle_batch
from ._wire import Wire, bytes_sent, gathered

__all__ = [
    "Ranks", "Wire", "all_rows", "bytes_sent", "evaluate", "gathered", "shuffle_batch", "together", "told_apart",
]  # fmt: skip
