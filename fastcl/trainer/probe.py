"""How much a linear or nearest-neighbour reader finds in frozen features, on images that nothing was trained on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, cross_entropy

from ..pairwise import l2_normalize, pair_topk
from .data import Data
from .errors import MissingData
from .models import encode

DRAWS = 10  # of the labelled images, for the few-label probes
NEIGHBOURS = 20  # that vote in a run's kNN column: fewer than the 200 of ImageNet, as its data sets are smaller
_LIMIT = 20_000  # images of each half, at most, that the probes look at; evenly spaced over the classes
_RAW_SIDE = 32  # larger images are averaged down to this before their pixels serve as features


@dataclass(frozen=True)
class Features:
    """Frozen features ``(N, F)`` and labels ``(N,)`` of training and test images."""

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor


class Prober:
    """The probes of one data set: the same images and the same draws of labels for every encoder.

    Where no image has a label there is nothing to find, and no figure.

    Args:
        data: its labelled images, or all where none is.
        generator: of the draws.
        everything: look at all images, not at 20,000 of each half.

    Raises:
        MissingData: one half alone has labelled images, or a class has fewer than 10 for training.

    Attributes:
        labelled: whether there are labels.
    """

    def __init__(self, data: Data, generator: torch.Generator, *, everything: bool = False) -> None:
        self.data = data
        self.train_at, self.test_at = (_spread(half.labels, everything) for half in (data.train, data.test))
        in_train, in_test = (bool((half.labels >= 0).any()) for half in (data.train, data.test))
        if in_train != in_test:
            raise MissingData(
                f"got labels of {'training' if in_train else 'test'} images alone; expected some of both, for the "
                "probes, or none. Label images of each class."
            )
        self.labelled = in_train
        self.few = (
            {}
            if not self.labelled
            else {k: few_label_draws(data.train.labels[self.train_at], k, generator) for k in (10, 1)}
        )

    def features(self, encoder: nn.Module | None, device: torch.device) -> Features:
        """Features by an encoder, or raw pixels where it is None."""
        encoder = encoder or _RawPixels()
        return Features(
            encode(encoder, self.data.train, self.train_at, device),
            self.data.train.labels[self.train_at],
            encode(encoder, self.data.test, self.test_at, device),
            self.data.test.labels[self.test_at],
        )

    def monitor(self, encoder: nn.Module, device: torch.device) -> dict[str, float]:
        """The two that are followed during training, in percent."""
        if not self.labelled:
            return {}
        features = self.features(encoder, device)
        return {"knn": knn(features, neighbours=NEIGHBOURS), "few10": few_label_probe(features, self.few[10])["mean"]}

    def all(self, features: Features) -> dict[str, Any]:
        """Every probe, in percent."""
        if not self.labelled:
            return {}
        return {
            "knn": knn(features, neighbours=NEIGHBOURS),
            "linear": linear_probe(features),
            "few10": few_label_probe(features, self.few[10]),
            "few1": few_label_probe(features, self.few[1]),
        }


def knn(features: Features, *, neighbours: int = 200, temperature: float = 0.07) -> float:
    """Accuracy in percent of a vote among the nearest training images by cosine, weighted by exp(cosine / temperature).

    Wu et al. 2018, arXiv:1805.01978, section 3.4. There is no matrix of test by training images, only the neighbours.

    Args:
        features: of any length; the cosine does not see it.
        neighbours: that vote; all training images where there are fewer.
        temperature: above 0. The lower, the more the nearest decides.

    Raises:
        ValueError: fewer than 1 neighbour.
    """
    labels, classes = features.train_labels, int(features.train_labels.max()) + 1
    cosine, nearest = pair_topk(
        l2_normalize(features.test), l2_normalize(features.train), topk=min(neighbours, len(labels))
    )
    weights = ((cosine - cosine[:, :1]) / temperature).exp()  # of the nearest: 1, so that none overflows
    votes = torch.zeros(len(cosine), classes).scatter_add_(1, labels[nearest], weights)
    return _percent(votes.argmax(1) == features.test_labels)


def linear_probe(features: Features) -> float:
    """Accuracy in percent of logistic regression on all labels."""
    everything = torch.arange(len(features.train))[None]
    return _logistic_regression(features, everything).item()


def few_label_probe(features: Features, draws: Tensor) -> dict[str, float]:
    """Mean and standard deviation over draws ``(draws, labelled images)`` of the accuracy in percent."""
    accuracy = _logistic_regression(features, draws)
    return {"mean": accuracy.mean().item(), "std": accuracy.std().item()}


def few_label_draws(labels: Tensor, per_class: int, generator: torch.Generator) -> Tensor:
    """Indices ``(DRAWS, classes * per_class)`` of random training images, ``per_class`` of every class."""
    members = [(labels == c).nonzero().squeeze(1) for c in labels.unique()]
    fewest = min((len(m) for m in members), default=0)  # captions alone are no labels
    if fewest < per_class:
        raise MissingData(
            f"got a class with {fewest} labelled training images; expected at least {per_class}, for the probe with "
            f"{per_class} labels per class. Add images to it."
        )
    return torch.stack(
        [torch.cat([m[torch.randperm(len(m), generator=generator)[:per_class]] for m in members]) for _ in range(DRAWS)]
    )


def _logistic_regression(features: Features, draws: Tensor, penalty: float = 0.1) -> Tensor:
    """Test accuracies ``(R,)`` in percent of R classifiers, each trained on one row of ``draws`` ``(R, n)``.

    Features get length 1, as for the loss and for kNN, and are centred by the mean of the training images. Each
    classifier minimises summed cross-entropy + penalty / 2 * ||weights||^2 from zero; one L-BFGS minimises all.

    Random-init features depend on such choices more than raw pixels and trained ones do: they score higher where
    features are standardised one by one instead.
    """
    train, test = l2_normalize(features.train), l2_normalize(features.test)
    train, test = train - train.mean(0), test - train.mean(0)
    x, y = train[draws], features.train_labels[draws]
    classes = int(features.train_labels.max()) + 1
    weight = torch.zeros(len(draws), train.shape[1], classes, requires_grad=True)
    bias = torch.zeros(len(draws), 1, classes, requires_grad=True)
    solver = torch.optim.LBFGS([weight, bias], max_iter=100, line_search_fn="strong_wolfe")

    def objective() -> Tensor:
        solver.zero_grad()
        logits = torch.baddbmm(bias, x, weight)
        loss = cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="sum")
        loss = loss + penalty / 2 * weight.square().sum()
        loss.backward()
        return loss

    solver.step(objective)
    with torch.no_grad():
        predicted = torch.stack([(test @ w + b).argmax(1) for w, b in zip(weight, bias, strict=True)])
    return 100 * (predicted == features.test_labels).double().mean(1)


class _RawPixels(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        if max(images.shape[2:]) > _RAW_SIDE:
            images = adaptive_avg_pool2d(images, _RAW_SIDE)
        return images.flatten(1)


def _spread(labels: Tensor, everything: bool = False) -> Tensor:
    """Indices of at most ``_LIMIT`` labelled images, or of all, evenly spaced over the list sorted by class.

    Where none has a label, of all images.
    """
    labelled = ((labels >= 0) | (labels < 0).all()).nonzero().squeeze(1)
    by_class = labelled[labels[labelled].sort(stable=True).indices]
    count = len(by_class) if everything else min(len(by_class), _LIMIT)
    return by_class[torch.arange(count) * len(by_class) // max(count, 1)]


def _percent(right: Tensor) -> float:
    return 100 * right.double().mean().item()
