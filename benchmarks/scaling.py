"""What losses over many ranks should cost on H200 nodes, on paper: the schedules of ``fastcl.distributed``, replayed.

    python -m benchmarks.scaling --json benchmarks/results/scaling.json

Nothing here was measured. A step is a list of phases; each computes products of rows, and moves bytes that leave a GPU,
beside the products or before them. Assumptions, which the JSON repeats:

* Products run at EFFICIENCY of the data sheet's bf16 rate; everything else of a pass hides behind them.
* Rows are bf16, gradients of rows and sums fp32, keys 8 bytes.
* Nodes of eight GPUs: NVLink gives every GPU NVLINK bytes/s, a network card of its own NETWORK bytes/s to other nodes.
  A collective brings what is on other nodes into a node once, by all of its eight cards; a GPU then has it by NVLink.
  The ring passes blocks from GPU to GPU, and the last of a node to the first of the next by its one card.
* A message costs LATENCY, a ring algorithm of NCCL that of its steps within a node and between nodes.

*gather*: all rows come before the pass over them (hidden behind this rank's own block), and in the backward of two sets
the gradients of all columns go home after it. *ring*: of W blocks one is visited while the next arrives; NT-Xent's
forward visits half of them, and of two sets the gradients of a block travel behind it.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass
from pathlib import Path

from .record import write
from .roofline import GPUS

EFFICIENCY = 0.6
NVLINK, NETWORK, LATENCY = 450e9, 50e9, 10e-6
NODE, D, MEMORY = 8, 512, 141e9
RANKS, ROWS = (8, 64, 256, 1024), (2**16, 2**18, 2**20, 2**22, 2**24)
NUMBER, KEY = 4, 8  # bytes of one number of a row, and of its key


@dataclass(frozen=True)
class Step:
    """Forward and backward of one loss: seconds, what of them waits for the wires, bytes that leave a GPU, and bytes
    of its memory that rows of others take."""

    loss: str
    strategy: str
    ranks: int
    rows: int
    seconds: float
    exposed_seconds: float
    sent_bytes: float
    stored_bytes: float


def product(rows: float, columns: float) -> float:
    """Seconds of one matrix product of all pairs."""
    return 2 * rows * columns * D / (EFFICIENCY * GPUS["H200"].matrix["bfloat16"])


def collective(total: float, ranks: int) -> float:
    """Seconds until every GPU has all of ``total`` bytes, or the sum of its share of them: the slower of two wires."""
    within = total * (min(ranks, NODE) - 1) / min(ranks, NODE) / NVLINK
    between = total * (1 - NODE / ranks) / (NODE * NETWORK) if ranks > NODE else 0.0
    steps = min(ranks, NODE) - 1 + max(ranks // NODE - 1, 0)
    return max(within, between) + LATENCY * steps


def passing(block: float, ranks: int) -> float:
    """Seconds of one step of the ring: the slowest neighbours set the pace."""
    return block / (NETWORK if ranks > NODE else NVLINK) + LATENCY


def gather(loss: str, ranks: int, n: int, row: int = 2 * D, gradient: int = 4 * D) -> Step:
    """``row`` and ``gradient``: bytes of one."""
    own, two_sets = n / ranks, loss == "clip"
    arriving = max(collective(n * (row + KEY), ranks) - product(own, own), 0)
    # pair sums forward; backward the logits again, and the gradients of rows, and of columns
    computing = (1 + (3 if two_sets else 2)) * product(own, n)
    sent = (ranks - 1) * own * (row + KEY)
    if two_sets:  # largest logits, sums and their gradients of columns: three all-reduces, each there and back
        waiting = 6 * collective(n * NUMBER, ranks) + collective(n * gradient, ranks)
        sent += (ranks - 1) * own * (6 * NUMBER + gradient)
    else:  # log-sum-exps and upstream gradients
        waiting = 2 * collective(n * NUMBER, ranks)
        sent += (ranks - 1) * own * 2 * NUMBER
    stored = n * (row + KEY + gradient * two_sets)
    exposed = arriving + waiting
    return Step(loss, "gather", ranks, n, computing + exposed, exposed, sent, stored)


def ring(loss: str, ranks: int, n: int, row: int = 2 * D, gradient: int = 4 * D) -> Step:
    own, two_sets = n / ranks, loss == "clip"
    block, hops = own * (row + KEY), ranks - 1
    visiting, back = product(own, own), (3 if two_sets else 2) * product(own, own)
    if two_sets:  # sums forward and gradients backward go along behind their block, and home
        visits, sums = ranks, ranks * own * NUMBER
        behind, home = own * gradient, passing(own * NUMBER, ranks) + passing(own * gradient, ranks)
    else:  # sums of the blocks that another computes go straight home
        visits, sums = ranks // 2 + 1, (ranks - 1) // 2 * own * NUMBER
        behind, home = 0.0, 0.0
    along = block + own * 2 * NUMBER
    forward = visiting + (visits - 1) * max(visiting, passing(block + own * NUMBER, ranks))
    backward = back + hops * max(back, passing(along + behind, ranks))
    seconds, computing = forward + backward + home, visits * visiting + ranks * back
    sent = (visits - 1) * block + sums + hops * along + ranks * behind
    return Step(loss, "ring", ranks, n, seconds, seconds - computing, sent, 2 * (along + behind))


def steps() -> list[Step]:
    return [
        way(loss, ranks, n)
        for loss in ("nt_xent", "clip")
        for n in ROWS
        for ranks in RANKS
        for way in (gather, ring)
    ]  # fmt: skip


def main() -> None:
    """Print the table, and write it."""
    from fastcl._info import provenance

    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, help="write the table here")
    args = parser.parse_args()
    found = steps()
    for step in found:
        print(
            f"{step.loss:>8} {step.rows:>11,} rows {step.ranks:>5} ranks {step.strategy:<7}"
            f"{step.seconds * 1e3:>11,.2f} ms"
            f"{step.exposed_seconds / step.seconds:>6.0%} waiting {step.sent_bytes / 1e6:>10,.1f} MB sent"
            f"{step.stored_bytes / 1e9:>8.2f} GB"
        )
    if args.json:
        result = {
            **provenance("python -m benchmarks.scaling --json benchmarks/results/scaling.json"),
            "measured": False,
            "assumptions": {
                "gpu": GPUS["H200"].name, "efficiency": EFFICIENCY, "nvlink": NVLINK, "network": NETWORK,
                "latency": LATENCY, "gpus_of_a_node": NODE, "features": D, "memory": MEMORY,
            },
            "rows": [asdict(step) for step in found],
        }  # fmt: skip
        write(args.json, result)


if __name__ == "__main__":
    main()
