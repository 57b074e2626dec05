"""CLIP on 1,797 real images of digits with generated captions: classify new images with words alone.

Two encoders learn that an image and its caption ("a photo of the digit seven", "a handwritten 7") belong together. A
new image is then classified by the nearest of ten prompts, a sentence that no caption was; no classifier is trained.

Only ten digits exist, so every tenth caption of a batch describes an image as well as its own does. ``ids`` tells
``CLIPLoss`` which digit a pair shows: pairs of one digit are not negatives of each other, and the accuracy rises
sooner. With a real corpus, where captions hardly repeat, leave ``ids`` out, or pass one number for identical
captions.

    python docs/examples/image_text.py

Metric: zero-shot accuracy on the held-out quarter of the images.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

import fastcl
from fastcl.pairwise import l2_normalize, pair_argmax
from fastcl.trainer.config import TrainConfig
from fastcl.trainer.data import load_data

DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
CAPTIONS = [
    "a photo of the digit {}",
    "a handwritten {}",
    "a blurry picture of the number {}",
    "someone wrote {} on paper",
    "the figure {} in dark ink",
]
PROMPT = "a photo of the number {}"
WORDS = {*" ".join([*CAPTIONS, PROMPT]).split(), *DIGITS, *"0123456789"}
VOCABULARY = {word: i for i, word in enumerate(sorted(WORDS))}
DIM, BATCH = 32, 128


def tokens(captions: list[str]) -> Tensor:
    """Word numbers, ``(B, L)``; short captions are filled up with one more number, which the encoder skips."""
    rows = [torch.tensor([VOCABULARY[word] for word in caption.split()]) for caption in captions]
    return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=len(VOCABULARY))


def write_captions(labels: Tensor) -> list[str]:
    """A random caption for each digit, which is written as a word or as a figure."""
    template = torch.randint(len(CAPTIONS), labels.shape).tolist()
    as_word = torch.randint(2, labels.shape).tolist()
    digits = [DIGITS[d] if word else str(d) for d, word in zip(labels.tolist(), as_word, strict=True)]
    return [CAPTIONS[t].format(digit) for t, digit in zip(template, digits, strict=True)]


class CLIP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU(),
            nn.Flatten(), nn.Linear(32 * 4 * 4, DIM),
        )  # fmt: skip
        words = nn.EmbeddingBag(len(VOCABULARY) + 1, 64, mode="mean", padding_idx=len(VOCABULARY))
        self.text = nn.Sequential(words, nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, DIM))
        # The logarithm is learned, so that the scale stays positive; 1 / 0.07 is where CLIP starts.
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def scale(self) -> Tensor:
        return self.log_scale.clamp(max=math.log(100)).exp()  # CLIP's limit, against a runaway


@torch.no_grad()
def zero_shot(model: CLIP, images: Tensor, labels: Tensor) -> float:
    prompts = l2_normalize(model.text(tokens([PROMPT.format(digit) for digit in DIGITS])))
    nearest = pair_argmax(l2_normalize(model.image(images)), prompts)
    return (nearest == labels).float().mean().item()


def main(steps: int = 300, seed: int = 0) -> dict[str, float]:
    """Train from random weights, and measure before and after; ``scale`` is the learned one."""
    torch.manual_seed(seed)
    data = load_data(TrainConfig(data="digits"))
    images, test_images = (part.read(torch.arange(len(part))) for part in (data.train, data.test))
    labels = data.train.labels
    model = CLIP()
    before = zero_shot(model, test_images, data.test.labels)
    loss = fastcl.CLIPLoss()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(steps):
        at = torch.randint(len(labels), (BATCH,))
        text = model.text(tokens(write_captions(labels[at])))
        value = loss(model.image(images[at]), text, model.scale(), ids=labels[at])
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    return {"before": before, "after": zero_shot(model, test_images, data.test.labels), "scale": model.scale().item()}


if __name__ == "__main__":
    for name, value in main().items():
        print(f"{name:8} {value:.3f}")
