"""The command line: report, self-test (which must be able to fail), benchmark, errors; what importing fastcl costs."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from fastcl import __version__, _bench, _info, _selftest, cli, reference
from fastcl.backends import NAMES, chunked
from fastcl.testing import CASES
from fastcl.trainer.errors import TrainError

ROOT = Path(__file__).resolve().parent.parent
LOSSES = {case.name for case in CASES}
LABELS = {case.label for case in CASES}
SUMMED = {case.label for case in CASES if case.summed}


def run_json(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, Any]:
    code = cli.main([*words, "--json"])
    return code, json.loads(capsys.readouterr().out)


def python(*words: str, **env: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("FASTCL_", "TRITON_"))}
    threads = {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *words], cwd=ROOT, env={**clean, **threads, **env}, capture_output=True, text=True, timeout=120
    )


# --- info -----------------------------------------------------------------------------------------------------------


def test_report_text(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info"]) == 0
    text = capsys.readouterr().out
    for expected in (__version__, torch.__version__, "chunked", "native module", "FASTCL_BACKEND", "not triton: "):
        assert expected in text


@pytest.mark.parametrize("words", [[], ["info"]], ids=["no command", "info"])
def test_report_json(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    code, report = run_json(capsys, *words)
    assert code == 0
    assert report["versions"]["fastcl"] == __version__
    assert set(report["backends"]["cpu"]) == {"reduce", "grad", "topk"}
    for answer in report["backends"]["cpu"].values():
        assert {answer["chosen"], *answer["others"]} == set(NAMES)
        assert all(answer["others"].values()), "a reason in words"


def test_report_as_a_module_with_a_backend_that_does_not_exist() -> None:
    done = python("-m", "fastcl", FASTCL_BACKEND="cuda-magic", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0, done.stderr
    assert "got backend 'cuda-magic'; expected one of native, chunked, triton, auto" in done.stdout


def test_json_to_a_file_keeps_the_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info", "--json", str(tmp_path / "info.json")]) == 0
    assert "versions" in capsys.readouterr().out
    assert json.loads((tmp_path / "info.json").read_text())["versions"]["fastcl"] == __version__


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"fastcl {__version__}\n"


# --- selftest -------------------------------------------------------------------------------------------------------


def test_selftest_passes(capsys: pytest.CaptureFixture[str]) -> None:
    code, result = run_json(capsys, "selftest")
    assert code == 0 and result["passed"], result
    tested = {(row["backend"], row["dtype"], row["loss"]) for row in result["rows"]}
    left_out = {(row["backend"], row["dtype"]) for row in result["not_run"]}
    for backend in NAMES:
        for dtype in ("float32", "float16", "bfloat16"):
            losses = {loss for b, d, loss in tested if (b, d) == (backend, dtype)}
            without = {case.label for case in CASES if case.guided} if backend == "triton" else set()
            assert losses >= LABELS - without or (backend, dtype) in left_out
    assert not {dtype for backend, dtype in left_out if backend == "chunked"}
    if find_spec("triton") is not None:  # on a GPU, or in the interpreter that conftest.py turns on
        assert "triton" in {backend for backend, _, _ in tested}, result["not_run"]


@pytest.fixture
def only_chunked(monkeypatch: pytest.MonkeyPatch) -> None:
    """The backend that the tests break; Triton's interpreter, where it is on, would only take time."""
    monkeypatch.setattr(_selftest, "NAMES", ("chunked",))


def _times(factor: float) -> Callable[..., Any]:
    right = chunked.grad

    def wrong(*args: Any) -> Any:
        return tuple(result * factor for result in right(*args))

    return wrong


def _one_row_off(*args: Any, right: Callable[..., Any] = chunked.grad) -> Any:
    return tuple(result.roll(1, 0) for result in right(*args))


def _raise(*args: Any) -> Any:
    raise RuntimeError("no such instruction")


