"""Every example of docs/examples runs, offline, and its metric rises by more than random training could give."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import fastcl
from benchmarks.examples import EXAMPLES, ROOT, load

# The figures of detection are losses of detectors and segmentation networks, which have no pairs to shuffle.
CONTRASTIVE = [example for example in EXAMPLES if example.stem != "detection"]
STEPS = {"recommender": 200, "detection": 10}
FEW = 60  # steps of the others

# What (first) has to be above what (second), and by how much. By chance it is 1 in 100 for the recommender, 1 in 768
# for sentences, 1 in 10 for digits, 1 in 11 for speech; margins are about half of the least rise of seeds 0 to 2.
RISES = {
    # A loss, which falls. The margins are about half of the least fall of seeds 0 to 2.
    "detection": [
        (f"{network}_before", f"{network}_after", margin)
        for network, margin in (("faster_rcnn", 0.6), ("mask_rcnn", 0.8), ("deeplabv3", 0.7), ("fcn", 0.7))
    ],
    "image_text": [("after", "before", 0.4)],
    # what is popular could be learned without looking at users
    "recommender": [("after", "before", 0.2), ("after", "most_popular", 0.06), ("after", "uncorrected", 0.1)],
    "sentences": [("after", "before", 0.3)],
    "speech": [("after", "before", 0.08), ("states_after", "states_before", 0.08)],
    "three_modalities": [("after", "before", 0.4), ("emergent", "before", 0.4)],
}
LOSSES = ["CLIPLoss", "InBatchSoftmaxLoss", "InfoNCELoss", "SampledInfoNCELoss"]


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_the_metric_of_an_example_rises(example: Path) -> None:
    figures = main_of(example)(steps=STEPS.get(example.stem, FEW))
    assert "before" in figures and "after" in figures
    for higher, lower, margin in RISES[example.stem]:
        assert figures[higher] > figures[lower] + margin, figures


@pytest.mark.parametrize("example", CONTRASTIVE, ids=lambda path: path.stem)
def test_with_shuffled_pairs_no_example_passes(example: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in LOSSES:
        loss = getattr(fastcl, name)
        monkeypatch.setattr(loss, "forward", shuffled(loss.forward))
    figures = main_of(example)(steps=STEPS.get(example.stem, FEW))
    assert any(figures[higher] <= figures[lower] + margin for higher, lower, margin in RISES[example.stem]), figures


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_says_what_it_shows_and_how_to_run_it(example: Path) -> None:
    module, page = load(example), (ROOT / "docs" / "examples.md").read_text()
    assert module.__doc__ and f"python docs/examples/{example.name}" in module.__doc__
    assert f"(examples/{example.name})" in page
    assert len(example.read_text().splitlines()) <= 120


def test_the_same_seed_gives_the_same_figures() -> None:
    main = main_of(ROOT / "docs" / "examples" / "image_text.py")
    assert main(steps=5, seed=1) == main(steps=5, seed=1) != main(steps=5, seed=2)


def shuffled(forward: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """The loss of queries that were given each other's keys."""
    return lambda self, query, *args, **options: forward(self, query[torch.randperm(len(query))], *args, **options)


def main_of(example: Path) -> Callable[..., dict[str, float]]:
    main: Callable[..., dict[str, float]] = load(example).main
    return main


@pytest.fixture(autouse=True)
def leave_the_generator_alone() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        yield
