"""Contrastive predictive coding of speech-like sequences: what is said is learned, who says it is not asked for.

An utterance is a chain of states ("phones") that are held for a while. A frame shows, through a nonlinearity and
noise, a mouth on its way from state to state, and an accent, which is louder and stays the same all through the
utterance. A context network reads the frames up to t and has to tell the frame at t + 1 from ten others *of the same
utterance* (CPC, van den Oord et al. 2018; the negatives are drawn as in wav2vec 2.0). Those have the same accent,
which is thus of no help. ``SampledInfoNCELoss`` takes one table of all frames, and integers that point into it.

    python docs/examples/speech.py

Metrics, on utterances of new speakers: how often the true frame comes first among its distractors (by chance 1 in
11), and how often a linear probe (ridge regression) finds the state of a frame from the context, or from the last raw
frame alone.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import fastcl
from fastcl.pairwise import gathered_dot, l2_normalize, row_dot

STATES, HOLD, FRAMES = 12, 5, 64  # states, mean frames in one, frames of an utterance
INPUT, DIM = 24, 64
AHEAD, DISTRACTORS, BATCH = 1, 10, 16


class World:
    """How phones and accents sound."""

    def __init__(self) -> None:
        self.phone = torch.randn(STATES, 8)
        self.mouth = torch.randn(8, INPUT) / 8**0.5
        self.accent = 2 * torch.randn(3, INPUT) / 3**0.5

    def speak(self, count: int) -> tuple[Tensor, Tensor]:
        """Frames ``(count, FRAMES, INPUT)`` and their states ``(count, FRAMES)``, each utterance by a new speaker."""
        moves = torch.rand(count, FRAMES) < 1 / HOLD
        last_move = torch.where(moves, torch.arange(FRAMES), 0).cummax(1).values
        state = torch.randint(STATES, (count, FRAMES)).gather(1, last_move)
        target = self.phone[state]
        path = [target[:, 0]]
        for t in range(1, FRAMES):
            path.append(0.6 * path[-1] + 0.4 * target[:, t])
        frames = torch.tanh(torch.stack(path, 1) @ self.mouth + torch.randn(count, 1, 3) @ self.accent)
        return frames + 0.4 * torch.randn_like(frames), state


class CPC(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(INPUT, DIM), nn.ReLU(), nn.Linear(DIM, DIM))
        past = nn.ConstantPad1d((8, 0), 0.0)  # two convolutions of 5 frames, which end with the present one
        self.context = nn.Sequential(past, nn.Conv1d(DIM, DIM, 5), nn.ReLU(), nn.Conv1d(DIM, DIM, 5))
        self.predict = nn.Linear(DIM, DIM)

    def forward(self, frames: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Codes of all frames ``(B * FRAMES, DIM)``, contexts ``(B, FRAMES, DIM)``, predicted codes ``(M, DIM)``."""
        codes = self.encoder(frames)
        context = self.context(codes.mT).mT
        return codes.flatten(0, 1), context, self.predict(context[:, :-AHEAD]).flatten(0, 1)


def draw(count: int) -> tuple[Tensor, Tensor]:
    """Rows of codes: the future of every context ``(M,)``, distractors of its utterance ``(M, DISTRACTORS)``."""
    start = FRAMES * torch.arange(count)[:, None]
    future = torch.arange(AHEAD, FRAMES)
    # 1 to FRAMES - 1 steps around the utterance never come back to the true frame
    steps = torch.randint(1, FRAMES, (count, len(future), DISTRACTORS))
    return (start + future).flatten(), (start[:, :, None] + (future[:, None] + steps) % FRAMES).flatten(0, 1)


def identified(model: CPC, frames: Tensor) -> float:
    """How often the true future is more similar to the prediction than every distractor."""
    codes, _, predicted = model(frames)
    codes, predicted = l2_normalize(codes), l2_normalize(predicted)
    positive, negatives = draw(len(frames))
    best = gathered_dot(predicted, codes, negatives).max(1).values
    return (row_dot(predicted, codes[positive]) > best).float().mean().item()


def probe(x: Tensor, y: Tensor, test_x: Tensor, test_y: Tensor) -> float:
    """Accuracy of a ridge regression from features to one-hot states."""
    x, test_x = x.flatten(0, 1), test_x.flatten(0, 1)
    mean, std = x.mean(0), x.std(0) + 1e-6
    x, test_x = (torch.cat([(f - mean) / std, torch.ones(len(f), 1)], 1) for f in (x, test_x))
    target = nn.functional.one_hot(y.flatten(), STATES).float()
    weights = torch.linalg.solve(x.T @ x + torch.eye(x.shape[1]), x.T @ target)
    return ((test_x @ weights).argmax(1) == test_y.flatten()).float().mean().item()


def main(steps: int = 300, seed: int = 0) -> dict[str, float]:
    """Train from random weights, and measure before and after; ``states_*`` are those of the probe."""
    torch.manual_seed(seed)
    world, model = World(), CPC()
    (x, y), (test_x, test_y) = world.speak(64), world.speak(64)

    @torch.no_grad()
    def measure() -> tuple[float, float]:
        return identified(model, test_x), probe(model(x)[1], y, model(test_x)[1], test_y)

    before, states_before = measure()
    loss = fastcl.SampledInfoNCELoss(temperature=0.1)
    optimizer = torch.optim.Adam(model.parameters(), lr=4e-3)
    for _ in range(steps):
        codes, _, predicted = model(world.speak(BATCH)[0])
        value = loss(predicted, codes, *draw(BATCH))
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    after, states_after = measure()
    states = {"states_before": states_before, "states_after": states_after, "states_raw": probe(x, y, test_x, test_y)}
    return {"before": before, "after": after, **states}


if __name__ == "__main__":
    for name, value in main().items():
        print(f"{name:14} {value:.3f}")
