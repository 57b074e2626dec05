"""Views: shapes, range, determinism, and the geometry that the affine map promises."""

from typing import Any

import pytest
import torch
from torch import Tensor

from fastcl.trainer.augment import DIGITS, GREY, RGB, Augmentation, _splitmix64, uniform

STILL = Augmentation(area=(1.0, 1.0), aspect=1.0, contrast=0.0, brightness=0.0)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def views_of(augmentation: Augmentation, images: Tensor, seed: int = 1, **options: Any) -> tuple[Tensor, ...]:
    return augmentation.views(images, torch.arange(len(images)), (seed,), **options)


@pytest.mark.parametrize(("augmentation", "channels"), [(DIGITS, 1), (GREY, 1), (RGB, 3)])
def test_views_keep_shape_and_range_and_follow_the_key(augmentation: Augmentation, channels: int) -> None:
    images = torch.rand(20, channels, 12, 12, generator=generator())
    views = views_of(augmentation, images)
    for view in views:
        assert view.shape == images.shape and view.min() >= 0 and view.max() <= 1
    again, other = views_of(augmentation, images), views_of(augmentation, images, 2)
    assert all(torch.equal(a, b) for a, b in zip(views, again, strict=True))
    assert not torch.equal(views[0], other[0]) and not torch.equal(views[0], views[1])
    assert (views[0] != images).flatten(1).any(1).all()


def test_each_image_gets_a_view_of_its_own() -> None:
    views = views_of(DIGITS, torch.rand(1, 1, 8, 8, generator=generator()).expand(10, 1, 8, 8))[0]
    assert len({tuple(view.flatten().tolist()) for view in views}) == 10


def test_an_image_has_the_same_views_in_every_batch() -> None:
    images, at = torch.rand(30, 3, 12, 12, generator=generator()), torch.arange(30) * 1_000_003
    options = {"local_crops": 2, "local_size": 5}
    whole = RGB.views(images, at, ("views", 0, 3), **options)
    order = torch.randperm(30, generator=generator())[:7]
    for part, all_of_them in zip(RGB.views(images[order], at[order], ("views", 0, 3), **options), whole, strict=True):
        assert torch.equal(part, all_of_them[order])


def test_local_crops_are_small_and_show_less() -> None:
    ramp = torch.linspace(0, 1, 35).expand(300, 1, 35, 35)
    *views, small, other = views_of(Augmentation(area=(0.5, 1.0), contrast=0.0, brightness=0.0), ramp, local_crops=2)
    assert [v.shape for v in (*views, small)] == [ramp.shape, ramp.shape, (300, 1, 15, 15)]  # 96 of 224 is 15 of 35
    assert not torch.equal(small, other)
    span = (small[..., 1:-1].mean(2).diff().mean(-1) * 15)[:, 0] * 34 / 35  # share of the width that a crop shows
    area = span.square()  # of a square crop; the aspect, 3/4 to 4/3, is apart
    assert area.min() > 5 / 14 / 2 * 3 / 4 and area.max() < 0.5 * 4 / 3 and 0.25 < area.mean() < 0.45
    assert views_of(GREY, ramp, local_crops=1, local_size=9)[2].shape == (300, 1, 9, 9)


def test_the_random_numbers_are_splitmix64() -> None:
    """Of the generator with seed 1234567, as Rosetta Code lists them."""
    listed = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]
    assert [z % 2**64 for z in _splitmix64(1234567, torch.arange(5)).tolist()] == listed


def test_uniform_numbers_fill_the_interval_and_depend_on_key_and_index_alone() -> None:
    at = torch.arange(5000)
    draws = uniform(("a", 1), at, 7)
    assert draws.shape == (5000, 7) and draws.dtype == torch.float32
    assert draws.min() >= 0 and draws.max() < 1 and len(draws.unique()) > 34_900  # of 35,000 among 2^24
    shares = torch.histc(draws, 10, 0, 1) / draws.numel()
    assert (shares - 0.1).abs().max() < 0.01  # six standard deviations
    assert torch.corrcoef(draws.T).fill_diagonal_(0).abs().max() < 0.1
    assert torch.equal(uniform(("a", 1), at[[7, 3]], 7), draws[[7, 3]])
    assert not torch.equal(uniform(("a", 2), at, 7), draws)


def test_nothing_allowed_changes_nothing() -> None:
    images = torch.rand(5, 3, 9, 9, generator=generator())
    torch.testing.assert_close(views_of(STILL, images)[0], images, atol=1e-5, rtol=0)


def test_a_certain_flip_mirrors() -> None:
    images = torch.rand(5, 1, 8, 8, generator=generator())
    flipped = views_of(Augmentation(area=(1.0, 1.0), aspect=1.0, contrast=0.0, brightness=0.0, flip=1.0), images)[0]
    torch.testing.assert_close(flipped, images.flip(3), atol=1e-5, rtol=0)


def test_a_rotation_is_at_most_the_degrees_and_keeps_the_middle() -> None:
    images = torch.zeros(200, 1, 33, 33)
    images[:, 0, 15:18, 16:] = 1  # a hand that points right from the middle
    turned = views_of(Augmentation(area=(1.0, 1.0), aspect=1.0, degrees=20, contrast=0.0, brightness=0.0), images)[0]
    assert (turned[:, 0, 16, 16] > 0.9).all()
    rows, columns = torch.meshgrid(torch.arange(33.0) - 16, torch.arange(33.0) - 16, indexing="ij")
    angle = torch.atan2((turned[:, 0] * rows).sum((1, 2)), (turned[:, 0] * columns).sum((1, 2))).rad2deg()
    assert angle.abs().max() < 21 and angle.min() < -15 and angle.max() > 15


def test_a_crop_shows_the_share_of_the_image_that_was_asked_for() -> None:
    ramp = torch.linspace(0, 1, 32).expand(300, 1, 32, 32)
    crop = views_of(Augmentation(area=(0.25, 0.25), aspect=1.0, contrast=0.0, brightness=0.0), ramp)[0]
    inside = crop[:, 0, 4:28]  # away from the edge, where a view blends with what is outside
    span = inside[..., 27] - inside[..., 4]
    torch.testing.assert_close(span, torch.full_like(span, 0.5 * 23 / 31), atol=1e-4, rtol=0)
    assert crop.mean((1, 2, 3)).min() < 0.3 and crop.mean((1, 2, 3)).max() > 0.7


def test_grey_removes_colour_and_only_colour() -> None:
    images = torch.rand(5, 3, 8, 8, generator=generator())
    grey = views_of(Augmentation(area=(1.0, 1.0), aspect=1.0, contrast=0.0, brightness=0.0, grey=1.0), images)[0]
    torch.testing.assert_close(grey, images.mean(1, keepdim=True).expand_as(images), atol=1e-5, rtol=0)


def test_a_rotation_turns_all_directions_alike() -> None:
    right, down = torch.zeros(50, 1, 33, 33), torch.zeros(50, 1, 33, 33)
    right[:, 0, 15:18, 16:] = down[:, 0, 16:, 15:18] = 1
    turn = Augmentation(area=(1.0, 1.0), aspect=1.0, degrees=20, contrast=0.0, brightness=0.0)
    turned_right, turned_down = (views_of(turn, hand)[0] for hand in (right, down))
    # a quarter turn of one is the other, so it stays so: columns become rows, rows become columns backwards
    torch.testing.assert_close(turned_right.rot90(-1, (2, 3)), turned_down, atol=1e-4, rtol=0)
