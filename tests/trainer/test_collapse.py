"""Collapse monitors: against their formulas in fp64, at the ends of their ranges, and in a run."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fastcl.trainer import TrainConfig, loop, table, train
from fastcl.trainer.collapse import MONITORS, alignment, effective_rank, monitors, uniformity
from fastcl.trainer.data import load_data
from fastcl.trainer.models import build_encoder, projection_head
from fastcl.trainer.progress import Progress

from .conftest import SHORT
from .runs import metrics

CPU = torch.device("cpu")


def sphere(rows: int, width: int, seed: int = 0) -> torch.Tensor:
    x = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed), dtype=torch.double)
    return nn.functional.normalize(x, dim=1)


def test_the_figures_are_their_formulas_in_fp64() -> None:
    x, y = sphere(70, 9), sphere(70, 9, seed=1)
    squared = torch.cdist(x, x).square()
    pairs = squared[~torch.eye(70, dtype=torch.bool)]
    assert uniformity(x.float()) == pytest.approx((-2 * pairs).exp().mean().log().item(), rel=1e-6)
    assert alignment(x.float(), y.float()) == pytest.approx((x - y).square().sum(1).mean().item(), rel=1e-6)
    share = torch.linalg.eigvalsh(x.T @ x).sqrt()
    share = share / share.sum()
    assert effective_rank(x.float()) == pytest.approx((-share * share.log()).sum().exp().item(), rel=1e-6)


def test_the_ends_of_their_ranges() -> None:
    one = torch.eye(8)[:1].expand(50, 8)
    assert uniformity(one) == pytest.approx(0, abs=1e-6) and effective_rank(one) == pytest.approx(1, abs=1e-6)
    assert alignment(one, one) == 0 and alignment(one, -one) == 4
    axes = torch.eye(8).repeat(5, 1)
    assert effective_rank(axes) == pytest.approx(8)
    assert effective_rank(torch.zeros(5, 8)) == 1
    assert uniformity(sphere(500, 8).float()) < -2.5  # log E = -3.1 for 8 dimensions and many rows


def test_no_matrix_of_pairs_is_made() -> None:
    """16,384 rows: a matrix would take a gigabyte; what is counted is the largest tensor torch makes."""

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = function(*args, **(kwargs or {}))
            for t in result if isinstance(result, (tuple, list)) else [result]:
                if isinstance(t, torch.Tensor):
                    self.count = max(self.count, t.numel())
            return result

    x = sphere(16_384, 4).float()
    with Largest() as largest:
        uniformity(x)
    assert 0 < largest.count < 16_384**2 / 16


def test_the_sample_is_fixed_and_the_networks_are_left_alone() -> None:
    data = load_data(TrainConfig())
    torch.manual_seed(0)
    encoder, width = build_encoder("conv", 1, 8)
    head = projection_head(width, 16, norm=True).eval()
    before = {name: value.clone() for name, value in encoder.state_dict().items()}

    def figures(start: int = 0) -> dict[str, float]:
        return monitors(encoder, head, data, torch.arange(start, start + 300), CPU)

    first = figures()
    assert set(first) == set(MONITORS) and first == figures() != figures(1)
    assert encoder.training and not head.training
    assert all(torch.equal(before[name], value) for name, value in encoder.state_dict().items())
    with torch.no_grad():
        head[-1].weight.zero_()  # a collapse
    collapsed = figures()
    assert collapsed["effective_rank"] == pytest.approx(1, abs=1e-3) and abs(collapsed["uniformity"]) < 1e-5
    with torch.no_grad():
        head[-1].bias.fill_(math.nan)
    assert all(math.isnan(value) for value in figures().values())


def test_a_run_keeps_them_in_its_metrics_its_events_and_its_result(short_run: tuple[Path, dict[str, Any]]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder, result = short_run
    rows = metrics(folder)
    assert list(rows[0]) == ["step", "loss", "learning_rate", "knn", "few10", *MONITORS, "skipped"]
    assert [int(row["step"]) for row in rows if row["effective_rank"]] == [12, 24]
    assert {name: float(rows[-1][name]) for name in MONITORS} == result["embeddings"]
    events = EventAccumulator(str(folder))
    events.Reload()
    for name in MONITORS:
        assert [event.step for event in events.Scalars(name)] == [12, 24]
    assert 0 < result["embeddings"]["alignment"] < 2 and 2 < result["embeddings"]["effective_rank"] < 64
    assert f"effective rank {result['embeddings']['effective_rank']:.1f}" in table(result)


def test_a_collapse_is_a_line_of_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ranks = iter([2.5, 1.25])
    monkeypatch.setattr(
        loop, "monitors", lambda *args: {"alignment": 0.0, "uniformity": 0.0, "effective_rank": next(ranks)}
    )
    train(TrainConfig(output=str(tmp_path / "run"), **SHORT | {"steps": 2, "probe_every": 1}))
    warnings = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert len(warnings) == 1 and "step 2: the effective rank of the embeddings is 1.25, below 2" in warnings[0]


def test_on_a_terminal_the_warning_leaves_the_bar(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with Progress(10, 4, torch.device("cpu")) as progress:
        progress.probed(5, 1.0)
        progress.update(10, 1.5, 10.0, 0.1)
    err = capsys.readouterr().err
    assert "warning: step 5" in err and "10/10" in err
