"""Views: shapes, range, determinism, and the geometry that the affine map promises."""

import pytest
import torch

from fastcl.trainer.augment import DIGITS, GREY, RGB, Augmentation

STILL = Augmentation(area=(1.0, 1.0), aspect=1.0, contrast=0.0, brightness=0.0)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(("augmentation", "channels"), [(DIGITS, 1), (GREY, 1), (RGB, 3)])
def test_views_keep_shape_and_range_and_follow_the_generator(augmentation: Augmentation, channels: int) -> None:
    images = torch.rand(20, channels, 12, 12, generator=generator())
    views = augmentation.two_views(images, generator(1))
    for view in views:
        assert view.shape == images.shape and view.min() >= 0 and view.max() <= 1
    again, other = augmentation.two_views(images, generator(1)), augmentation.two_views(images, generator(2))
    assert all(torch.equal(a, b) for a, b in zip(views, again, strict=True))
    assert not torch.equal(views[0], other[0]) and not torch.equal(views[0], views[1])
    assert (views[0] != images).flatten(1).any(1).all()


def test_each_image_gets_a_view_of_its_own() -> None:
    views, _ = DIGITS.two_views(torch.rand(1, 1, 8, 8, generator=generator()).expand(10, 1, 8, 8), generator(1))
    assert len({tuple(view.flatten().tolist()) for view in views}) == 10


def test_nothing_allowed_changes_nothing() -> None:
    images = torch.rand(5, 3, 9, 9, generator=generator())
    torch.testing.assert_close(STILL.two_views(images, generator(1))[0], images, atol=1e-5, rtol=0)


def test_a_certain_flip_mirrors() -> None:
    images = torch.rand(5, 1, 8, 8, generator=generator())
    flipped, _ = Augmentation(area=(1.0, 1.0), aspect=1.0, contrast=0.0, brightness=0.0, flip=1.0).two_views(
        images, generator(1)
    )
    torch.testing.assert_close(flipped, images.flip(3), atol=1e-5, rtol=0)


def test_a_rotation_is_at_most_the_degrees_and_keeps_the_middle() -> None:
    images = torch.zeros(200, 1, 33, 33)
    images[:, 0, 15:18, 16:] = 1  # a hand that points right from the middle
    turned, _ = Augmentation(area=(1.0, 1.0), aspect=1.0, degrees=20, contrast=0.0, brightness=0.0).two_views(
        images, generator(1)
    )
    assert (turned[:, 0, 16, 16] > 0.9).all()
    rows, columns = torch.meshgrid(torch.arange(33.0) - 16, torch.arange(33.0) - 16, indexing="ij")
    angle = torch.atan2((turned[:, 0] * rows).sum((1, 2)), (turned[:, 0] * columns).sum((1, 2))).rad2deg()
    assert angle.abs().max() < 21 and angle.min() < -15 and angle.max() > 15


def test_a_crop_shows_the_share_of_the_image_that_was_asked_for() -> None:
    ramp = torch.linspace(0, 1, 32).expand(300, 1, 32, 32)
    crop, _ = Augmentation(area=(0.25, 0.25), aspect=1.0, contrast=0.0, brightness=0.0).two_views(ramp, generator(1))
    inside = crop[:, 0, 4:28]  # away from the edge, where a view blends with what is outside
    span = inside[..., 27] - inside[..., 4]
    torch.testing.assert_close(span, torch.full_like(span, 0.5 * 23 / 31), atol=1e-4, rtol=0)
    assert crop.mean((1, 2, 3)).min() < 0.3 and crop.mean((1, 2, 3)).max() > 0.7


def test_grey_removes_colour_and_only_colour() -> None:
    images = torch.rand(5, 3, 8, 8, generator=generator())
    grey, _ = Augmentation(area=(1.0, 1.0), aspect=1.0, contrast=0.0, brightness=0.0, grey=1.0).two_views(
        images, generator(1)
    )
    torch.testing.assert_close(grey, images.mean(1, keepdim=True).expand_as(images), atol=1e-5, rtol=0)


def test_a_rotation_turns_all_directions_alike() -> None:
    right, down = torch.zeros(50, 1, 33, 33), torch.zeros(50, 1, 33, 33)
    right[:, 0, 15:18, 16:] = down[:, 0, 16:, 15:18] = 1
    turn = Augmentation(area=(1.0, 1.0), aspect=1.0, degrees=20, contrast=0.0, brightness=0.0)
    turned_right, turned_down = (turn.two_views(hand, generator(1))[0] for hand in (right, down))
    # a quarter turn of one is the other, so it stays so: columns become rows, rows become columns backwards
    torch.testing.assert_close(turned_right.rot90(-1, (2, 3)), turned_down, atol=1e-4, rtol=0)
