"""What a step of SimCLR and MoCo does to which tensors."""

import copy
import math
import warnings

import pytest
import torch

from fastcl import functional, reference
from fastcl.trainer import TrainConfig
from fastcl.trainer.data import load_data
from fastcl.trainer.loop import _build, _step
from fastcl.trainer.methods import MoCo, SimCLR

CPU = torch.device("cpu")


def build(**settings: object) -> SimCLR | MoCo:
    config = TrainConfig(batch_size=16, **settings).resolved()  # type: ignore[arg-type]
    return _build(config, load_data(config))


def views(batch: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(batch, 1, 8, 8, generator=generator), torch.rand(batch, 1, 8, 8, generator=generator)


def optimizer(method: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=0.1)


@pytest.mark.parametrize("name", ["simclr", "moco"])
def test_a_step_cut_at_the_embeddings_is_the_step_of_one_backward(name: str) -> None:
    cut, whole = build(method=name), build(method=name)
    loss, seconds = _step(cut, optimizer(cut), views(), CPU)
    sgd = optimizer(whole)
    whole.begin_step()
    expected = whole.loss(*whole(*views()))
    expected.backward()
    sgd.step()
    assert loss == expected.item() and seconds > 0
    for (key, a), b in zip(cut.state_dict().items(), whole.state_dict().values(), strict=True):
        assert torch.equal(a, b), key
    start = build(method=name)
    assert not torch.equal(cut.encoder[0].weight, start.encoder[0].weight)


@pytest.mark.parametrize("name", ["simclr", "moco"])
def test_a_step_in_chunks_is_the_step_of_their_embeddings(name: str) -> None:
    cut, whole = build(method=name), build(method=name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # BatchNorm sees chunks
        loss, _ = _step(cut, optimizer(cut), views(), CPU, chunk=3)
    sgd = optimizer(whole)
    whole.begin_step()
    parts = [whole(*part) for part in zip(*(view.split(3) for view in views()), strict=True)]
    expected = whole.loss(*(torch.cat(columns) for columns in zip(*parts, strict=True)))
    expected.backward()
    sgd.step()
    assert loss == expected.item()
    for (key, a), b in zip(cut.state_dict().items(), whole.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, msg=key)
    assert not torch.equal(cut.encoder[0].weight, build(method=name).encoder[0].weight)


@pytest.mark.parametrize("name", ["simclr", "moco"])
def test_the_fused_loss_is_the_dense_one(name: str) -> None:
    method = build(method=name, queue_size=50)
    with torch.no_grad():
        embeddings = method(*views())
        dense = method.formula(reference, *(e.double() for e in embeddings)) if name == "simclr" else None
        dense = method.formula(reference, *embeddings) if dense is None else dense
        fused = method.formula(functional, *embeddings)
        assert method.loss(*embeddings).item() == pytest.approx(fused.item(), rel=1e-6)
    assert fused.item() == pytest.approx(dense.item(), rel=1e-5)


def test_moco_keys_are_an_exponential_moving_average_without_gradient() -> None:
    moco = build(method="moco", queue_size=50, momentum=0.9)
    assert isinstance(moco, MoCo)
    sgd = optimizer(moco)
    expected = copy.deepcopy(list(moco.encoder.parameters()) + list(moco.head.parameters()))
    for _ in range(3):
        with torch.no_grad():
            for slow, fast in zip(expected, [*moco.encoder.parameters(), *moco.head.parameters()], strict=True):
                slow.copy_(0.9 * slow + 0.1 * fast)
        _step(moco, sgd, views(), CPU)
    keys = [*moco.key_encoder.parameters(), *moco.key_head.parameters()]
    for slow, key, query in zip(expected, keys, [*moco.encoder.parameters(), *moco.head.parameters()], strict=True):
        torch.testing.assert_close(key, slow)
        assert key.grad is None and not key.requires_grad and query.grad is not None
    assert not torch.equal(moco.key_encoder[0].weight, moco.encoder[0].weight)
    assert all(p.grad is None for p in keys)


def test_moco_queues_the_keys_of_each_step() -> None:
    moco = build(method="moco", queue_size=50)
    assert isinstance(moco, MoCo)
    before = moco.loss.queue.features.clone()
    _step(moco, optimizer(moco), views(), CPU)
    with torch.no_grad():
        keys = moco.key_head(moco.key_encoder(views()[1]))
    torch.testing.assert_close(moco.loss.queue.features[:16], torch.nn.functional.normalize(keys))
    assert torch.equal(moco.loss.queue.features[16:], before[16:])


def test_simclr_starts_near_the_loss_of_embeddings_that_tell_nothing() -> None:
    simclr = build()
    with torch.no_grad():
        same = torch.ones(16, 64)
        assert simclr.loss(same, same).item() == pytest.approx(math.log(31), rel=1e-6)
