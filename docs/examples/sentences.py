"""Sentence embeddings by a small transformer, of a toy grammar: find the paraphrase among hard negatives.

A paraphrase says the same in other words, and every second time in the passive voice ("the dog chases the cat", "a
kitty is pursued by the hound"). A hard negative keeps the words of the query but means something else: one word is
another one, or who does it and whom it is done to are exchanged. It shares more words with the query than the
paraphrase does, so word counts point to the wrong sentence. ``InfoNCELoss`` takes each query's hard negatives as
``own_negatives``, beside the paraphrases of the other queries in the batch.

    python docs/examples/sentences.py

Metric: how often the paraphrase is the nearest of all candidates, which are the paraphrases and hard negatives of 256
new sentences (768 candidates). Without ``own_negatives`` (``main(hard=False)``) half or more are mistaken.
"""

from __future__ import annotations

import random

import torch
from torch import Tensor, nn

import fastcl
from fastcl.pairwise import l2_normalize, pair_argmax

NOUNS = "dog hound|cat kitty|child kid|woman lady|man gentleman|doctor physician|thief robber|rabbit bunny"
VERBS = "chases pursues|sees spots|helps assists|fears dreads|likes enjoys|greets welcomes|stops halts|finds discovers"
MANNERS = "big large|small little|happy glad|sad unhappy|fast quick|calm quiet|odd strange|smart clever"
PLACES = "town city|woods forest|house home|street road|shop store|yard garden"
NOUN, VERB, MANNER, PLACE = ([entry.split() for entry in words.split("|")] for words in (NOUNS, VERBS, MANNERS, PLACES))
WORDS = ["", "the", "a", "is", "by", "in", *(w for group in (NOUN, VERB, MANNER, PLACE) for e in group for w in e)]
NUMBER = {word: i for i, word in enumerate(WORDS)}  # 0 fills up
LENGTH, DIM, BATCH = 12, 64, 64
SLOTS = (MANNER, NOUN, VERB, MANNER, NOUN, PLACE)  # what a meaning consists of: one entry of each


def draw_meaning() -> list[int]:
    return [random.randrange(len(slot)) for slot in SLOTS]


def other_meaning(meaning: list[int], exchange: bool) -> list[int]:
    """Who and whom exchanged, or one entry changed."""
    if exchange and meaning[0:2] != meaning[3:5]:
        return [*meaning[3:5], meaning[2], *meaning[0:2], meaning[5]]
    at = random.randrange(len(SLOTS))
    change = random.randrange(1, len(SLOTS[at]))
    return [(entry + change) % len(SLOTS[at]) if i == at else entry for i, entry in enumerate(meaning)]


def say(meaning: list[int], synonyms: list[int], passive: bool) -> list[int]:
    """Word numbers, ``LENGTH`` of them."""
    how, who, does, how2, whom, where = (
        slot[entry][synonym] for slot, entry, synonym in zip(SLOTS, meaning, synonyms, strict=True)
    )
    if passive:
        text = f"a {how2} {whom} is {does} by the {how} {who} in a {where}"
    else:
        text = f"the {how} {who} {does} the {how2} {whom} in the {where}"
    words = [NUMBER[word] for word in text.split()]
    return words + [0] * (LENGTH - len(words))


def draw(count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and paraphrases ``(count, LENGTH)``, and two hard negatives of each query ``(count, 2, LENGTH)``."""
    queries, paraphrases, negatives = [], [], []
    for _ in range(count):
        meaning, synonyms = draw_meaning(), [random.randrange(2) for _ in SLOTS]
        queries.append(say(meaning, synonyms, passive=False))
        paraphrases.append(say(meaning, [1 - s for s in synonyms], passive=random.random() < 0.5))
        negatives.append([say(other_meaning(meaning, exchange), synonyms, False) for exchange in (True, False)])
    return torch.tensor(queries), torch.tensor(paraphrases), torch.tensor(negatives)


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.word = nn.Embedding(len(WORDS), DIM)
        self.place = nn.Parameter(torch.randn(LENGTH, DIM))
        layer = nn.TransformerEncoderLayer(DIM, nhead=4, dim_feedforward=2 * DIM, dropout=0.0, batch_first=True)
        self.transformer = nn.TransformerEncoder(layer, num_layers=1, enable_nested_tensor=False)

    def forward(self, words: Tensor) -> Tensor:
        """Words ``(B, LENGTH)`` to the mean over their positions, ``(B, DIM)``."""
        blank = words == 0
        hidden = self.transformer(self.word(words) + self.place, src_key_padding_mask=blank)
        return hidden.masked_fill(blank[:, :, None], 0).sum(1)


@torch.no_grad()
def accuracy(encoder: Encoder, queries: Tensor, paraphrases: Tensor, negatives: Tensor) -> float:
    candidates = torch.cat([paraphrases, negatives.flatten(0, 1)])
    nearest = pair_argmax(l2_normalize(encoder(queries)), l2_normalize(encoder(candidates)))
    return (nearest == torch.arange(len(queries))).float().mean().item()


def main(steps: int = 200, seed: int = 0, hard: bool = True) -> dict[str, float]:
    """Train with hard negatives, or without, and measure before and after."""
    torch.manual_seed(seed)
    random.seed(seed)
    test = draw(256)
    encoder = Encoder()
    before = accuracy(encoder, *test)
    loss = fastcl.InfoNCELoss(temperature=0.1)
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=2e-3)
    for _ in range(steps):
        queries, paraphrases, negatives = draw(BATCH)
        z = encoder(torch.cat([queries, paraphrases, negatives.flatten(0, 1)]))
        q, k, own = z.split([BATCH, BATCH, 2 * BATCH])
        value = loss(q, k, own_negatives=own.view(BATCH, 2, DIM) if hard else None)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    return {"before": before, "after": accuracy(encoder, *test)}


if __name__ == "__main__":
    for name, value in main().items():
        print(f"{name:8} {value:.3f}")