@pytest.mark.parametrize(
    "wrong",
    [_times(1.01), _times(0.0), _times(-1.0), _times(float("nan")), _times(float("inf")), _one_row_off, _raise],
    ids=["1.01", "zero", "negated", "nan", "inf", "one row off", "raises"],
)
@pytest.mark.usefixtures("only_chunked")
def test_selftest_catches_a_wrong_gradient(
    wrong: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(chunked, "grad", wrong)
    code, result = run_json(capsys, "selftest")
    assert code == 1 and not result["passed"]
    fp32 = [row for row in result["rows"] if row["dtype"] == "float32" and row["loss"] in SUMMED]
    assert not any(row["passed"] for row in fp32), [row for row in fp32 if row["passed"]]
    text = _selftest.text(result)
    assert "FAIL" in text and "checks pass" not in text


@pytest.mark.parametrize("factor", [1.001, 0.0, float("nan")])
@pytest.mark.usefixtures("only_chunked")
def test_selftest_catches_a_wrong_loss(
    factor: float, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = chunked.reduce
    monkeypatch.setattr(chunked, "reduce", lambda *args: tuple(t * factor for t in right(*args)))
    code, result = run_json(capsys, "selftest")
    assert code == 1
    wrong = {row["loss"] for row in result["rows"] if row["dtype"] == "float32" and not row["passed"]}
    assert wrong >= SUMMED


@pytest.mark.usefixtures("only_chunked")
def test_selftest_catches_one_wrong_value_in_one_dtype(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = chunked.grad

    def wrong(link: str, pairs: Any, *rest: Any) -> Any:
        dx, *others = right(link, pairs, *rest)
        if pairs.x.dtype == torch.bfloat16 and len(dx):
            dx[-1, -1] = float("nan")
        return dx, *others

    monkeypatch.setattr(chunked, "grad", wrong)
    code, result = run_json(capsys, "selftest")
    assert code == 1
    assert {row["dtype"] for row in result["rows"] if not row["passed"]} == {"bfloat16"}


@pytest.mark.usefixtures("only_chunked")
def test_selftest_that_tests_nothing_does_not_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked, "unsupported", lambda op, pairs: "is switched off")
    monkeypatch.setattr(_selftest, "devices", lambda: [torch.device("cpu")])
    result = _selftest.run()
    assert not result["passed"]
    assert "chunked on cpu, float32, float16, bfloat16: not run (is switched off)" in _selftest.text(result)


def test_selftest_says_what_it_did_not_run() -> None:
    done = python("-m", "fastcl", "selftest", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "triton on cpu, float32, float16, bfloat16: not run (" in done.stdout and "checks pass" in done.stdout


# --- bench ----------------------------------------------------------------------------------------------------------

TINY = ("--rows", "16,34", "--dim", "9", "--rounds", "2", "--device", "cpu")


@pytest.mark.parametrize("loss", sorted(LOSSES))
def test_bench_measures_every_loss(loss: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "bench.json"
    assert cli.main(["bench", "--loss", loss, *TINY, "--json", str(file)]) == 0
    result = json.loads(file.read_text())
    assert capsys.readouterr().out.count("chunked") == 2
    assert result["command"].startswith(f"fastcl bench --loss {loss} --rows 16,34 ")
    assert [row["rows"] for row in result["rows"] if row["contender"] == "chunked"] == [16, 34]
    for row in result["rows"]:
        assert len(row["seconds"]) == 2 and row["median_seconds"] > 0 and row["peak_bytes"] > 0
        assert (row["times_faster"] is None) == (row["contender"] in _bench.DENSE)


def test_bench_writes_a_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert cli.main(["bench", *TINY, "--plot", str(tmp_path / "bench.png")]) == 0
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_bench_json_on_stdout_is_alone_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", *TINY, "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["rows"] and "chunked" in captured.err


def test_bench_skips_the_dense_loss_with_a_reason_and_no_figure(capsys: pytest.CaptureFixture[str]) -> None:
    _, result = run_json(capsys, "bench", *TINY, "--dense-limit-gb", "0")
    dense = [row for row in result["rows"] if row["contender"] in _bench.DENSE]
    assert len(dense) == 4
    for row in dense:
        assert "--dense-limit-gb is 0" in row["skipped"] and row["seconds"] is None and row["peak_bytes"] is None
    assert all(row["times_faster"] is None for row in result["rows"])


def test_bench_names_no_host_and_no_path(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["bench", *TINY, "--json"])
    text = capsys.readouterr().out
    assert str(ROOT) not in text and str(Path.home()) + os.sep not in text and platform.node() not in text


@pytest.mark.parametrize("name", sorted(_bench.USUAL))
def test_the_usual_dense_loss_is_the_same_loss(name: str) -> None:
    case = _bench.LOSSES[name]
    args, kwargs = case.inputs(13, 9, dtype=torch.float64)
    torch.testing.assert_close(
        _bench.USUAL[name](*args, **kwargs), getattr(reference, name)(*args, **kwargs), rtol=1e-12, atol=0
    )


# --- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["bench", "--rows", "5"], "got rows = 5; expected an even number"),
        (["bench", "--rows", "512", "--rounds", "0"], "got rounds = 0; expected 1 or more"),
        (["bench", "--json", "no-such-folder/x.json"], "got --json no-such-folder"),
        (["bench", "--plot", "no-such-folder/x.png"], "got --plot no-such-folder"),
        (["selftest", "--json", "no-such-folder/x.json"], "got --json no-such-folder"),
    ],
)
def test_a_mistake_is_one_line_and_code_2(words: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(words) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert captured.err.startswith(f"fastcl {words[0]}: {expected}")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "--device", "cuda"]) == 2
    assert "expected a CUDA device that torch can see" in capsys.readouterr().err


def test_no_matplotlib_is_told_before_measuring(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert cli.main(["bench", *TINY, "--plot", str(tmp_path / "x.png")]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and 'pip install "fastcl[bench]"' in captured.err


@pytest.mark.parametrize("error", [ValueError, TypeError, RuntimeError, FileNotFoundError])
def test_a_typed_error_becomes_one_line(
    error: type[Exception], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise error("got this;\nexpected that.")

    monkeypatch.setattr(_info, "report", fail)
    assert cli.main(["info"]) == 2
    assert capsys.readouterr().err == "fastcl info: got this; expected that.\n"


def test_a_mistake_in_training_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def run(args: object) -> int:
        raise TrainError("got no images; expected some. Give a folder.")

    monkeypatch.setattr(cli.command, "run", run)
    assert cli.main(["train"]) == 2
    assert capsys.readouterr().err == "fastcl train: got no images; expected some. Give a folder.\n"


@pytest.mark.parametrize("words", [["bake"], ["bench", "--rows", "many"], ["bench", "--loss", "hinge"]])
def test_unknown_words_are_code_2(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        cli.main(words)
    assert exit.value.code == 2 and "error: " in capsys.readouterr().err


# --- what `import fastcl` costs -------------------------------------------------------------------------------------

# All that `import fastcl` imports beside the standard library and what torch has imported already; benchmarks.imports
# says how long it takes.
_IMPORTED = {
    "fastcl", "fastcl._across", "fastcl._checks", "fastcl._explain", "fastcl._gathered", "fastcl._ops",
    "fastcl._settings", "fastcl._version", "fastcl.backends", "fastcl.backends.chunked", "fastcl.functional",
    "fastcl.functional._arguments", "fastcl.functional.labels", "fastcl.functional.pairs",
    "fastcl.functional.queries", "fastcl.functional.views", "fastcl.grad_cache", "fastcl.inspection",
    "fastcl.losses", "fastcl.pairwise", "fastcl.queue", "fastcl.reference", "fastcl.reference._dense",
    "fastcl.reference.labels", "fastcl.reference.pairs", "fastcl.reference.queries", "fastcl.reference.views",
    "fastcl.triples",
}  # fmt: skip


def test_importing_fastcl_prints_nothing_and_imports_nothing_heavy() -> None:
    script = """
import contextlib, io, sys, torch, warnings
before, said = set(sys.modules), io.StringIO()
warnings.simplefilter("error")
with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
    import fastcl
new = set(sys.modules) - before
assert not said.getvalue(), said.getvalue()
assert not torch.cuda.is_initialized()
print(*new)
"""
    done = python("-c", script)
    assert done.returncode == 0, done.stderr
    # torch 2.6 imports SymPy and more of itself to register an operator
    ours = {name for name in done.stdout.split() if name.split(".")[0] not in sys.stdlib_module_names}
    if torch.__version__.startswith("2.6."):
        ours = {name for name in ours if name.split(".")[0] not in ("torch", "sympy", "mpmath")}
    assert ours == _IMPORTED
