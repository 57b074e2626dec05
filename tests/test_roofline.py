"""The cost model against numbers worked out by hand."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks import roofline
from benchmarks.roofline import GPUS, bound_seconds, phases

N, D = 16384, 128


@pytest.mark.parametrize(
    ("loss", "products", "exps"),
    [("nt_xent", 2, 1), ("supcon", 2, 1), ("clip", 4, 2), ("siglip", 3, 1), ("moco", 2, 1)],
)
def test_counts(loss: str, products: float, exps: float) -> None:
    work = phases(loss, N, N, D, 2)
    assert sum(p.flop for p in work) == products * 2 * N * N * D
    assert sum(p.exps for p in work) == exps * N * N


def test_bytes_are_operands_once_and_gradients_once() -> None:
    forward, backward = phases("clip", 8, 4, 16, 2)
    assert forward.bytes == (8 + 4) * 16 * 2 + 4 * (8 + 4)
    assert backward.bytes == 2 * (8 + 4) * 16 * 2 + 4 * (8 + 4)
    (moco,) = phases("moco", 8, 1024, 16, 2)
    assert moco.bytes == 2 * 8 * 16 * 2 + 1024 * 16 * 2


def test_the_bound_is_the_slowest_resource_of_each_phase() -> None:
    h200 = GPUS["H200"]
    forward, backward = phases("nt_xent", N, N, 64, 2)
    assert roofline.limits(forward, h200, "bfloat16")["exponentials"] > forward.flop / h200.matrix["bfloat16"]
    by_hand = forward.exps / h200.exps + max(backward.flop / 989e12, backward.exps / h200.exps)
    assert bound_seconds([forward, backward], h200, "bfloat16") == pytest.approx(by_hand)
    wide = phases("nt_xent", N, N, 1024, 2)
    assert bound_seconds(wide, h200, "bfloat16") == pytest.approx(sum(p.flop for p in wide) / 989e12)


def test_measured_ceilings_replace_the_data_sheet() -> None:
    gpu = roofline.with_ceilings(GPUS["H200"], {"matmul_bfloat16": 7e14, "copy": 4e12})
    assert (gpu.matrix["bfloat16"], gpu.matrix["float16"], gpu.bytes) == (7e14, 7e14, 4e12)
    assert gpu.matrix["float32"] == GPUS["H200"].matrix["float32"]


def test_fractions_of_a_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    work = phases("nt_xent", N, N, D, 2)
    seconds = 4 * bound_seconds(work, GPUS["H200"], "bfloat16")
    row = {"loss": "nt_xent", "rows": N, "columns": N, "dim": D, "dtype": "bfloat16", "contender": "fastcl triton"}
    rows = [{**row, "median_seconds": seconds}, {**row, "skipped": "out of memory"}]
    file = tmp_path / "h200.json"
    file.write_text(json.dumps({"machine": {"gpu": "NVIDIA H200", "ceilings": {}}, "rows": rows}))
    monkeypatch.setattr(sys, "argv", ["roofline", "--results", str(file)])
    roofline.main()
    assert capsys.readouterr().out.count("25% of the bound") == 1
    assert roofline.fraction(rows[0], "some other device", {}) is None


def test_the_table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["roofline", "--gpu", "A100"])
    roofline.main()
    assert len(capsys.readouterr().out.splitlines()) == 24


def test_an_unknown_loss_is_named() -> None:
    with pytest.raises(ValueError, match="got the loss 'nt_xnet'; expected nt_xent"):
        phases("nt_xnet", 1, 1, 1, 2)
