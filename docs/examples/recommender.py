"""A two-tower recommender of items that differ a thousandfold in popularity, with and without the logQ correction.

A batch holds users and the items that they chose, so popular items are in it more often, also as negatives. Left
alone, the towers therefore learn how much *more than the average user* a user wants an item, log P(item | user) - log
Q(item), and recommend too few of the popular ones. ``InBatchSoftmaxLoss`` subtracts log Q(item) from the logits (Yi
et al. 2019, Q is the share of an item among the choices), and the towers learn log P(item | user): what the user will
choose. Which one to want is another question: of the choices that few make the uncorrected towers find more.

    python docs/examples/recommender.py

Metrics, of users that were never trained on: recall@10 of what they choose (``most_popular``: of the same ten items
for everybody; ``possible``: of the ten with the largest P), ``truth_*``, the share of those ten that is recommended,
and ``rare_*``, the recall of choices that are not among the hundred most popular items.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import fastcl
from fastcl.pairwise import l2_normalize, pair_topk

USERS, NEW_USERS, ITEMS, TASTE, FEATURES, DIM = 4000, 1000, 1000, 6, 16, 32
CHOICES = 20  # items per user
BATCH = 512


class World:
    """Users choose items by P(item | user), proportional to popularity (Zipf's law) times exp of <taste, item>."""

    def __init__(self) -> None:
        popularity = 1 / torch.arange(1.0, ITEMS + 1)
        taste = torch.randn(USERS + NEW_USERS, TASTE)
        items = torch.randn(ITEMS, TASTE)
        self.log_p = (taste @ items.T + popularity.log()).log_softmax(1)  # the truth, a matrix that no model sees
        self.choices = self.log_p.exp().multinomial(CHOICES, replacement=True)  # (users, CHOICES)
        # Of a user the model sees a mixture of tastes with noise, of an item only who it is.
        self.features = taste @ torch.randn(TASTE, FEATURES) + 0.3 * torch.randn(len(taste), FEATURES)


class TwoTowers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.user = nn.Sequential(nn.Linear(FEATURES, 128), nn.ReLU(), nn.Linear(128, DIM))
        self.item = nn.Embedding(ITEMS, DIM)

    def recommend(self, features: Tensor, topk: int = 10) -> Tensor:
        """The best items of every user, ``(B, topk)``, without a matrix of users times items."""
        return pair_topk(l2_normalize(self.user(features)), l2_normalize(self.item.weight), topk=topk)[1]


def train(world: World, towers: TwoTowers, steps: int, correct: bool) -> None:
    chosen = world.choices[:USERS]
    counts = torch.bincount(chosen.flatten(), minlength=ITEMS)
    log_q = (counts / counts.sum()).log() if correct else torch.zeros(ITEMS)
    loss = fastcl.InBatchSoftmaxLoss(temperature=0.1)
    optimizer = torch.optim.Adam(towers.parameters(), lr=3e-3)
    for _ in range(steps):
        user = torch.randint(USERS, (BATCH,))
        item = chosen[user, torch.randint(CHOICES, (BATCH,))]
        # ids: another user who chose the same item is not a negative
        value = loss(towers.user(world.features[user]), towers.item(item), log_q[item], ids=item)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()


def recall(wanted: Tensor, recommended: Tensor, counted: Tensor | None = None) -> float:
    """Which share of the items wanted ``(B, W)``, or of those that are counted, is recommended ``(B, 10)``."""
    found = (wanted[:, :, None] == recommended[:, None, :]).any(2)
    return (found if counted is None else found[counted]).float().mean().item()


def main(steps: int = 600, seed: int = 0) -> dict[str, float]:
    """Train twice, from the same weights on the same batches."""
    result = {}
    for name, correct in (("uncorrected", False), ("after", True)):
        torch.manual_seed(seed)
        world, towers = World(), TwoTowers()
        features, choices = world.features[USERS:], world.choices[USERS:]
        truth = world.log_p[USERS:].topk(10).indices
        popular = torch.bincount(world.choices[:USERS].flatten()).topk(100).indices
        result["most_popular"], result["possible"] = recall(choices, popular[None, :10]), recall(choices, truth)
        result["before"] = recall(choices, towers.recommend(features))
        train(world, towers, steps, correct)
        best = towers.recommend(features)
        result[name], result[f"truth_{name}"] = recall(choices, best), recall(truth, best)
        result[f"rare_{name}"] = recall(choices, best, ~torch.isin(choices, popular))
    return result


if __name__ == "__main__":
    for name, value in main().items():
        print(f"{name:18} {value:.3f}")
