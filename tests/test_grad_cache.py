"""Chunks give the gradient of the whole batch, or where that is another, of the encoder on every chunk in turn."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastcl
from fastcl import _settings, cached_loss, grad_cache, token_chunks
from fastcl._measure import peak_bytes

from .oracle import error
from .processes import together

N, WIDTH, OUT = 10, 4, 3


def encoder(*layers: nn.Module, seed: int = 0, width: int = WIDTH) -> nn.Sequential:
    torch.manual_seed(seed)
    made = nn.Sequential(nn.Linear(width, 6), *(layers or (nn.Tanh(),)), nn.Linear(6, OUT))
    return made.double()


def images(seed: int = 1, n: int = N) -> Tensor:
    return torch.randn(n, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def nt_xent() -> fastcl.NTXentLoss:
    return fastcl.NTXentLoss(0.3)


def gradients(*modules: nn.Module) -> list[Tensor]:
    return [p.grad for module in modules for p in module.parameters() if p.grad is not None]


def chunked(module: Callable[..., Any], sizes: list[int], *inputs: Tensor) -> list[Tensor]:
    """What autograd differentiates: the encoder on every chunk, concatenated, tower by tower."""
    return [torch.cat([module(part) for part in x.split(sizes)]) for x in inputs]


@pytest.mark.parametrize("size", [1, 3, 7, N, 99])
def test_rows_alone_give_the_gradient_of_the_whole_batch(size: int) -> None:
    plain, cached = encoder(), encoder()
    x, y = images(), images(2)
    want = nt_xent()(plain(x), plain(y))
    want.backward()
    value = cached_loss(cached, [x, y], nt_xent(), chunk_size=size)
    assert error(value, want) <= 1e-12
    value.backward()
    for got, exact in zip(gradients(cached), gradients(plain), strict=True):
        assert error(got, exact) <= 1e-12


@pytest.mark.parametrize("sizes", [[1] * N, [3, 3, 3, 1], [N], [4, 6]])
@pytest.mark.parametrize(
    "layers", [(nn.Dropout(0.4),), (nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.2)), (nn.LayerNorm(6), nn.Dropout(0.5))]
)
def test_what_mixes_rows_or_draws_is_replayed(sizes: list[int], layers: tuple[nn.Module, ...]) -> None:
    if isinstance(layers[0], nn.BatchNorm1d) and 1 in sizes:
        sizes = [2, 3, 5]  # it refuses a single row
    plain, cached = encoder(*copy.deepcopy(layers)), encoder(*copy.deepcopy(layers))
    x, y = images(), images(2)
    torch.manual_seed(5)
    want = nt_xent()(*chunked(plain, sizes, x, y))
    after_forward = torch.get_rng_state()
    want.backward()
    torch.manual_seed(5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        value = cached_loss(cached, [x, y], nt_xent(), chunk_size=sizes)
    assert torch.equal(torch.get_rng_state(), after_forward)
    value.backward()
    assert torch.equal(torch.get_rng_state(), after_forward)  # a second forward draws nothing new
    assert error(value, want) <= 1e-12
    for got, exact in zip(gradients(cached), gradients(plain), strict=True):
        assert error(got, exact) <= 1e-12
    for got, exact in zip(cached.buffers(), plain.buffers(), strict=True):
        assert torch.equal(got, exact)  # running statistics have seen one forward


def test_two_towers_of_nested_inputs_and_outputs() -> None:
    class Text(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(3)
            self.table, self.head = nn.Embedding(9, OUT), nn.Linear(OUT, OUT)
            self.double()

        def forward(self, ids: Tensor, mask: Tensor, power: int) -> dict[str, Tensor]:
            pooled = (self.table(ids) * mask[..., None]).sum(1)
            return {"head": self.head(pooled) ** power, "pooled": pooled}

    class Image(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = encoder(seed=4)

        def forward(self, x: Tensor, shift: Tensor) -> Tensor:
            out: Tensor = self.net(x + shift)
            return out

    ids = torch.arange(2 * N).view(N, 2) % 9
    text = {"ids": ids, "mask": (ids % 4 != 0).double(), "power": 3}
    x, shift = images(), images(7).requires_grad_()

    def loss(image: Tensor, text: dict[str, Tensor]) -> Tensor:
        return fastcl.CLIPLoss()(image, text["head"], 3.0) + text["pooled"].square().mean()

    plain, cached = (Image(), Text()), (Image(), Text())
    want = loss(plain[0](x, shift), plain[1](**text))
    want.backward()
    assert shift.grad is not None
    of_shift, shift.grad = shift.grad, None
    value = cached_loss(cached, [(x, shift), text], loss, chunk_size=[4, [5, 2, 3]])
    value.backward()
    assert error(value, want) <= 1e-12
    assert error(shift.grad, of_shift) <= 1e-12
    for got, exact in zip(gradients(*cached), gradients(*plain), strict=True):
        assert error(got, exact) <= 1e-12


def test_a_learned_temperature_accumulation_and_a_scaler() -> None:
    plain, cached = encoder(), encoder()
    losses = [fastcl.NTXentLoss(0.3, learn_temperature=True) for _ in range(2)]
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    for seed in (1, 2):
        x, y = images(seed), images(seed + 10)
        losses[0](plain(x), plain(y)).backward()
        scaler.scale(cached_loss(cached, [x, y], losses[1], chunk_size=4)).backward()
    for got, exact in zip(gradients(cached, losses[1]), gradients(plain, losses[0]), strict=True):
        assert error(got / 2.0**12, exact) <= 1e-12 or error(got / 2.0**12, exact) <= 1e-6  # of the fp32 temperature


def test_two_losses_at_once_share_nothing() -> None:
    plain, cached = encoder(nn.Dropout(0.3)), encoder(nn.Dropout(0.3))
    torch.manual_seed(1)
    want = [nt_xent()(*chunked(plain, [5, 5], images(s), images(s + 1))) for s in (1, 3)]
    (want[0] + 3 * want[1]).backward()
    torch.manual_seed(1)
    got = [cached_loss(cached, [images(s), images(s + 1)], nt_xent(), chunk_size=5) for s in (1, 3)]
    (got[0] + 3 * got[1]).backward()
    for ours, exact in zip(gradients(cached), gradients(plain), strict=True):
        assert error(ours, exact) <= 1e-12


def test_a_frozen_tower_runs_once_and_gets_nothing() -> None:
    calls = []
    frozen, trained = encoder(seed=2).requires_grad_(False), encoder()
    frozen.register_forward_hook(lambda *_: calls.append(1))
    cached_loss([trained, frozen], [images(), images(2)], lambda a, b: nt_xent()(a, b), chunk_size=5).backward()
    assert len(calls) == 2
    assert not gradients(frozen)
    plain = encoder()
    nt_xent()(plain(images()), frozen(images(2))).backward()
    for got, exact in zip(gradients(trained), gradients(plain), strict=True):
        assert error(got, exact) <= 1e-12


def test_without_gradients_the_encoder_runs_once() -> None:
    calls = []
    module = encoder()
    module.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        value = cached_loss(module, [images(), images(2)], nt_xent(), chunk_size=5)
    assert len(calls) == 4
    assert not value.requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_replayed(dtype: torch.dtype) -> None:
    plain, cached = encoder().float(), encoder().float()
    x, y = images().float(), images(2).float()
    with torch.autocast("cpu", dtype):
        want = nt_xent()(*chunked(plain, [4, 4, 2], x, y))
        value = cached_loss(cached, [x, y], nt_xent(), chunk_size=4)
    want.backward()
    value.backward()  # outside
    assert error(value, want) <= 1e-6
    # plain autograd adds the gradients of a weight up in autocast's dtype, where it was cast once for all chunks
    for got, exact in zip(gradients(cached), gradients(plain), strict=True):
        assert error(got, exact) <= torch.finfo(dtype).eps


def test_a_function_is_an_encoder_too() -> None:
    module = encoder()
    value = cached_loss(lambda x: module(x), images(), lambda z: z.square().sum(), chunk_size=3)
    value.backward()
    plain = encoder()
    plain(images()).square().sum().backward()
    for got, exact in zip(gradients(module), gradients(plain), strict=True):
        assert error(got, exact) <= 1e-12


def test_batchnorm_is_warned_of_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grad_cache, "_warned", set())
    module = encoder(nn.BatchNorm1d(6))

    def step(size: int) -> None:
        cached_loss(module, [images(), images(2)], nt_xent(), chunk_size=size)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(N)  # one chunk is the batch
        module.eval()
        step(5)
        module.train()
        with pytest.raises(UserWarning, match=r"BatchNorm1d.*chunks of 5 rows.*GroupNorm"):
            step(5)
        step(5)


def test_a_second_derivative_is_refused() -> None:
    module = encoder()
    value = cached_loss(module, [images(), images(2)], lambda a, b: (a * b).sum(), chunk_size=5)
    with pytest.raises(RuntimeError, match="second derivative"):
        value.backward(create_graph=True)


class Hungry(nn.Module):
    """Has memory for so many rows."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.net, self.most, self.calls = encoder(nn.BatchNorm1d(6), nn.Dropout(0.5)), most, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if len(x) > self.most:
            raise torch.OutOfMemoryError(f"{len(x)} rows")
        z: Tensor = self.net(x)
        return z


