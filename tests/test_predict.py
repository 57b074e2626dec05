"""The cost model: arithmetic that can be checked by hand, and bounds that it must respect."""

from __future__ import annotations

import pytest

from benchmarks import predict

pytest.importorskip("triton", reason="Triton is not installed")


def test_blocks_per_processor() -> None:
    row = {"warps": 4, "registers": 168, "shared_bytes": 80 * 1024}
    assert predict.blocks_per_processor(row) == 2  # by shared memory; registers would allow 3
    assert predict.blocks_per_processor({**row, "shared_bytes": 1024}) == 3
    assert predict.blocks_per_processor({**row, "registers": 16, "shared_bytes": 0}) == 16  # by threads


def test_a_tile_by_hand() -> None:
    """128 x 128 pairs of 128 features: 4.19 MFLOP on one processor of 132 at 989 TFLOP/s, 16 exponentials a clock."""
    row = {"warps": 8, "registers": 128, "shared_bytes": 0, "loop": {"all": 1000}}
    kernel = predict.tiles("sums", "sums", row, (128, 128, 128), 132.0)
    products = 2 * 128**3 / (989e12 / 132)
    assert kernel.low - predict.LAUNCH == pytest.approx(max(products, 128 * 128 / 16 / 1.83e9))
    assert kernel.high - predict.LAUNCH == pytest.approx(products + 2000 / 1.83e9)
    alone = predict.tiles("sums", "sums", {**row, "registers": 255}, (128, 128, 128), 132.0)
    assert alone.blocks_per_processor == 1
    assert alone.low - predict.LAUNCH == pytest.approx(products + 128 * 128 / 16 / 1.83e9)


def test_predictions_respect_the_bound_and_say_that_they_are_none() -> None:
    rows = predict.predictions()
    assert len(rows) == sum(loss == "nt_xent" for loss, *_ in predict.GOALS)
    for row in rows:
        assert row["bound_seconds"] < row["low_seconds"] <= row["high_seconds"]
        assert row["low_seconds"] == pytest.approx(sum(k["low"] for k in row["kernels"]))
        assert {k["name"] for k in row["kernels"]} >= {"prepare", "sums", "finish", "restore"}
