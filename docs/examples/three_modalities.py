"""Images, captions and sounds in one space: pairs that were never trained on find each other (as in ImageBind).

Three encoders, one space. Each pair of modalities has a CLIP loss, and the losses are added. The second run leaves
out the loss between images and sounds: both are only ever compared with captions, and yet a sound finds images of its
digit.

The images are the embedded digits. The sound of a digit is a melody of its own: six tones over sixteen pitches,
played in any of five keys, with other loudness each time, in noise. Captions are "a seven", "the number 7" and the
like.

    python docs/examples/three_modalities.py

Metric: for how many new sounds the nearest of the held-out images shows its digit; at random one in ten.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor, nn

import fastcl
from fastcl.pairwise import l2_normalize, pair_argmax
from fastcl.trainer.config import TrainConfig
from fastcl.trainer.data import load_data

TONES, PITCHES, KEYS = 6, 16, 5
TEMPLATES, LENGTH = 4, 3  # of captions
DIM, BATCH = 32, 128
EVERY_PAIR = tuple(itertools.combinations(("image", "text", "sound"), 2))
BY_CAPTION = (("image", "text"), ("text", "sound"))


class Player:
    """Plays the melodies: spectrograms ``(B, TONES * PITCHES)``."""

    def __init__(self) -> None:
        self.melody = torch.randint(PITCHES - KEYS + 1, (10, TONES))

    def __call__(self, digit: Tensor) -> Tensor:
        pitch = self.melody[digit] + torch.randint(KEYS, (len(digit), 1))
        loudness = 0.5 + torch.rand(len(digit), TONES, 1)
        played = nn.functional.one_hot(pitch, PITCHES) * loudness
        return (played + 0.3 * torch.randn_like(played)).flatten(1)


def captions(digit: Tensor) -> Tensor:
    """Word numbers ``(B, LENGTH)``: two of a template, and the digit as a word or as a figure."""
    template = torch.randint(TEMPLATES, digit.shape)
    name = digit + 10 * torch.randint(2, digit.shape)
    return torch.stack([2 * template, 2 * template + 1, 2 * TEMPLATES + name], 1)


def encoders() -> nn.ModuleDict:
    return nn.ModuleDict(
        {
            "image": nn.Sequential(
                nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(),
                nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU(),
                nn.Flatten(), nn.Linear(32 * 4 * 4, DIM),
            ),
            "text": nn.Sequential(nn.EmbeddingBag(2 * TEMPLATES + 20, 64), nn.ReLU(), nn.Linear(64, DIM)),
            "sound": nn.Sequential(nn.Linear(TONES * PITCHES, 128), nn.ReLU(), nn.Linear(128, DIM)),
        }
    )  # fmt: skip


@torch.no_grad()
def retrieval(model: nn.ModuleDict, sounds: Tensor, digit: Tensor, images: Tensor, labels: Tensor) -> float:
    """How many sounds have an image of their digit as the nearest of all images."""
    nearest = pair_argmax(l2_normalize(model["sound"](sounds)), l2_normalize(model["image"](images)))
    return (labels[nearest] == digit).float().mean().item()


def run(pairs: tuple[tuple[str, str], ...], steps: int, seed: int) -> tuple[float, float]:
    """Train with the losses of these pairs of modalities; retrieval from sound to image, before and after."""
    torch.manual_seed(seed)
    data, play, model = load_data(TrainConfig(data="digits")), Player(), encoders()
    images, test_images = (part.read(torch.arange(len(part))) for part in (data.train, data.test))
    labels, digit = data.train.labels, torch.arange(10).repeat(50)
    test = play(digit), digit, test_images, data.test.labels
    before = retrieval(model, *test)
    loss, log_scale = fastcl.CLIPLoss(), nn.Parameter(torch.tensor(math.log(10.0)))
    optimizer = torch.optim.Adam([*model.parameters(), log_scale], lr=3e-3)
    for _ in range(steps):
        at = torch.randint(len(labels), (BATCH,))
        shown = labels[at]
        batch = {"image": images[at], "text": captions(shown), "sound": play(shown)}
        z = {name: encoder(batch[name]) for name, encoder in model.items()}
        scale = log_scale.clamp(max=math.log(100)).exp()
        # ids: what shows, says or plays the same digit is not a negative
        value = torch.stack([loss(z[a], z[b], scale, ids=shown) for a, b in pairs]).sum()
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    return before, retrieval(model, *test)


def main(steps: int = 200, seed: int = 0) -> dict[str, float]:
    """From random encoders to those of every pair of losses, and (``emergent``) of all but the pair measured."""
    before, after = run(EVERY_PAIR, steps, seed)
    _, emergent = run(BY_CAPTION, steps, seed)
    return {"before": before, "after": after, "emergent": emergent}


if __name__ == "__main__":
    for name, value in main().items():
        print(f"{name:10} {value:.3f}")