def test_the_largest_chunk_that_fits_is_looked_for_once() -> None:
    module, before = Hungry(6), torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cached_loss(module, images(), lambda z: z.sum(), chunk_size="auto")
        tried = module.calls
        assert tried == 2 + 2  # 10 and 5; then two chunks of 5
        assert not torch.equal(torch.get_rng_state(), before)  # the chunks drew
        cached_loss(module, images(5), lambda z: z.sum(), chunk_size="auto")
    assert module.calls == tried + 2
    assert not gradients(module)
    with pytest.raises(torch.OutOfMemoryError):
        cached_loss(Hungry(0), images(), lambda z: z.sum(), chunk_size="auto")


def test_trials_leave_no_trace() -> None:
    one, other = Hungry(5), Hungry(5)
    torch.manual_seed(2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        value = cached_loss(one, images(), lambda z: z.sum(), chunk_size="auto")
        torch.manual_seed(2)
        assert torch.equal(cached_loss(other, images(), lambda z: z.sum(), chunk_size=5), value)
    for got, exact in zip(one.buffers(), other.buffers(), strict=True):
        assert torch.equal(got, exact)


def test_chunks_of_tokens() -> None:
    assert token_chunks([3, 3, 3, 9, 1, 1, 20, 2], 9) == [3, 1, 2, 1, 1]
    assert token_chunks(torch.tensor([2, 2, 2]), 4) == [2, 1]
    assert token_chunks([], 5) == []
    for lengths, budget in (([5, 1, 7, 7, 2, 2, 2], 14), ([1] * 9, 2)):
        sizes = token_chunks(lengths, budget)
        assert sum(sizes) == len(lengths)
        parts = torch.tensor(lengths).split(sizes)
        assert all(len(part) * part.max() <= budget for part in parts)
    with pytest.raises(ValueError, match="budget = 0"):
        token_chunks([1], 0)


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        ({"chunk_size": 0}, ValueError, "chunk_size = 0"),
        ({"chunk_size": "all"}, ValueError, "chunk_size = 'all'"),
        ({"chunk_size": [5, 4]}, ValueError, r"\[5, 4\] rows for 10"),
        ({"chunk_size": [[5, 5]]}, ValueError, "1 chunk sizes for 2 towers"),
        ({"encoders": [nn.Identity()]}, ValueError, "1 encoders for 2 towers"),
        ({"inputs": [images(), 3]}, TypeError, "without a tensor"),
        ({"inputs": [(images(), images(n=4)), images()]}, ValueError, "4 and 10 rows in one tower"),
        ({"encoders": lambda x: x.sum(0)}, ValueError, "from the encoder for 5 rows"),
        ({"encoders": lambda x: x.sum().item()}, ValueError, "float from the encoder"),
    ],
)
def test_bad_input_is_said_so(change: dict[str, Any], kind: type[Exception], words: str) -> None:
    given: dict[str, Any] = {"encoders": nn.Identity(), "inputs": [images(), images(2)], "chunk_size": 5, **change}
    with pytest.raises(kind, match=words):
        cached_loss(given["encoders"], given["inputs"], nt_xent(), chunk_size=given["chunk_size"])


