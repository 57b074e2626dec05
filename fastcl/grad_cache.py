"""The loss of a large batch through small forwards of the encoder, exactly.

A contrastive loss needs the embeddings of a whole batch, but only those: the encoder's activations can be made again, a
chunk at a time, when the gradient of the embeddings is known (Gao et al. 2021, arXiv:2101.06983, section 3). So a step
costs one more forward of the encoder, and holds the activations of one chunk.

Example:
    >>> value = fastcl.cached_loss(encoder, [view0, view1], fastcl.NTXentLoss(), chunk_size=256)
    >>> value.backward()
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from . import _checks
from ._checks import sentence

Encoder = Callable[..., Any]
ChunkSize = int | str | Sequence[int]

_GHOST = (
    "got an encoder with {names} in training mode, and chunks; expected layers that look at one row at a time. "
    "Statistics are then those of chunks of {rows} rows (ghost batch normalisation), not of the batch: use GroupNorm "
    "or LayerNorm, freeze them with .eval(), or take chunks as large as the batches that the network is known to train "
    "on. SyncBatchNorm would wait for other ranks in every chunk."
)
_ONE_DERIVATIVE = (
    "got a second derivative (create_graph=True) through cached_loss; expected one backward pass: gradients of "
    "parameters are accumulated chunk by chunk. Call the loss without chunks."
)
_FITTING = "Pass the rows that fit into memory."
_warned: set[str] = set()
_fitting: WeakKeyDictionary[nn.Module, dict[Any, int]] = WeakKeyDictionary()


def cached_loss(
    encoders: Encoder | Sequence[Encoder],
    inputs: Any,
    loss: Callable[..., Tensor],
    *,
    chunk_size: ChunkSize | Sequence[ChunkSize],
) -> Tensor:
    """``loss(encoder(x0), encoder(x1), ...)``, whose backward runs the encoder again, chunk by chunk.

    An ordinary loss: scale it, add to it, accumulate over several, ``backward()`` once.

    Args:
        encoders, inputs, chunk_size: those of :func:`cached_embeddings`.
        loss: takes what the encoders give for each tower; its own parameters receive their gradients as ever.

    Returns:
        What the loss gives.

    Raises:
        TypeError, ValueError: as :func:`cached_embeddings` does; a loss that cannot be called.
    """
    _checks.function("loss", loss)
    return loss(*cached_embeddings(encoders, inputs, chunk_size=chunk_size))


def cached_embeddings(
    encoders: Encoder | Sequence[Encoder], inputs: Any, *, chunk_size: ChunkSize | Sequence[ChunkSize]
) -> list[Any]:
    """``[encoder(x0), encoder(x1), ...]`` of all rows, whose backward runs the encoder again, chunk by chunk.

    Gradients are those of the encoder applied to every chunk in turn: random numbers (dropout) and autocast are
    replayed, so that the second forward is the first. Where no layer looks at more than one row, and none draws random
    numbers, that is the gradient of the whole batch. Parameters receive theirs during the backward pass, as with
    ``backward()``; ``torch.autograd.grad`` does not see them.

    Args:
        encoders: a module (or function), for every tower the same; or a sequence of one for each tower. A module under
            DistributedDataParallel sends its gradients once, after its last chunk. One without a parameter or input
            that wants a gradient is not run again. Of a function nobody knows the buffers: a module is better.
        inputs: what the towers are given: a list or tuple with, for every tower, a tensor ``(B, ...)`` or any nesting
            of lists, tuples and mappings of such and of other values, which go to every chunk as they are. A mapping is
            passed as keywords, a tuple as arguments. A tensor or mapping alone is one tower.
        chunk_size: rows at a time; ``"auto"``, the most that fit into the memory of the device, looked for once by at
            most log2 B steps of an encoder and shape; or the size of every chunk, such as :func:`token_chunks` finds. A
            sequence of those for towers that differ.

    Returns:
        For every tower what its encoder gives: a tensor ``(B, ...)``, or a nesting of such.

    Raises:
        TypeError: inputs without a tensor, encoders that cannot be called, a chunk size of another type.
        ValueError: tensors of different numbers of rows in one tower, a chunk size below 1, chunks that do not add up,
            not one encoder or chunk size for each tower; an encoder that gives another number of rows than it got.

    Running statistics are updated by the first forward alone, once per chunk; a second leaves every buffer as it was.
    """
    towers = _towers(encoders, inputs, chunk_size)
    for tower in towers:
        tower.encode()
    wanting = [tower for tower in towers if torch.is_grad_enabled() and tower.wants_gradient]
    if wanting:
        given = [t for tower in wanting for t in tower.leaves if t.requires_grad]
        found = [t for tower in wanting for t in tower.found]
        anchor = torch.empty(0, requires_grad=True)  # parameters are found by the replay, not by this node
        tracked = iter(_Encoded.apply(wanting, len(given), anchor, *given, *found))
        for tower in wanting:
            tower.found = [next(tracked) for _ in tower.found]
    return [tree_unflatten(tower.found, tower.found_spec) for tower in towers]


def token_chunks(lengths: Tensor | Sequence[int], budget: int) -> list[int]:
    """Sizes of chunks of consecutive rows of which none holds more tokens, padding included, than a budget.

    Args:
        lengths: ``(B,)`` tokens of every row. Sort the batch by length to pad less.
        budget: rows of a chunk times its longest; a single row may be longer.

    Raises:
        TypeError: lengths that are not numbers.
        ValueError: a budget below 1.
    """
    _checks.count("budget", budget, mend="Pass the tokens that fit into memory.")
    try:
        tokens = [int(length) for length in lengths]
    except (TypeError, ValueError) as error:
        got = f"lengths of type {type(lengths).__name__} ({error})"
        raise TypeError(sentence(got, "one number of tokens per row", "Pass a list or a vector.")) from error
    sizes, rows, longest = list[int](), 0, 0
    for length in tokens:
        longest = max(longest, length)
        if rows and (rows + 1) * longest > budget:
            sizes.append(rows)
            rows, longest = 0, length
        rows += 1
    return [*sizes, rows] if rows else sizes


@dataclass
class _Chunk:
    """Some rows of a tower, and the random state that its first forward began with."""

    rows: slice
    cpu_state: Tensor
    device_states: list[Tensor]


class _Tower:
    def __init__(self, encoder: Encoder, inputs: Any, chunk_size: ChunkSize) -> None:
        self.encoder, self.chunk_size = encoder, chunk_size
        self.positional = isinstance(inputs, tuple)
        self.by_name = isinstance(inputs, Mapping)
        self.values, self.spec = tree_flatten(dict(inputs) if self.by_name else inputs)
        self.leaves = [t for t in self.values if isinstance(t, Tensor) and t.ndim]
        if not self.leaves:
            got = f"inputs of a tower without a tensor ({type(inputs).__name__})"
            raise TypeError(sentence(got, "tensors with one row per example", "Pass [x] for one tower."))
        lengths = sorted({len(t) for t in self.leaves})
        if len(lengths) > 1:
            got = f"tensors of {' and '.join(map(str, lengths))} rows in one tower"
            raise ValueError(
                sentence(got, "one number of rows", "Pass what all rows share by a closure of the encoder.")
            )
        self.rows = lengths[0]
        self.found: list[Tensor] = []
        self.found_spec: Any = None
        self.chunks: list[_Chunk] = []
        used = {t.device for t in (*self.leaves, *(self.module.parameters() if self.module is not None else ()))}
        self.autocast = {device: _autocast_of(device) for device in {"cpu", *(d.type for d in used)}}
        self.gpus = sorted((d for d in used if d.type == "cuda"), key=lambda d: d.index)

    def chunk(self, rows: slice) -> _Chunk:
        """Rows, and the random state of now."""
        return _Chunk(rows, torch.get_rng_state(), [torch.cuda.get_rng_state(gpu) for gpu in self.gpus])

    @property
    def module(self) -> nn.Module | None:
        return self.encoder if isinstance(self.encoder, nn.Module) else None

    @property
    def wants_gradient(self) -> bool:
        """Whether anything that its forward reads wants one: of a function nobody knows."""
        parameters = self.module is None or any(p.requires_grad for p in self.module.parameters())
        return parameters or any(t.requires_grad for t in self.leaves)

    def call(self, rows: slice, leaves: Sequence[Tensor] | None = None) -> list[Tensor]:
        """The encoder on some rows: every tensor that it gives."""
        own = iter(self.leaves if leaves is None else leaves)
        values = [next(own) if isinstance(t, Tensor) and t.ndim else t for t in self.values]
        parts = [t[rows] if leaves is None and isinstance(t, Tensor) and t.ndim else t for t in values]
        given = tree_unflatten(parts, self.spec)
        if self.by_name:
            result = self.encoder(**given)
        else:
            result = self.encoder(*given) if self.positional else self.encoder(given)
        found, self.found_spec = tree_flatten(result)
        for t in found:
            if not isinstance(t, Tensor) or not t.ndim or len(t) != rows.stop - rows.start:
                shape = tuple(t.shape) if isinstance(t, Tensor) else type(t).__name__
                got = f"{shape} from the encoder for {rows.stop - rows.start} rows"
                raise ValueError(sentence(got, "tensors with one row for each", "Reduce over rows in the loss."))
        return found

    @torch.no_grad()
    def encode(self) -> None:
        """The first forward."""
        parts = []
        for rows in self.slices():
            self.chunks.append(self.chunk(rows))
            parts.append(self.call(rows))
        self.found = [torch.cat(columns) for columns in zip(*parts, strict=True)]
        if self.module is not None and len(self.chunks) > 1:
            _warn_of_ghosts(self.module, max(chunk.rows.stop - chunk.rows.start for chunk in self.chunks))

    def slices(self) -> list[slice]:
        size = self.chunk_size
        if size == "auto":
            size = _largest(self)
        if isinstance(size, int) and size > 0:
            starts = range(0, max(self.rows, 1), size)
            return [slice(start, min(start + size, self.rows)) for start in starts]
        if not isinstance(size, Sequence) or isinstance(size, str):
            raise ValueError(sentence(f"chunk_size = {size!r}", "at least 1, 'auto', or sizes", _FITTING))
        if not all(isinstance(n, int) and n > 0 for n in size) or sum(size) != self.rows:
            got = f"chunks of {list(size)} rows for {self.rows}"
            raise ValueError(sentence(got, "sizes of at least 1 that add up", "Use token_chunks, which makes such."))
        ends = torch.tensor(size).cumsum(0).tolist()
        return [slice(end - n, end) for end, n in zip(ends, size, strict=True)]

    def again(self, chunk: _Chunk, grads: Sequence[Tensor], last: bool) -> list[Tensor | None]:
        """The forward of a chunk once more, and its backward: into parameters; gradients of inputs are returned."""
        leaves = [t.detach()[chunk.rows].requires_grad_(t.requires_grad) for t in self.leaves]
        sync = nullcontext() if last or not hasattr(self.encoder, "no_sync") else self.encoder.no_sync()
        with ExitStack() as replayed:
            for device, options in self.autocast.items():
                replayed.enter_context(torch.autocast(device, **options))
            replayed.enter_context(sync)
            replayed.enter_context(_random_state(self.gpus, chunk))
            replayed.enter_context(torch.enable_grad())
            found = self.call(chunk.rows, leaves)
            pairs = [(t, g[chunk.rows]) for t, g in zip(found, grads, strict=True) if t.requires_grad]
            if pairs:
                torch.autograd.backward([t for t, _ in pairs], [g for _, g in pairs])
        return [t.grad for t in leaves]


class _Encoded(torch.autograd.Function):
    """Embeddings whose gradient runs the encoders again."""

    @staticmethod
    def forward(ctx: Any, towers: list[_Tower], inputs: int, anchor: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.towers = towers
        found = tensors[inputs:]
        constants = [t for t in found if not t.is_floating_point()]
        ctx.mark_non_differentiable(*constants)
        return tuple(t.view_as(t) for t in found)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(_ONE_DERIVATIVE)
        of_found, of_inputs = iter(grads), list[Tensor | None]()
        own = [[next(of_found) for _ in tower.found] for tower in ctx.towers]
        with _buffers_as_they_are(ctx.towers):
            for number, (tower, of_tower) in enumerate(zip(ctx.towers, own, strict=True)):
                # of towers that share an encoder the last one sends its gradients
                ends = all(later.encoder is not tower.encoder for later in ctx.towers[number + 1 :])
                parts = [
                    tower.again(chunk, of_tower, ends and chunk is tower.chunks[-1]) for chunk in tower.chunks
                ]  # fmt: skip
                for leaf, columns in zip(tower.leaves, zip(*parts, strict=True), strict=True):
                    if leaf.requires_grad:
                        of_inputs.append(torch.cat([torch.zeros_like(leaf[:0]) if t is None else t for t in columns]))
        return None, None, None, *of_inputs, *(None for tower in ctx.towers for _ in tower.found)


def _towers(encoders: Any, inputs: Any, chunk_size: Any) -> list[_Tower]:
    of_towers = list(inputs) if isinstance(inputs, list | tuple) else [inputs]
    count = len(of_towers)
    shared = callable(encoders)
    if not shared and not (isinstance(encoders, Sequence) and all(map(callable, encoders))):
        mend = "Pass one for all towers, or a list of one for each."
        raise TypeError(sentence(f"encoders of type {type(encoders).__name__}", "modules or functions", mend))
    each = [encoders] * count if shared else list(encoders)
    if len(each) != count:
        mend = "Pass one encoder for all towers, or one each."
        raise ValueError(sentence(f"{len(each)} encoders for {count} towers", f"{count}, or one", mend))
    if not isinstance(chunk_size, int | Sequence):
        raise TypeError(sentence(f"chunk_size of type {type(chunk_size).__name__}", "rows, 'auto', or sizes", _FITTING))
    sizes: list[Any] = [chunk_size] * count
    if not isinstance(chunk_size, int | str) and not all(isinstance(size, int) for size in chunk_size):
        sizes = list(chunk_size)
        if len(sizes) != count:
            mend = "Pass one chunk size for all towers, or one each."
            raise ValueError(sentence(f"{len(sizes)} chunk sizes for {count} towers", f"{count}, or one", mend))
    return [_Tower(*of_one) for of_one in zip(each, of_towers, sizes, strict=True)]


def _autocast_of(device: str) -> dict[str, Any]:
    return {
        "enabled": torch.is_autocast_enabled(device),
        "dtype": torch.get_autocast_dtype(device),
        "cache_enabled": torch.is_autocast_cache_enabled(),
    }


@contextmanager
def _random_state(gpus: list[torch.device], chunk: _Chunk) -> Iterator[None]:
    """That of the chunk's first forward; afterwards what it was."""
    with torch.random.fork_rng(gpus):
        torch.set_rng_state(chunk.cpu_state)
        for gpu, state in zip(gpus, chunk.device_states, strict=True):
            torch.cuda.set_rng_state(state, gpu)
        yield


