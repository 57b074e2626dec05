"""The paper model of many ranks against what real ranks send, and against itself."""

from __future__ import annotations

import pytest

from benchmarks import scaling


@pytest.mark.parametrize("loss", ["nt_xent", "clip"])
def test_no_step_is_faster_than_its_arithmetic(loss: str) -> None:
    for ranks in scaling.RANKS:
        for n in scaling.ROWS:
            for way in (scaling.gather, scaling.ring):
                step = way(loss, ranks, n)
                products = 4 if loss == "clip" else 2.5
                assert step.seconds >= products * scaling.product(n / ranks, n)
                assert 0 <= step.exposed_seconds < step.seconds


def test_more_ranks_store_less_by_the_ring_and_the_same_by_gathering() -> None:
    few, many = (scaling.ring("clip", ranks, 2**20) for ranks in (8, 64))
    assert few.stored_bytes == 8 * many.stored_bytes
    assert scaling.gather("clip", 8, 2**20).stored_bytes == scaling.gather("clip", 64, 2**20).stored_bytes


def test_a_collective_is_no_faster_than_its_wires() -> None:
    total = 2.0**30
    assert scaling.collective(total, 8) >= total * 7 / 8 / scaling.NVLINK
    assert scaling.collective(total, 64) >= total * 7 / 8 / (8 * scaling.NETWORK)