def test_memory_stays_flat_when_the_batch_grows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_settings, "workspace_bytes", 0)  # a cache of the loss
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.Flatten(),
        nn.Linear(16 * 64, 16),
    )  # fmt: skip

    def step(n: int, cached: bool) -> Callable[[], object]:
        x, y = torch.randn(2, n, 1, 8, 8)

        def run() -> None:
            net.zero_grad()
            if cached:
                cached_loss(net, [x, y], fastcl.NTXentLoss(), chunk_size=32).backward()
            else:
                fastcl.NTXentLoss()(net(x), net(y)).backward()

        return run

    few, many, plain = (peak_bytes(step(n, cached)) for n, cached in ((128, True), (1024, True), (1024, False)))
    embeddings = 2 * 1024 * 16 * 4
    assert many < few + 12 * embeddings  # what the loss holds
    assert many < plain / 4


# ---- two ranks ------------------------------------------------------------------------------------------------------

_RANKS = """
import sys, torch, torch.distributed as dist
from torch import nn
import fastcl
from tests.test_grad_cache import encoder, images, N
rank, folder = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
found = {}
for name, towers in (("tied", 1), ("two", 2), ("frozen", 2)):
    modules = [encoder(nn.LayerNorm(6), seed=seed) for seed in range(towers)]
    if name == "frozen":
        modules[1].requires_grad_(False)
    calls = []
    wrapped = []
    for module in modules:
        if any(p.requires_grad for p in module.parameters()):
            module = nn.parallel.DistributedDataParallel(module)
            def hook(state, bucket):
                calls.append(1)
                work = dist.all_reduce(bucket.buffer(), async_op=True).get_future()
                return work.then(lambda done: done.value()[0] / 2)
            module.register_comm_hook(None, hook)
        wrapped.append(module)
    rows = slice(0, 6) if rank == 0 else slice(6, N)
    x, y = images()[rows], images(2)[rows]
    loss = fastcl.NTXentLoss(0.3, process_group=dist.group.WORLD)
    for _ in range(2):
        for module in modules:
            module.zero_grad()
        sizes = [4, [2] * (len(x) // 2)]
        fastcl.cached_loss(wrapped[0] if towers == 1 else wrapped, [x, y], loss, chunk_size=sizes).backward()
    found[name] = ([p.grad for module in modules for p in module.parameters() if p.grad is not None], len(calls))
torch.save(found, f"{folder}/{rank}.pt")
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("cached")
    arguments = [["-c", _RANKS, str(rank), str(folder)] for rank in range(2)]
    for code, text in together(arguments, 120):
        assert code == 0, text
    yield [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("name", ["tied", "two", "frozen"])
def test_two_ranks_send_gradients_once_and_have_those_of_one_process(
    name: str, two_ranks: list[dict[str, Any]]
) -> None:
    modules = [encoder(nn.LayerNorm(6), seed=seed) for seed in range(1 if name == "tied" else 2)]
    if name == "frozen":
        modules[1].requires_grad_(False)
    nt_xent()(modules[0](images()), modules[-1](images(2))).backward()
    for grads, calls in (rank[name] for rank in two_ranks):
        assert calls == 2 * (2 if name == "two" else 1)  # of two steps, one bucket for each module
        for got, exact in zip(grads, gradients(*modules), strict=True):
            assert error(got, exact) <= 1e-12
