"""What a step of every method does to which tensors."""

import copy
import math
import warnings

import pytest
import torch
from torch.nn.functional import cross_entropy

from fastcl import functional, reference
from fastcl.trainer import TrainConfig
from fastcl.trainer.config import MULTI_CROP
from fastcl.trainer.data import load_data
from fastcl.trainer.loop import _step, build_method
from fastcl.trainer.method import Method
from fastcl.trainer.methods import BYOL, METHODS, MoCo, MoCoV3, SimSiam
from fastcl.trainer.models import build_encoder
from fastcl.trainer.text import tokens
from tests.oracle import assert_close

CPU = torch.device("cpu")
LABELS = torch.arange(16) % 5


def build(**settings: object) -> Method:
    config = TrainConfig(batch_size=16, **settings).resolved()  # type: ignore[arg-type]
    return build_method(config, load_data(config))


def views(method: str = "simclr") -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    one, other = torch.rand(2, 16, 1, 8, 8, generator=generator)
    return one, (tokens([f"image {i}" * (1 + i % 3) for i in range(16)], 64) if method == "clip" else other)


def optimizer(method: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=0.1)


@pytest.mark.parametrize("name", METHODS)
def test_a_step_cut_at_the_embeddings_is_the_step_of_one_backward(name: str) -> None:
    cut, whole = build(method=name), build(method=name)
    loss, seconds = _step(cut, optimizer(cut), views(name), LABELS, CPU)
    sgd = optimizer(whole)
    whole.begin_step()
    expected = whole.objective(LABELS, *whole(*views(name)))
    expected.backward()
    sgd.step()
    assert loss == expected.item() and seconds > 0
    for (key, a), b in zip(cut.state_dict().items(), whole.state_dict().values(), strict=True):
        assert torch.equal(a, b), key
    start = build(method=name)
    assert not torch.equal(cut.encoder[0].weight, start.encoder[0].weight)


def same_state(cut: Method, whole: Method) -> None:
    for (key, a), b in zip(cut.state_dict().items(), whole.state_dict().values(), strict=True):
        if a.is_floating_point():
            assert_close(a, b, 1e-5, what=key)
        else:
            assert torch.equal(a, b), key


