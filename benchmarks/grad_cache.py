"""Large batches through small forwards: what it costs, what it saves, and whether the gradient is that of the batch.

    FASTCL_UPSTREAM=FOLDER python -m benchmarks.grad_cache --json benchmarks/results/grad_cache-cpu.json

Two encoders, with layers that look at one row at a time: a small convolutional network on images, and a one-layer
SentenceTransformer on texts. Contenders, in turns: *plain*, the step on the whole batch; *cached_loss*; GradCache,
where ``$FASTCL_UPSTREAM`` has its clone; sentence-transformers' CachedMultipleNegativesRankingLoss, where it is
installed. ``apart`` is the distance of the encoder's gradient from the plain step's, relative.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from fastcl import cached_loss, functional
from fastcl._bench import nothing_kept
from fastcl._info import cpu_model, provenance
from fastcl._measure import interleaved_seconds, median_ratio, peak_bytes

from .dropins import missing, original, upstream_version
from .record import write

CHUNK = 64
ROWS = (512, 4096)
Step = Callable[[], Tensor]


def convolutional() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.GroupNorm(4, 32), nn.ReLU(), nn.Flatten(), nn.Linear(32 * 64, 64),
    )  # fmt: skip


def images(n: int) -> tuple[nn.Module, dict[str, Step]]:
    """One tower for both views, InfoNCE of inner products."""
    net, generator = convolutional(), torch.Generator().manual_seed(n)
    x, y = torch.randn(2, n, 1, 16, 16, generator=generator)

    def loss(q: Tensor, k: Tensor) -> Tensor:
        return functional.info_nce(q, k, temperature=1.0)

    steps: dict[str, Step] = {
        "plain": lambda: loss(net(x), net(y)),
        "cached_loss": lambda: cached_loss(net, [x, y], loss, chunk_size=CHUNK),
    }
    if not missing("grad_cache"):
        from grad_cache import GradCache

        cache = GradCache([net, net], CHUNK, original("grad_cache").SimpleContrastiveLoss())
        steps["GradCache"] = lambda: cache(x, y)  # it runs its own backward
    return net, steps


def texts(n: int) -> tuple[nn.Module, dict[str, Step]]:
    """One SentenceTransformer for queries and documents, InfoNCE of cosines at scale 20."""
    from .dropins.sentence_transformers import WORDS, tiny_model

    model = tiny_model(width=64)
    generator = torch.Generator().manual_seed(n)

    def sentences() -> list[str]:
        picks = torch.randint(len(WORDS), (n, 8), generator=generator).tolist()
        return [" ".join(WORDS[i] for i in row) for row in picks]

    features = [dict(model.preprocess(sentences())) for _ in range(2)]
    given = [{name: t for name, t in each.items() if isinstance(t, Tensor)} for each in features]

    class Embedding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, **features: Tensor) -> Tensor:
            embedding: Tensor = self.model(dict(features))["sentence_embedding"]
            return embedding

    encoder = Embedding()

    def loss(q: Tensor, k: Tensor) -> Tensor:
        return functional.info_nce(q, k, temperature=1 / 20, normalize=True)

    upstream = original("sentence_transformers").CachedMultipleNegativesRankingLoss(model, mini_batch_size=CHUNK)
    return encoder, {
        "plain": lambda: loss(*(encoder(**each) for each in given)),
        "cached_loss": lambda: cached_loss(encoder, given, loss, chunk_size=CHUNK),
        "sentence-transformers, cached": lambda: upstream([dict(each) for each in features], None),
    }


def measure(build: Callable[[int], tuple[nn.Module, dict[str, Step]]], n: int, rounds: int) -> list[dict[str, Any]]:
    encoder, steps = build(n)

    def gradient(step: Step) -> Tensor:
        encoder.zero_grad()
        loss = step()
        if loss.requires_grad:
            loss.backward()
        return torch.cat([p.grad.flatten() for p in encoder.parameters() if p.grad is not None])

    calls = {name: lambda step=step: gradient(step) for name, step in steps.items()}
    exact = gradient(steps["plain"])
    seconds = interleaved_seconds(calls, rounds=rounds)
    rows = []
    for name, call in calls.items():
        with nothing_kept():
            peak = peak_bytes(call)
        rows.append({
            "encoder": build.__name__, "rows": n, "contender": name, "median_seconds": median(seconds[name]),
            "of_plain": median_ratio(seconds[name], seconds["plain"]), "peak_bytes": peak,
            "apart": float((gradient(steps[name]) - exact).norm() / exact.norm()),
        })  # fmt: skip
    return rows


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.grad_cache", description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--rounds", type=int, default=3, help="steps of each contender, in turns (default: %(default)s)"
    )
    parser.add_argument("--json", type=Path, help="write the record here")
    args = parser.parse_args()
    torch.set_num_threads(1)
    builds = [images, *([] if missing("sentence_transformers") else [texts])]
    rows = []
    for build in builds:
        for n in ROWS:
            for row in measure(build, n, args.rounds):
                rows.append(row)
                print(
                    f"{row['encoder']:<7}{row['rows']:>6} {row['contender']:<31}{row['median_seconds'] * 1e3:>9.1f} ms"
                    f" {row['of_plain']:>5.2f} x plain {row['peak_bytes'] / 1e6:>8.1f} MB  apart {row['apart']:.0e}",
                    flush=True,
                )
    if args.json:
        result = {
            **provenance(f"python -m benchmarks.grad_cache --rounds {args.rounds}"),
            "peers": {name: upstream_version(name) for name in ("grad_cache", "sentence_transformers")},
            "machine": {"device": cpu_model(), "threads": torch.get_num_threads()},
            "chunk": CHUNK,
            "rows": rows,
        }
        write(args.json, result)


if __name__ == "__main__":
    main()