@contextmanager
def _buffers_as_they_are(towers: Sequence[_Tower]) -> Iterator[None]:
    """What modules write into their buffers inside is undone."""
    kept = [
        (module, name, buffer, buffer.clone())
        for encoder in {id(t.module): t.module for t in towers if t.module is not None}.values()
        for module in encoder.modules()
        for name, buffer in module.named_buffers(recurse=False)
    ]
    try:
        yield
    finally:
        with torch.no_grad():
            for module, name, buffer, value in kept:
                setattr(module, name, buffer.copy_(value))


def _warn_of_ghosts(encoder: nn.Module, rows: int) -> None:
    ghosts = [m for m in encoder.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training]
    names = ", ".join(sorted({type(module).__name__ for module in ghosts}))
    if names and names not in _warned:
        _warned.add(names)
        warnings.warn(_GHOST.format(names=names, rows=rows), stacklevel=5)


def _largest(tower: _Tower) -> int:
    """The most rows whose forward and backward fit into memory: halves of the batch, until one does."""
    shapes = tuple((t.shape, t.dtype) for t in tower.leaves)
    known = _fitting.setdefault(tower.module, {}) if tower.module is not None else {}
    size = known.get(shapes, 0)
    while not size:
        size = tower.rows
        while size > 1 and not _fits(tower, size):
            size = -(-size // 2)
        known[shapes] = size
    return size


def _fits(tower: _Tower, rows: int) -> bool:
    """Whether a step of so many rows fits; it leaves gradients, buffers and random numbers as they were."""
    encoder = getattr(tower.encoder, "module", tower.encoder)  # one under DDP would talk to other ranks
    trial = _Tower(encoder, tree_unflatten(tower.values, tower.spec), rows)
    trial.positional, trial.by_name = tower.positional, tower.by_name
    parameters = [p for p in encoder.parameters() if p.requires_grad] if isinstance(encoder, nn.Module) else []
    chunk = trial.chunk(slice(0, rows))
    try:
        with _buffers_as_they_are([trial]), _random_state(trial.gpus, chunk), torch.enable_grad():
            found = [t for t in trial.call(chunk.rows) if t.requires_grad]
            if found:
                ones = [torch.ones_like(t) for t in found]
                torch.autograd.grad(found, parameters or trial.leaves, ones, allow_unused=True)
    except torch.OutOfMemoryError:
        return False
    return True


__all__ = ["cached_embeddings", "cached_loss", "token_chunks"]