@pytest.mark.parametrize("name", METHODS)
def test_a_step_in_chunks_is_the_step_of_their_embeddings(name: str) -> None:
    cut, whole = build(method=name), build(method=name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # BatchNorm sees chunks
        loss, _ = _step(cut, optimizer(cut), views(name), LABELS, CPU, chunk=3)
    sgd = optimizer(whole)
    whole.begin_step()
    parts = [whole(*part) for part in zip(*(view.split(3) for view in views(name)), strict=True)]
    expected = whole.objective(LABELS, *(torch.cat(columns) for columns in zip(*parts, strict=True)))
    expected.backward()
    sgd.step()
    assert loss == expected.item()
    same_state(cut, whole)
    assert not torch.equal(cut.encoder[0].weight, build(method=name).encoder[0].weight)


@pytest.mark.parametrize("chunk", [None, 3])
@pytest.mark.parametrize("name", METHODS)
def test_micro_batches_add_their_gradients(name: str, chunk: int | None) -> None:
    cut, whole = build(method=name), build(method=name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # BatchNorm sees chunks
        loss, seconds = _step(cut, optimizer(cut), views(name), LABELS, CPU, chunk=chunk, accumulate=2)
        whole.begin_step()
        losses = []
        for half in (slice(None, 8), slice(8, None)):
            one, other = views(name)
            embeddings = whole(one[half], other[half]) if chunk is None else None
            if embeddings is None:
                parts = [whole(*part) for part in zip(one[half].split(3), other[half].split(3), strict=True)]
                embeddings = tuple(torch.cat(columns) for columns in zip(*parts, strict=True))
            losses.append(whole.objective(LABELS[half], *embeddings))
    sgd = optimizer(whole)
    ((losses[0] + losses[1]) / 2).backward()
    sgd.step()
    assert loss == pytest.approx((losses[0].item() + losses[1].item()) / 2, rel=1e-6) and seconds > 0
    same_state(cut, whole)
    assert not torch.equal(cut.encoder[0].weight, build(method=name).encoder[0].weight)


@pytest.mark.parametrize("chunk", [None, 8])
@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
@pytest.mark.parametrize("name", METHODS)
def test_a_step_in_16_bits_is_nearly_the_step_in_32(
    name: str, precision: str, dtype: torch.dtype, chunk: int | None
) -> None:
    low, high = build(method=name), build(method=name)
    digits = load_data(TrainConfig()).train.read(torch.arange(16))
    images = digits, views(name)[1] if name == "clip" else digits.roll(1, 3)
    seen = []
    low.encoder.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    low.head.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=precision == "fp16")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # BatchNorm sees chunks
        loss, _ = _step(low, optimizer(low), images, LABELS, CPU, chunk, 1, precision, scaler)
        expected, _ = _step(high, optimizer(high), images, LABELS, CPU, chunk)
    assert set(seen) == {dtype}
    assert loss == pytest.approx(expected, rel=2e-2, abs=4e-3)
    start = build(method=name).encoder[0].weight
    moved, wanted = low.encoder[0].weight - start, high.encoder[0].weight - start
    assert low.encoder[0].weight.dtype == torch.float32
    # bf16 keeps 8 bits, and what is mined or normalised over 16 images magnifies them: up to 0.36 is seen. No gradient
    # would be 1 off, one that was not unscaled 1023.
    assert 0 < (moved - wanted).norm() < 0.5 * wanted.norm()


@pytest.mark.parametrize("name", METHODS)
def test_the_fused_loss_is_the_dense_one(name: str) -> None:
    method = build(method=name, queue_size=50)
    with torch.no_grad():
        embeddings = method(*views(name))
        # the reference multiplies a queue of fp32 keys as it is
        wide = [e if name == "moco" else e.double() for e in embeddings]
        dense = method.formula(reference, LABELS, *wide)
        fused = method.formula(functional, LABELS, *embeddings)
        assert method.objective(LABELS, *embeddings).item() == pytest.approx(fused.item(), rel=1e-6)
    assert fused.item() == pytest.approx(dense.item(), rel=1e-5)


@pytest.mark.parametrize("name", ["byol", "moco-v3", "simsiam"])
def test_targets_receive_no_gradient(name: str) -> None:
    method = build(method=name)
    embeddings = method(*views())
    assert [e.requires_grad for e in embeddings] == [True, True, False, False]
    method.objective(LABELS, *embeddings).backward()
    trained = {n for n, p in method.named_parameters() if p.grad is not None and p.grad.any()}
    assert any(n.startswith("predictor") for n in trained) and any(n.startswith("encoder") for n in trained)
    assert not any(n.startswith("target") for n in trained)


def test_the_target_of_byol_follows() -> None:
    byol = build(method="byol", momentum=0.75)
    assert isinstance(byol, BYOL)
    with torch.no_grad():
        for fast in (*byol.encoder.parameters(), *byol.head.parameters()):
            fast.add_(1)
    start = [p.clone() for p in (*byol.target_encoder.parameters(), *byol.target_head.parameters())]
    byol.begin_step()
    for slow, before in zip((*byol.target_encoder.parameters(), *byol.target_head.parameters()), start, strict=True):
        torch.testing.assert_close(slow, before + 0.25)


def test_the_target_of_simsiam_is_the_other_view() -> None:
    method = build(method="simsiam")
    assert isinstance(method, SimSiam)
    p0, p1, z0, z1 = (torch.nn.functional.normalize(e.double(), dim=1) for e in method(*views()))
    want = -((p0 * z1).sum(1).mean() + (p1 * z0).sum(1).mean()) / 2
    assert method.objective(LABELS, p0, p1, z0, z1).item() == pytest.approx(want.item(), rel=1e-12)


def local_crops(count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.rand(16, 1, 5, 5, generator=generator) for _ in range(count)]


@pytest.mark.parametrize("name", MULTI_CROP)
def test_local_crops_join_the_views(name: str) -> None:
    method, crops = build(method=name), local_crops(3)
    embeddings = method(*views(), *crops)
    assert [e.shape for e in embeddings] == [(16, 64)] * (7 if name in ("byol", "simsiam") else 5)
    loss = method.objective(LABELS, *embeddings)
    assert loss.item() == pytest.approx(method.formula(functional, LABELS, *embeddings).item(), rel=1e-6)
    dense = method.formula(reference, LABELS, *(e.double() for e in embeddings))
    assert loss.item() == pytest.approx(dense.item(), rel=1e-5)
    order = [*embeddings[:2], embeddings[4], embeddings[3], embeddings[2], *embeddings[5:]]
    assert method.objective(LABELS, *order).item() == pytest.approx(loss.item(), rel=1e-5)  # no crop is above another
    for crop in embeddings[2:5]:
        (slope,) = torch.autograd.grad(loss, crop, retain_graph=True)
        assert slope.any()


def test_local_crops_look_for_both_targets_and_are_none() -> None:
    """SimSiam with two crops by hand, and BYOL, which sees squared distances."""
    for name, distance in (("simsiam", lambda p, z: -(p * z).sum(1).mean() / 2), ("byol", squared)):
        method = build(method=name)
        p0, p1, p2, p3, z0, z1 = (
            torch.nn.functional.normalize(e.double(), dim=1) for e in method(*views(), *local_crops(2))
        )
        want = sum(distance(p, z1) for p in (p0, p2, p3)) / 3 + sum(distance(p, z0) for p in (p1, p2, p3)) / 3
        assert method.objective(LABELS, p0, p1, p2, p3, z0, z1).item() == pytest.approx(want.item(), rel=1e-12)


def squared(p: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    return (p - z).square().sum(1).mean()


def test_batchnorm_sees_one_size_of_views_at_a_time() -> None:
    """So a small view changes nothing of what the encoder makes of the others."""
    method, seen = build(), []
    method.encoder.register_forward_hook(lambda module, inputs, output: seen.append(output))
    method(*views(), *local_crops(2))
    assert [features.shape for features in seen] == [(32, 128), (32, 128)]
    method(*views())
    assert torch.equal(seen[0], seen[2])


def test_moco_v3_is_algorithm_1_of_the_paper() -> None:
    method = build(method="moco-v3", temperature=0.3)
    assert isinstance(method, MoCoV3)
    q0, q1, k0, k1 = (torch.nn.functional.normalize(e.detach().double(), dim=1) for e in method(*views()))
    diagonal = torch.arange(16)
    want = 2 * 0.3 * (cross_entropy(q0 @ k1.T / 0.3, diagonal) + cross_entropy(q1 @ k0.T / 0.3, diagonal))
    assert method.objective(LABELS, q0, q1, k0, k1).item() == pytest.approx(want.item(), rel=1e-12)


def test_the_projection_of_moco_v3_ends_with_batch_norm_and_its_predictor_does_not() -> None:
    method = build(method="moco-v3", dim=32, hidden=48)
    for head in (method.head, method.target_head):
        kinds = [type(layer).__name__ for layer in head]
        assert kinds == ["Linear", "BatchNorm1d", "ReLU", "Linear", "BatchNorm1d"]
        assert head[0].weight.shape == (48, 128) and head[3].weight.shape == (32, 48) and head[4].weight is None
    assert [type(layer).__name__ for layer in method.predictor] == ["Linear", "BatchNorm1d", "ReLU", "Linear"]
    z = method.head(method.encoder(views()[0]))
    torch.testing.assert_close(z.mean(0), torch.zeros(32), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["simclr", "moco", "supcon", "siamese", "triplet"])
def test_a_linear_head_is_that_of_moco_v1(name: str) -> None:
    method = build(method=name, head="linear", dim=24)
    assert isinstance(method.head, torch.nn.Linear) and method.head.weight.shape == (24, 128)
    assert [e.shape for e in method(*views())] == [(16, 24), (16, 24)]
    before = method.head.weight.clone()
    _step(method, optimizer(method), views(), LABELS, CPU)
    assert not torch.equal(method.head.weight, before)


@pytest.mark.parametrize("name", sorted(METHODS.keys() - {"clip"}))  # which has no hidden layer
def test_heads_are_as_wide_as_asked(name: str) -> None:
    method = build(method=name, dim=24, hidden=40)
    assert {e.shape for e in method(*views())} == {(16, 24)}
    assert method.head[0].out_features == 40
    narrow = build(method=name)
    assert {e.shape for e in narrow(*views())} == {(16, 64)} and narrow.head[0].out_features == 128


def test_siamese_pairs_are_views_of_one_image_and_of_neighbours() -> None:
    method = build(method="siamese", margin=0.7)
    z0, z1 = (torch.nn.functional.normalize(e.detach().double(), dim=1) for e in method(*views()))
    want = 0.0
    for i in range(16):
        want += 0.5 * (z0[i] - z1[i]).norm().item() ** 2
        want += 0.5 * max(0.0, 0.7 - (z0[i] - z1[i - 1]).norm().item()) ** 2
    assert method.objective(LABELS, z0, z1).item() == pytest.approx(want / 32, rel=1e-12)


def test_a_triplet_is_two_views_and_the_nearest_view_beyond() -> None:
    method = build(method="triplet", margin=0.4)
    z = torch.nn.functional.normalize(torch.randn(32, 5, dtype=torch.float64), dim=1)
    want = 0.0
    for i in range(32):
        positive = (z[i] - z[(i + 16) % 32]).square().sum().item()
        others = [(z[i] - z[j]).square().sum().item() for j in range(32) if j % 16 != i % 16]
        beyond = [d for d in others if d >= positive]
        want += max(0.0, positive - (min(beyond) if beyond else max(others)) + 0.4)
    assert method.objective(LABELS, *z.chunk(2)).item() == pytest.approx(want / 32, rel=1e-12)


def test_margins_have_the_defaults_of_their_losses() -> None:
    assert (build(method="siamese").loss.margin, build(method="triplet").loss.margin) == (1.0, 0.2)
    assert build(method="triplet", margin=0.0).loss.margin == 0


def test_a_resnet_for_small_images_keeps_their_size() -> None:
    pytest.importorskip("torchvision")
    images = torch.zeros(2, 1, 32, 32)
    for stem, size, kernel in (("cifar", 32, 3), ("imagenet", 8, 7)):
        encoder, features = build_encoder("resnet18", 1, 32, stem)
        begun = encoder.maxpool(encoder.conv1(images))
        assert begun.shape == (2, 64, size, size) and encoder.conv1.kernel_size == (kernel, kernel)
        assert encoder(images).shape == (2, features)


def test_moco_keys_are_an_exponential_moving_average_without_gradient() -> None:
    moco = build(method="moco", queue_size=50, momentum=0.9)
    assert isinstance(moco, MoCo)
    sgd = optimizer(moco)
    expected = copy.deepcopy(list(moco.encoder.parameters()) + list(moco.head.parameters()))
    for _ in range(3):
        with torch.no_grad():
            for slow, fast in zip(expected, [*moco.encoder.parameters(), *moco.head.parameters()], strict=True):
                slow.copy_(0.9 * slow + 0.1 * fast)
        _step(moco, sgd, views(), LABELS, CPU)
    keys = [*moco.key_encoder.parameters(), *moco.key_head.parameters()]
    for slow, key, query in zip(expected, keys, [*moco.encoder.parameters(), *moco.head.parameters()], strict=True):
        assert_close(key, slow, 1e-6)
        assert key.grad is None and not key.requires_grad and query.grad is not None
    assert not torch.equal(moco.key_encoder[0].weight, moco.encoder[0].weight)
    assert all(p.grad is None for p in keys)


def test_moco_queues_the_keys_of_each_step() -> None:
    moco = build(method="moco", queue_size=50)
    assert isinstance(moco, MoCo)
    before = moco.loss.queue.features.clone()
    _step(moco, optimizer(moco), views(), LABELS, CPU)
    with torch.no_grad():
        keys = moco.key_head(moco.key_encoder(views()[1]))
    torch.testing.assert_close(moco.loss.queue.features[:16], torch.nn.functional.normalize(keys))
    assert torch.equal(moco.loss.queue.features[16:], before[16:])


def test_simclr_starts_near_the_loss_of_embeddings_that_tell_nothing() -> None:
    simclr = build()
    with torch.no_grad():
        same = torch.ones(16, 64)
        assert simclr.loss(same, same).item() == pytest.approx(math.log(31), rel=1e-6)
