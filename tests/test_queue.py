"""The ring buffer, and MoCo's loss over it."""

from __future__ import annotations

import pytest
import torch

import fastcl
from fastcl import reference
from fastcl.pairwise import l2_normalize

from .oracle import assert_close


def rows(start: int, count: int) -> torch.Tensor:
    return torch.arange(start, start + count, dtype=torch.float32)[:, None].expand(count, 2)


@pytest.mark.parametrize("batches", [[3], [4, 4], [5, 5, 5], [10], [11], [25], [0, 7], [9, 0, 9, 13]])
def test_the_newest_rows_stay(batches: list[int]) -> None:
    queue = fastcl.FeatureQueue(2, 10)
    old = queue.features.clone()
    storage, sent = queue.features.data_ptr(), 0
    for batch in batches:
        queue.enqueue(rows(sent, batch))
        sent += batch
    assert queue.features.data_ptr() == storage  # in place: no copy of the queue
    assert queue.pointer == sent % 10
    for i in range(max(sent, 10)):
        value = queue.features[i % 10]
        newest = sent - 1 - (sent - 1 - i) % 10 if sent else -1
        if newest >= 0 and newest % 10 == i % 10:
            assert (value == newest).all()
        elif sent < 10:
            assert torch.equal(value, old[i % 10])


def test_starts_with_random_unit_rows() -> None:
    queue = fastcl.FeatureQueue(7, 50)
    assert_close(queue.features.norm(dim=1), torch.ones(50), 1e-6)
    assert queue.features.std(0).min() > 0.1


@pytest.mark.parametrize("keys", [torch.zeros(3, 5), torch.zeros(3), torch.zeros(3, 2).long(), torch.zeros(3, 2) + 0j])
def test_bad_keys_change_nothing(keys: torch.Tensor) -> None:
    queue = fastcl.FeatureQueue(2, 10)
    before = queue.features.clone()
    with pytest.raises((TypeError, ValueError), match=r"^got "):
        queue.enqueue(keys)
    assert torch.equal(queue.features, before)
    assert queue.pointer == 0


def test_state_round_trips_and_moco_checkpoints_load() -> None:
    queue = fastcl.FeatureQueue(2, 10)
    queue.enqueue(rows(0, 13))
    other = fastcl.FeatureQueue(2, 10)
    other.load_state_dict(queue.state_dict())
    assert torch.equal(other.features, queue.features)
    assert other.pointer == 3

    class MoCo(torch.nn.Module):
        """The buffers of MoCo's released code: (dim, K) and a pointer of one element."""

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("queue", torch.randn(2, 10))
            self.register_buffer("queue_ptr", torch.tensor([4]))

    moco = MoCo()
    other.load_state_dict(moco.state_dict())
    assert torch.equal(other.features, moco.queue.T)
    assert other.pointer == 4


def test_moco_loss_is_info_nce_over_the_queue() -> None:
    torch.manual_seed(0)
    loss = fastcl.MoCoLoss(5, queue_size=12, temperature=0.2)
    before = loss.queue.features.clone()
    query, key = torch.randn(4, 5, requires_grad=True), torch.randn(4, 5, requires_grad=True)
    value = loss(query, key)
    want = reference.info_nce(l2_normalize(query), l2_normalize(key), before, temperature=0.2)
    assert_close(value, want, 1e-6)
    assert torch.equal(loss.queue.features[:4], l2_normalize(key))
    assert torch.equal(loss.queue.features[4:], before[4:])
    loss.eval()
    loss(query, key)
    assert loss.queue.pointer == 4


def test_two_losses_before_one_backward() -> None:
    """The queue moves on between a forward and its backward; the gradient is still that of the forward."""
    torch.manual_seed(0)
    loss = fastcl.MoCoLoss(5, queue_size=8, temperature=0.2)
    q1, q2, k1, k2 = (torch.randn(4, 5, requires_grad=True) for _ in range(4))
    queue = loss.queue.features.clone()
    (loss(q1, k2) + loss(q2, k1)).backward()
    after_first = torch.cat([l2_normalize(k2.detach()), queue[4:]])
    for q, k, negatives in ((q1, k2, queue), (q2, k1, after_first)):
        leaf = q.detach().requires_grad_()
        want = reference.info_nce(l2_normalize(leaf), l2_normalize(k.detach()), negatives, temperature=0.2)
        assert_close(q.grad, torch.autograd.grad(want, leaf)[0], 1e-5)
    assert k1.grad is None
    assert k2.grad is None


def test_compiles_as_one_graph() -> None:
    torch.manual_seed(0)
    loss = fastcl.MoCoLoss(5, queue_size=8)
    other = fastcl.MoCoLoss(5, queue_size=8)
    other.load_state_dict(loss.state_dict())
    torch._dynamo.reset()
    compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
    for _ in range(3):
        q, k = torch.randn(3, 5, requires_grad=True), torch.randn(3, 5)
        (got,), (want,) = (torch.autograd.grad(f(q, k), q) for f in (compiled, loss))
        assert_close(got, want, 1e-5)
    assert_close(other.queue.features, loss.queue.features, 1e-6)
    assert other.queue.pointer == loss.queue.pointer == 1
