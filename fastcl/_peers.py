"""One problem, and everybody who solves it: fastcl, plain torch, and the libraries that are installed.

``fastcl bench --peers`` and ``benchmarks`` measure them, ``tests/test_peers.py`` holds all to one value. Nothing is
imported before it is asked for, and nothing is installed.
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.functional import normalize as unit_rows

from . import functional, reference
from ._bench import USUAL
from ._checks import choice

# The temperatures that these losses are used with; of CLIP and SigLIP one over the scale.
TEMPERATURES = {"nt_xent": 0.1, "supcon": 0.1, "clip": 0.07, "siglip": 0.1, "moco": 0.1}
LOSSES = tuple(TEMPERATURES)
QUEUE = 65536
_EASY = 0.99  # cosine of an easy positive
_BIAS = -10.0  # SigLIP's at its start
_CLASSES = 100

Loss = Callable[..., Tensor]


@dataclass(frozen=True)
class Problem:
    """A loss as a function of its leaves.

    Attributes:
        leaves: embeddings first, then learnable numbers.
        ours: by fastcl, whose backend is chosen outside.
        others: by contender; ``eager`` is ``fastcl.reference`` or its equal.
        exact: ``fastcl.reference``, which takes leaves of any dtype, and ``normalize=True``.
    """

    leaves: list[Tensor]
    ours: Loss
    others: dict[str, Loss]
    exact: Loss


@dataclass(frozen=True)
class Inputs:
    """What a loss has beside its leaves."""

    n: int
    d: int
    temperature: float
    device: torch.device
    labels: Tensor | None = None  # (n,)
    keys: Tensor | None = None  # (n, d)
    queue: Tensor | None = None  # (columns, d)


@dataclass(frozen=True)
class Peer:
    """A library to compare with.

    Attributes:
        package: its distribution, where it has one of its own.
        find: imports it; raises where it is not here, or cannot run.
        losses: by our name, what makes a function of the leaves out of the module and the inputs.
        normalizes: losses of which it brings rows to length 1 itself, so that a gradient has no part along its row.
        cubic: losses of which it stores all triples.
    """

    package: str
    find: Callable[[], Any]
    losses: Mapping[str, Callable[[Any, Inputs], Loss]]
    normalizes: tuple[str, ...] = ()
    cubic: tuple[str, ...] = ()


def problem(
    loss: str,
    n: int,
    d: int,
    *,
    columns: int = QUEUE,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    temperature: float | None = None,
    easy: bool = False,
    seed: int = 0,
) -> Problem:
    """Unit rows, rounded to a dtype, and the loss over them by everybody who can compute it.

    Args:
        loss: ``"nt_xent"``, ``"supcon"`` (n rows), ``"clip"``, ``"siglip"`` (n pairs), ``"moco"`` (n queries).
        columns: keys of MoCo's queue.
        temperature: the usual one where ``None``; of CLIP and SigLIP one over the learnable scale.
        easy: positives have a cosine of about 0.99, where otherwise all rows are random.

    Raises:
        ValueError: no such loss.
    """
    choice("loss", loss, LOSSES)
    device = torch.device(device)
    generator = torch.Generator().manual_seed(seed)

    def unit(rows: int) -> Tensor:
        return unit_rows(torch.randn(rows, d, generator=generator), dim=1)

    def near(of: Tensor, cosine: float) -> Tensor:
        rows = unit(len(of))
        across = unit_rows(rows - (rows * of).sum(1, keepdim=True) * of, dim=1)
        return cosine * of + (1 - cosine**2) ** 0.5 * across

    def positive(of: Tensor) -> Tensor:
        return near(of, _EASY) if easy else unit(len(of))

    numbers: list[float] = []
    given: dict[str, Tensor] = {}
    tau = TEMPERATURES[loss] if temperature is None else temperature
    if loss == "nt_xent":
        view = unit(n // 2)
        embeddings = [torch.cat([view, positive(view)])]
    elif loss == "supcon":
        classes = min(_CLASSES, max(n // 2, 1))
        given["labels"] = torch.randint(classes, (n,), generator=generator)
        # the cosine of two rows near a centre is the product of theirs with it
        embeddings = [near(unit(classes)[given["labels"]], _EASY**0.5) if easy else unit(n)]
    elif loss == "moco":
        embeddings = [unit(n)]
        given = {"keys": positive(embeddings[0]), "queue": unit(columns)}
    else:
        image = unit(n)
        embeddings = [image, positive(image)]
        numbers = [1 / tau] if loss == "clip" else [1 / tau, _BIAS]
    given = {name: t.to(device, dtype if t.is_floating_point() else None) for name, t in given.items()}
    inputs = Inputs(n, d, tau, device, **given)
    leaves = [rows.to(device, dtype).requires_grad_() for rows in embeddings]
    leaves += [torch.tensor(value, device=device).requires_grad_() for value in numbers]

    exact = partial(_formula, reference, loss, inputs)
    others: dict[str, Loss] = {"eager": partial(_usual_moco, inputs) if loss == "moco" else exact}
    if loss == "nt_xent":
        others["cross-entropy"] = partial(USUAL["nt_xent"], temperature=tau)
    if loss == "clip":
        others["cross-entropy"] = _usual_clip
    for name, peer in PEERS.items():
        if loss in peer.losses and (module := _found(name)[0]) is not None:
            others[name] = peer.losses[loss](module, inputs)
    return Problem(leaves, partial(_formula, functional, loss, inputs), others, exact)


def missing() -> dict[str, str]:
    """Why a peer cannot be imported here, by name."""
    return {name: reason for name in PEERS if (reason := _found(name)[1])}


def package_versions() -> dict[str, str | None]:
    """Versions of the packages compared with; ``None`` where one is not installed."""

    def found(package: str) -> str | None:
        try:
            return version(package)
        except PackageNotFoundError:
            return None

    return {peer.package: found(peer.package) for peer in PEERS.values() if peer.package}


def _found(name: str) -> tuple[Any, str]:
    return _attempt(PEERS[name].find)


@cache  # an import that fails may take seconds
def _attempt(find: Callable[[], Any]) -> tuple[Any, str]:
    """What is found, or the reason why not."""
    try:
        return find(), ""
    except Exception as error:  # someone else's import, which may raise anything
        return None, f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


def _module(name: str) -> Callable[[], ModuleType]:
    return lambda: import_module(name)


def _needs_cuda(name: str) -> Callable[[], ModuleType]:
    def find() -> ModuleType:
        module = import_module(name)
        if not torch.cuda.is_available():
            raise ImportError("its kernels need a CUDA device")
        return module

    return find


def _linear_cross_entropy() -> Loss:
    function = getattr(nn.functional, "linear_cross_entropy", None)
    if function is None:
        raise ImportError(f"torch {torch.__version__} does not have it")
    return function


def _solo_learn() -> dict[str, ModuleType]:
    """Files of losses by themselves: the package around them imports a trainer of years ago."""
    spec = importlib.util.find_spec("solo")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("No module named 'solo'")
    losses = Path(next(iter(spec.submodule_search_locations)), "losses")
    found = {}
    for name in ("simclr", "moco" if (losses / "moco.py").exists() else "mocov2plus"):
        of_file = importlib.util.spec_from_file_location(f"_fastcl_solo_{name}", losses / f"{name}.py")
        assert of_file is not None and of_file.loader is not None
        found[name.removesuffix("v2plus")] = importlib.util.module_from_spec(of_file)
        of_file.loader.exec_module(found[name.removesuffix("v2plus")])
    return found


def _lightly_nt_xent(module: Any, of: Inputs) -> Loss:
    criterion = module.NTXentLoss(temperature=of.temperature)
    return lambda z: criterion(*z.chunk(2))


def _lightly_moco(module: Any, of: Inputs) -> Loss:
    assert of.keys is not None and of.queue is not None
    criterion = module.NTXentLoss(temperature=of.temperature, memory_bank_size=tuple(of.queue.shape))
    criterion.memory_bank.bank = of.queue  # as the library does, not normalised again
    criterion.memory_bank._dequeue_and_enqueue = lambda batch: None  # every call computes the same
    return lambda q: criterion(q, of.keys)


def _pml_nt_xent(module: Any, of: Inputs) -> Loss:
    criterion, image = module.NTXentLoss(of.temperature), torch.arange(of.n // 2, device=of.device).repeat(2)
    return lambda z: criterion(z, image)


def _pml_supcon(module: Any, of: Inputs) -> Loss:
    criterion = module.SupConLoss(of.temperature)
    return lambda z: criterion(z, of.labels)


def _open_clip(module: Any, of: Inputs) -> Loss:
    return module.ClipLoss()


def _open_siglip(module: Any, of: Inputs) -> Loss:
    return module.SigLipLoss()


def _sentence_transformers_clip(module: Any, of: Inputs) -> Loss:
    criterion = module.MultipleNegativesRankingLoss(
        nn.Identity(), directions=("query_to_doc", "doc_to_query"), partition_mode="per_direction"
    )

    def clip(a: Tensor, b: Tensor, s: Tensor) -> Tensor:
        criterion.scale = s
        return criterion.compute_loss_from_embeddings([a, b], None)

    return clip


def _solo_nt_xent(modules: Any, of: Inputs) -> Loss:
    function = modules["simclr"].simclr_loss_func
    if "indexes" not in inspect.signature(function).parameters:  # the release's
        return lambda z: function(*z.chunk(2), of.temperature)
    image = torch.arange(of.n // 2, device=of.device).repeat(2)
    return lambda z: function(z, image, of.temperature)


def _solo_moco(modules: Any, of: Inputs) -> Loss:
    assert of.queue is not None
    module, queue = modules["moco"], of.queue.T.contiguous()
    function = getattr(module, "moco_loss_func", None) or module.mocov2plus_loss_func
    return lambda q: function(q, of.keys, queue, of.temperature)


def _inf_clip(module: Any, of: Inputs) -> Loss:
    def clip(a: Tensor, b: Tensor, s: Tensor) -> Tensor:
        head = min(256, of.d)  # a row is summed in pieces of so many features
        one, other = (module.cal_flash_loss(*pair, scale=s, head_dim=head) for pair in ((a, b), (b, a)))
        return (one + other).mean() / 2

    return clip


def _siglip_kernel(module: Any, of: Inputs) -> Loss:
    return lambda a, b, s, c: module.fused_siglip_loss(a, b, s.log(), c)


def _linear_clip(linear: Any, of: Inputs) -> Loss:
    def clip(a: Tensor, b: Tensor, s: Tensor) -> Tensor:
        target, s = torch.arange(len(a), device=a.device), s.to(a.dtype)
        return (linear(a * s, b, target) + linear(b * s, a, target)) / 2

    return clip


PEERS: dict[str, Peer] = {
    "lightly": Peer(
        "lightly",
        _module("lightly.loss"),
        {"nt_xent": _lightly_nt_xent, "moco": _lightly_moco},
        normalizes=("nt_xent", "moco"),
    ),
    "pytorch-metric-learning": Peer(
        "pytorch-metric-learning",
        _module("pytorch_metric_learning.losses"),
        {"nt_xent": _pml_nt_xent, "supcon": _pml_supcon},
        normalizes=("nt_xent", "supcon"),
        cubic=("nt_xent",),
    ),
    "open_clip": Peer("open_clip_torch", _module("open_clip.loss"), {"clip": _open_clip, "siglip": _open_siglip}),
    "sentence-transformers": Peer(
        "sentence-transformers",
        _module("sentence_transformers.sentence_transformer.losses"),
        {"clip": _sentence_transformers_clip},
        normalizes=("clip",),
    ),
    "solo-learn": Peer(
        "solo-learn", _solo_learn, {"nt_xent": _solo_nt_xent, "moco": _solo_moco}, normalizes=("nt_xent",)
    ),
    "inf_cl": Peer("inf_cl", _needs_cuda("inf_cl"), {"clip": _inf_clip}),
    "siglip-kernel": Peer("siglip-kernel", _needs_cuda("siglip_kernel"), {"siglip": _siglip_kernel}),
    "F.linear_cross_entropy": Peer("", _linear_cross_entropy, {"clip": _linear_clip}),
}


def _formula(module: Any, loss: str, of: Inputs, *leaves: Tensor, normalize: bool = False) -> Tensor:
    """The loss by ``fastcl.functional`` or ``fastcl.reference``, of rows of any dtype."""
    if loss == "moco":
        assert of.keys is not None and of.queue is not None
        q, k = leaves[0], of.keys.to(leaves[0].dtype)
        q, k = (unit_rows(q), unit_rows(k)) if normalize else (q, k)  # a queue holds what it was given
        return module.info_nce(q, k, of.queue.to(q.dtype), temperature=of.temperature)
    by: Any = partial(getattr(module, loss), normalize=normalize)
    if loss == "nt_xent":
        return by(*leaves, temperature=of.temperature)
    if loss == "supcon":
        return by(*leaves, of.labels, temperature=of.temperature)
    if loss == "clip":
        a, b, scale = leaves
        return by(a, b, scale=scale)
    a, b, scale, bias = leaves
    return by(a, b, scale=scale, bias=bias)


def _usual_moco(of: Inputs, q: Tensor) -> Tensor:
    assert of.keys is not None and of.queue is not None
    logits = torch.cat([(q * of.keys).sum(1, keepdim=True), q @ of.queue.T], 1) / of.temperature
    return cross_entropy(_at_least_fp32(logits), torch.zeros(len(q), dtype=torch.long, device=q.device))


def _at_least_fp32(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _usual_clip(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    logits, target = _at_least_fp32(scale * image @ text.T), torch.arange(len(image), device=image.device)
    return (cross_entropy(logits, target) + cross_entropy(logits.T, target)) / 2
