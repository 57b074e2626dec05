"""``fastcl tune``: what it keeps, what it refuses to read, and that nothing is tuned without it."""

from __future__ import annotations

import itertools
import json
import os
from pathlib import Path

import pytest
import torch

from fastcl import _tune, cli

from .conftest import DEVICE

triton = pytest.importorskip("fastcl.backends.triton", reason="Triton is not installed")
configs = pytest.importorskip("fastcl.backends._triton_configs")
FAMILY = "interpreter"
ROW = configs.Config("sums", 32, 32, 32, 32, 0, 1, 1)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FASTCL_CACHE_DIR", str(tmp_path / "cache"))
    configs.tuned.cache_clear()
    yield tmp_path / "cache"
    configs.tuned.cache_clear()


def write(row: object, mode: int = 0o600) -> Path:
    file = configs.tuned_file("Some GPU")
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps({"families": {FAMILY: {"sums": [row]}}}))
    file.chmod(mode)
    return file


def chosen(d: int = 24) -> object:
    return configs.config(FAMILY, "sums", d, gpu="Some GPU")


def test_tuned_rows_come_first_for_their_depths() -> None:
    static = chosen()
    write(ROW[1:])
    configs.tuned.cache_clear()
    assert chosen() == ROW != static
    assert chosen(33) == configs.config(FAMILY, "sums", 33)
    assert configs.config(FAMILY, "sums", 24, gpu="Another GPU") == static


@pytest.mark.parametrize("row", ["nonsense", [1, 2], {"a": 1}, None])
def test_a_damaged_file_is_told_and_not_used(row: object) -> None:
    static = configs.config(FAMILY, "sums", 24)
    write(row)
    with pytest.warns(UserWarning, match="cannot be read .* Run fastcl tune again"):
        assert chosen() == static


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="files have no owner here")
def test_a_file_that_others_may_write_is_not_used() -> None:
    static = configs.config(FAMILY, "sums", 24)
    write(ROW[1:], 0o666)
    with pytest.warns(UserWarning, match="can be written by other users"):
        assert chosen() == static


@pytest.mark.skipif(DEVICE != "cpu", reason="the interpreter serves CPU tensors")
def test_the_faster_tiles_are_kept(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Real launches in the interpreter, in other processes first; only the clock is chosen, so that the last wins."""
    candidates = [ROW, ROW._replace(block_n=16), ROW._replace(block_m=16, block_n=48)]  # the last is no power of two
    monkeypatch.setattr(_tune, "_candidates", lambda row: candidates if row.depth == 32 else [])
    ticks = (0.9**i for i in itertools.count())

    def clock(contenders: dict[str, object], **options: object) -> dict[str, list[float]]:
        for step in contenders.values():
            step()  # type: ignore[operator]
        return {name: [float(next(ticks))] for name in contenders}

    monkeypatch.setattr(_tune, "interleaved_seconds", clock)
    said: list[str] = []
    settings = _tune.Settings(
        kinds=("sums", "grad", "one_pass", "argmax", "topk"), dtype="float32", rows=40, workers=2, device="cpu"
    )
    result = _tune.run(settings, said.append)
    assert result["families"][FAMILY]["sums"] == [list(candidates[1][1:])]
    file = configs.tuned_file("")
    assert json.loads(file.read_text()) == result
    assert file.stat().st_mode & 0o077 == 0
    assert file.parent.stat().st_mode & 0o077 == 0
    assert any("of the table's" in line for line in said)


def test_candidates_are_other_tiles_of_the_same_depths() -> None:
    for family in configs._TABLE:
        for kind in _tune.KINDS:
            for row in configs.rows(family, kind):
                others = list(_tune._candidates(row))
                assert others
                assert row not in others
                assert {(o.kind, o.depth) for o in others} == {(row.kind, row.depth)}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
def test_no_device_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["tune"]) == 2
    assert "no CUDA device; expected one to tune for" in capsys.readouterr().err


def test_an_unknown_kind_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["tune", "--kinds", "sums,products"]) == 2
    assert "kinds ['products']" in capsys.readouterr().err


def test_tiles_too_large_for_a_device_are_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next row of the table serves, and the device is not asked for the first again."""
    monkeypatch.setattr(triton, "_too_large", {})
    rows = configs.rows(triton._family(torch.zeros(1, 24, device=DEVICE)), "sums")
    first = triton._config("sums", torch.zeros(1, 24, device=DEVICE))
    launched = []
    sums = triton.kernels._sums_kernel

    class Limited:
        """The kernel on a device that has too little shared memory for the first row."""

        def __getitem__(self, grid: object) -> object:
            def launch(*args: object, **constants: object) -> None:
                launched.append(constants["BLOCK_M"])
                if (constants["BLOCK_M"], constants["BLOCK_N"]) == (first.block_m, first.block_n):
                    raise triton.OutOfResources(300_000, 101_376, "shared memory")
                sums[grid](*args, **constants)

            return launch

    monkeypatch.setattr(triton.kernels, "_sums_kernel", Limited())
    z = torch.randn(40, 24, device=DEVICE)
    pairs = triton.Pairs(z, z, torch.tensor(1.0, device=DEVICE), symmetric=True)
    got = [triton.reduce("exp", pairs, False, False)[0] for _ in range(2)]
    assert torch.allclose(got[0], (z @ z.T).logsumexp(1), rtol=1e-5)
    assert torch.equal(*got)
    assert launched == [first.block_m, rows[1].block_m, rows[1].block_m]
    monkeypatch.setattr(triton, "_too_large", {triton.limits(z.device).name: {*rows, first}})
    if DEVICE == "cpu":
        with pytest.raises(RuntimeError, match="shared memory is too small"):
            triton.reduce("exp", pairs, False, False)
