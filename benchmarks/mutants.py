"""Small wrongs planted in the formulas and kernels, one at a time: the tests must notice every one of them.

    OMP_NUM_THREADS=1 python -m benchmarks.mutants --json benchmarks/results/mutants.json
    python -m benchmarks.mutants --only chunked        the mutants of one part

A mutant is one replaced text, of the kind that an author could have written: wrong in numbers or in bounds, never in
style. Each runs in a copy of its own of the tracked files, whose kernels are compiled again where that text is theirs
(Ninja: nothing else is), with the few tests that are to fail; before that, those tests pass on a copy as it is, none
skipped. Killed is a mutant of which a test fails by an assertion. One that does not compile, does not import, ends in
another exception or takes too long proves nothing about what tests compare, and is told apart.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from datetime import datetime, timezone
from functools import cache
from multiprocessing import forkserver
from pathlib import Path
from typing import Any
from unittest.mock import patch

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 900.0  # seconds of a build, or of the tests of a mutant


@dataclass(frozen=True)
class Mutant:
    """A text that stands once in a file and another for it, what that breaks, and the tests that are to fail.

    Attributes:
        part: a name in ``PARTS``.
        tests: pytest's own names, ``file::test[parameters]``.
    """

    part: str
    file: str
    old: str
    new: str
    what: str
    tests: tuple[str, ...]


@dataclass(frozen=True)
class Outcome:
    """What became of a mutant.

    Attributes:
        kind: ``killed`` by an assertion; ``survived``; ``raised`` something else in a test; ``not built``; ``not run``,
            where tests were not found, not collected, skipped, or not set up; ``timed out``.
        test: the first that failed, or an empty text.
        words: the first line of what it said, or of what went wrong.
    """

    kind: str
    test: str = ""
    words: str = ""


class NotBuilt(Exception):
    """The compiler's words."""


def plant(mutant: Mutant, folder: Path) -> None:
    """Replaces the text in a copy.

    Raises:
        ValueError: it does not stand there exactly once, or nothing would change.
    """
    file = folder / mutant.file
    text = file.read_text(encoding="utf-8")
    if text.count(mutant.old) != 1 or mutant.old == mutant.new:
        raise ValueError(
            f"got {mutant.old!r} {text.count(mutant.old)} times in {mutant.file}; expected it once, and another text "
            f"in its place. Mend the mutant {mutant.what!r}."
        )
    file.write_text(text.replace(mutant.old, mutant.new), encoding="utf-8")


def tracked(folder: Path) -> None:
    """Copies the files that git tracks, as they are now."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).exists():  # else it is about to be removed
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)


def nothing_to_build(folder: Path) -> None:
    """Python is not compiled; the simulator of the CUDA kernels is by its tests, of an earlier build what changed."""


def native_module(folder: Path) -> None:
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=folder, env=_environment(folder), capture_output=True, text=True, timeout=LIMIT)
    report = folder / "fastcl" / "_native_build.txt"
    if done.returncode or report.exists():
        raise NotBuilt(report.read_text(encoding="utf-8") if report.exists() else done.stderr)


PARTS: dict[str, Callable[[Path], None]] = {
    "formulas": nothing_to_build,
    "chunked": nothing_to_build,
    "triton": nothing_to_build,
    "native": native_module,
    "cuda": nothing_to_build,
}


def _environment(folder: Path) -> dict[str, str]:
    """The same on every machine: no GPU, one thread, and no settings of the caller's."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("FASTCL_", "PYTEST_", "TEST_"))}
    return kept | {
        "CUDA_VISIBLE_DEVICES": "",
        "FASTCL_NATIVE": "cpu",  # nvcc is not asked
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "PYTHONPATH": str(folder),  # of processes that tests start
        "TEST_SIMULATOR": "build/simulator",
        "TRITON_INTERPRET": "1",
    }


# What all tests import and no mutant changes. Importing it takes longer than most tests: it is done once, in a process
# that forks itself for every mutant.
_IMPORTED = ("pytest", "torch", "torch._dynamo.testing", "triton", "triton.language", "triton.runtime.interpreter")
_LOG, _REPORT = "tests.log", "tests.xml"


@cache
def _forks() -> multiprocessing.context.ForkServerContext:
    """Whose processes are forks of one that has imported them, started here once: before there are threads."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(_IMPORTED))
    with patch.dict(os.environ, _environment(ROOT)):
        forkserver.ensure_running()
    return context


def _pytest(folder: str, arguments: list[str]) -> None:
    """In a process of its own: runs tests of a copy, of which it imports everything that is fastcl's."""
    os.chdir(folder)
    environment = _environment(Path(folder))
    os.environ.clear()
    os.environ.update(environment)
    with open(_LOG, "w", encoding="utf-8") as log:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(log.fileno(), stream.fileno())
    sys.path[:] = [folder, *(path for path in sys.path if Path(path or ".").resolve() != ROOT)]
    for name in [name for name in sys.modules if name.partition(".")[0] in ("benchmarks", "fastcl", "setup", "tests")]:
        del sys.modules[name]
    if not list(Path("fastcl").glob("_C.*")):  # nor is that of an installed fastcl taken
        sys.modules["fastcl._C"] = None  # type: ignore[assignment]
    sys.dont_write_bytecode = True  # which could be that of another text
    import pytest

    code = int(pytest.main(arguments))
    sys.stdout.flush()
    os._exit(code)


def tested(folder: Path, tests: tuple[str, ...], first_only: bool = True) -> Outcome:
    """Runs tests in a copy, up to the first failure or all of them."""
    arguments = ["-q", "-o", "addopts=", "-p", "no:cacheprovider", f"--junitxml={_REPORT}", "--basetemp=temporary"]
    process = _forks().Process(
        target=_pytest, args=(str(folder), [*arguments, *(["-x"] if first_only else []), *tests])
    )
    process.start()
    process.join(LIMIT)
    if process.exitcode is None:
        process.kill()
        process.join()
        return Outcome("timed out")
    log, report = folder / _LOG, folder / _REPORT
    if process.exitcode not in (0, 1) or not report.exists():
        return Outcome("not run", words=_first_line(log.read_text(encoding="utf-8") if log.exists() else ""))
    cases = list(ElementTree.parse(report).iter("testcase"))
    for case in cases:
        for kind in ("error", "skipped"):  # in setting it up, or in collecting it
            if (found := case.find(kind)) is not None:
                return Outcome("not run", _name(case), _first_line(found.get("message", "")))
    for case in cases:
        if (found := case.find("failure")) is not None:
            words = found.get("message", "")
            # pytest says of an assertion without words what it compared
            kind = "killed" if words.startswith(("AssertionError", "assert ")) else "raised"
            return Outcome(kind, _name(case), _first_line(words))
    return Outcome("survived" if process.exitcode == 0 and cases else "not run")


def _name(case: ElementTree.Element) -> str:
    return f"{case.get('classname', '').replace('.', '/')}.py::{case.get('name')}"


def _first_line(text: str) -> str:
    return next((line.strip() for line in text.splitlines() if line.strip()), "")[:160]


def run(mutant: Mutant, template: Path, build: Callable[[Path], None]) -> Outcome:
    """What becomes of a mutant in a copy of a folder that was built and whose tests pass.

    Raises:
        ValueError: its text does not stand there once.
    """
    with tempfile.TemporaryDirectory(prefix="mutant-") as name:
        folder = Path(name, "copy")
        shutil.copytree(template, folder, symlinks=True)  # times too, by which Ninja knows what is up to date
        plant(mutant, folder)
        try:
            build(folder)
        except subprocess.TimeoutExpired:
            return Outcome("timed out")
        except NotBuilt as failure:
            return Outcome("not built", words=_first_line(str(failure)))
        return tested(folder, mutant.tests)


def templates(chosen: list[Mutant], folder: Path) -> dict[str, Path]:
    """Of every part a copy that was built, as it is, and that passes all tests of its mutants.

    Raises:
        ValueError: a test does not pass there, or is skipped.
        NotBuilt: with the compiler's words.
    """
    made: dict[str, Path] = {}
    for part in dict.fromkeys(mutant.part for mutant in chosen):
        made[part] = folder / part
        tracked(made[part])
        PARTS[part](made[part])
        tests = tuple(dict.fromkeys(test for mutant in chosen if mutant.part == part for test in mutant.tests))
        outcome = tested(made[part], tests, first_only=False)
        if outcome.kind != "survived":
            raise ValueError(
                f"got {outcome.kind} ({outcome.test} {outcome.words}) of the tests of {part} as it is; expected all "
                "to run and to pass. Mend that first."
            )
        print(f"{part}: {len(tests)} tests pass as it is", flush=True)
    return made


def main(argv: list[str] | None = None) -> int:
    """Run the mutants; 1 if one is not killed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.mutants", description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, help="where to write the record")
    parser.add_argument("--update", action="store_true", help="run only what that record has not, or not as killed")
    parser.add_argument("--only", choices=PARTS, help="the mutants of this part")
    parser.add_argument("--workers", type=int, default=2, help="mutants at a time (default: %(default)s)")
    args = parser.parse_args(argv)
    if args.update and not args.json:
        parser.error("--update is of a record: name it with --json")
    from fastcl._info import commit, cpu_model, versions  # a copy imports a fastcl of its own

    measured_at = commit()  # before anything is written
    rows: dict[Mutant, dict[str, object]] = {}
    if args.update and args.json.exists():
        rows = killed_before(json.loads(args.json.read_text(encoding="utf-8")))
    chosen = [mutant for mutant in MUTANTS if args.only in (None, mutant.part) and mutant not in rows]
    with tempfile.TemporaryDirectory(prefix="mutants-") as name:
        made = templates(chosen, Path(name))

        def one(mutant: Mutant) -> Outcome:
            outcome = run(mutant, made[mutant.part], PARTS[mutant.part])
            print(f"{outcome.kind:<10} {mutant.part:<9} {mutant.what}: {outcome.test} {outcome.words}", flush=True)
            return outcome

        with ThreadPoolExecutor(args.workers) as pool:
            outcomes = list(pool.map(one, chosen))
    rows |= {mutant: row(mutant, outcome, measured_at) for mutant, outcome in zip(chosen, outcomes, strict=True)}
    killed = sum(outcome.kind == "killed" for outcome in outcomes)
    print(f"{killed} of {len(outcomes)} mutants were killed")
    if args.json:
        result = {
            "command": "OMP_NUM_THREADS=1 python -m benchmarks.mutants --json benchmarks/results/mutants.json",
            "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
            "commit": ", ".join(dict.fromkeys(str(rows[mutant]["commit"]) for mutant in MUTANTS if mutant in rows)),
            "versions": versions(),
            "machine": {"device": cpu_model(), "threads": 1, "workers": args.workers},
            "rows": [rows[mutant] for mutant in MUTANTS if mutant in rows],
        }
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return int(killed < len(outcomes))


def row(mutant: Mutant, outcome: Outcome, commit: str | None) -> dict[str, object]:
    """Of the record."""
    found = {"outcome": outcome.kind, "test": outcome.test, "words": outcome.words}
    return {**asdict(mutant), "tests": list(mutant.tests), **found, "commit": commit}


def killed_before(record: dict[str, Any]) -> dict[Mutant, dict[str, object]]:
    """The rows of a record, by their mutants."""
    names = [field.name for field in fields(Mutant)]
    return {
        Mutant(**{name: row[name] for name in names} | {"tests": tuple(row["tests"])}): row
        for row in record["rows"]
        if row["outcome"] == "killed"
    }


# ---- the mutants -----------------------------------------------------------------------------------------------------


def _loss(case: str, backend: str = "chunked", shape: str = "5-48") -> str:
    return f"tests/test_functional.py::test_matches_reference[{case}-{backend}-{shape}]"


_VIEWS, _LABELS, _QUERIES = (f"fastcl/functional/{name}.py" for name in ("views", "labels", "queries"))
_PAIRWISE, _HINGES, _TRIPLES, _QUEUE = (f"fastcl/{name}.py" for name in ("pairwise", "hinges", "triples", "queue"))

_FORMULAS = [
    Mutant(
        "formulas", "fastcl/functional/_arguments.py",
        "weight = (weights if counted is None else weights * counted).sum()",
        "weight = weights.sum()",
        "a weighted mean divides by the weights of rows that are not counted, too",
        ("tests/test_functional.py::test_weights[mean-supcon]",),
    ),
    Mutant(
        "formulas", _VIEWS,
        "row_dot(z, _later(z, shift * batch)) * scale - n",
        "row_dot(z, _later(z, shift)) * scale - n",
        "NT-Xent: the partner is the next row, as of views that alternate",
        (_loss("nt_xent"),),
    ),
    Mutant(
        "formulas", _VIEWS,
        "        image = arange(z) % max(batch, 1)\n    n = ",
        "        image = arange(z)\n    n = ",
        "NT-Xent: the positive stands among the negatives, so it counts twice",
        (_loss("nt_xent"),),
    ),
    Mutant(
        "formulas", _VIEWS,
        "w = (2 - half.shape[0] * half.softmax(0)).repeat(2)",
        "w = (2 - half.softmax(0)).repeat(2)",
        "DCLW: the mean under the exponential is a sum",
        (_loss("dclw"),),
    ),
    Mutant(
        "formulas", _VIEWS,
        "n + kept - math.log1p(-tau_plus), -torch.inf",
        "n + kept, -torch.inf",
        "debiased NT-Xent: not divided by 1 - tau_plus",
        (_loss("debiased_nt_xent"),),
    ),
    Mutant(
        "formulas", _VIEWS,
        "n = n - pair_logsumexp(z, scale=beta * scale, drop=image) + log_count",
        "n = n - pair_logsumexp(z, scale=beta * scale, drop=image)",
        "hard NT-Xent: the number of negatives is left out",
        (_loss("hard_nt_xent"),),
    ),
    Mutant(
        "formulas", _LABELS,
        "loss = loss / (scale * base_temperature)",
        "loss = loss / base_temperature",
        "SupCon: a factor of the temperature is missing",
        (_loss("supcon-one"),),
    ),
    Mutant(
        "formulas", _LABELS,
        "lone = count == 2",
        "lone = count <= 3",
        "SupCon: a row with two positives takes the form for one",
        (_loss("supcon", shape="33-129"),),
    ),
    Mutant(
        "formulas", _LABELS,
        "near_enough = (-z, z, epsilon - least_similar.squeeze(1))",
        "near_enough = (-z, z, -epsilon - least_similar.squeeze(1))",
        "multi-similarity: epsilon narrows the mining of negatives",
        (_loss("multi_similarity-mined", shape="33-129"),),
    ),
    Mutant(
        "formulas", _LABELS,
        "positive = (row_dot(z, _rows(proxies, labels)) - margin) * scale",
        "positive = row_dot(z, _rows(proxies, labels)) * scale - margin",
        "CosFace: the margin is in logits, not in cosines",
        (_loss("cosface"),),
    ),
    Mutant(
        "formulas", _QUERIES,
        "logsigmoid(cosine * text_scale - to_image)",
        "logsigmoid(cosine * text_scale - to_text)",
        "CLIP: both directions take the log-sum-exp of one",
        (_loss("clip"),),
    ),
    Mutant(
        "formulas", _QUERIES,
        "positive = logsigmoid(row_dot(image, text) * scale + bias)",
        "positive = logsigmoid(row_dot(image, text) * scale)",
        "SigLIP: the logit of the pair itself has no bias",
        (_loss("siglip"),),
    ),
    Mutant(
        "formulas", _QUERIES,
        "col_bias=-log_q",
        "col_bias=log_q",
        "in-batch softmax: popular items are favoured, not discounted",
        (_loss("in_batch_softmax"),),
    ),
    Mutant(
        "formulas", _QUERIES,
        "q, k = scale_gradient(q, share), scale_gradient(k, share)",
        "q = scale_gradient(q, share)",
        "hardness: the gradient of the keys is that of the harder scale",
        (_loss("info_nce-own"),),
    ),
    Mutant(
        "formulas", _QUERIES,
        "2 / inverse(temperature, q0) * (one + other)",
        "2 * (one + other)",
        "MoCo v3: a factor of the temperature is missing",
        (_loss("moco_v3"),),
    ),
    Mutant(
        "formulas", _QUERIES,
        "limit = agreed - margin *",
        "limit = agreed + margin *",
        "GIST: the margin has the wrong sign",
        (_loss("gist-margin", shape="130-8"),),
    ),
    Mutant(
        "formulas", _PAIRWISE,
        "half = 0.5 if pairs.symmetric else 1.0",
        "half = 1.0",
        "one set: the gradients of scale and biases are counted twice",
        ("tests/test_pairwise.py::test_one_set[chunked-False-plain-logsumexp]",),
    ),
    Mutant(
        "formulas", _PAIRWISE,
        "dq.mul(pairs.scale) if want_q else None",
        "dq.mul_(pairs.scale) if want_q else None",
        "the softplus total: dq is scaled in place before the gradient of the scale reads it",
        (_loss("siglip"),),
    ),
    Mutant(
        "formulas", _PAIRWISE,
        "None if dscale is None else (grad * dscale).sum()",
        "None if dscale is None else dscale.sum()",
        "frozen columns: the gradient of the scale forgets the upstream gradient",
        ("tests/test_pairwise.py::test_frozen_side[chunked-k-logsumexp]",),
    ),
    Mutant(
        "formulas", _PAIRWISE,
        "stack.masked_fill(empty, 0).logsumexp(0)",
        "stack.logsumexp(0)",
        "merged blocks: a row that is empty in all of them sends NaN",
        ("tests/test_pairwise.py::test_blocks_of_columns_merge",),
    ),
    Mutant(
        "formulas", _HINGES,
        "w[:, self.once :] *= 2",
        "w[:, self.once :] *= 1",
        "hinges of one set: the gradient of mirrored pairs is not doubled",
        ("tests/test_hinges.py::test_against_the_matrix[rows-60-cosine]",),
    ),
    Mutant(
        "formulas", _TRIPLES,
        'w = 2 * w if distance == "squared"',
        'w = w if distance == "squared"',
        "squared distances: the derivative of a square lacks its 2",
        ("tests/test_triples.py::test_batch_all_against_loops[100-2-squared]",),
    ),
    Mutant(
        "formulas", _TRIPLES,
        "index_add_(0, first, rows)[first] - rows",
        "index_add_(0, first, rows)[first]",
        "class sums: a row is among its own positives",
        ("tests/test_triples.py::test_class_sums[4]",),
    ),
    Mutant(
        "formulas", _QUEUE,
        "at = torch.arange(skipped, batch, device=keys.device) + self.pointer",
        "at = torch.arange(batch - skipped, device=keys.device) + self.pointer",
        "the queue: of a batch larger than it, rows stand in wrong places",
        ("tests/test_queue.py::test_the_newest_rows_stay[batches5]",),
    ),
    Mutant(
        "formulas", "fastcl/losses.py",
        "(-log_scale.clamp(max=math.log(_MAX_SCALE))).exp()",
        "(-log_scale.clamp(max=_MAX_SCALE)).exp()",
        "a learned temperature: the limit of the scale is taken for that of its logarithm",
        ("tests/test_losses.py::test_a_learned_temperature_moves_stays_positive_and_survives_a_checkpoint[nt_xent]",),
    ),
    Mutant(
        "formulas", "fastcl/distributed/_pairs.py",
        "dscale = 0.5 * (x * dx).sum()",
        "dscale = (x * dx).sum()",
        "over ranks: the gradient of the scale counts a pair from both of its rows",
        ("tests/test_distributed.py::test_every_loss_is_that_of_one_process[[8, 5]-dcl-gather]",),
    ),
]  # fmt: skip

_CHUNKED = [
    Mutant(
        "chunked", "fastcl/backends/chunked.py",
        "if both or (pairs.symmetric and cols != rows):",
        "if both or pairs.symmetric:",
        "sums of one set: tiles on the diagonal count for their columns, too",
        ("tests/test_pairwise.py::test_one_set[chunked-False-plain-logsumexp]",),
    ),
    Mutant(
        "chunked", "fastcl/backends/chunked.py",
        "for j in range(i if pairs.symmetric else 0, len(y), side):",
        "for j in range(i if pairs.symmetric else 0, len(y) - 1, side):",
        "the last tile of columns is skipped where it has one column",
        ("tests/test_pairwise.py::test_tiles_merge",),
    ),
    Mutant(
        "chunked", "fastcl/backends/chunked.py",
        "        if pairs.symmetric and cols == rows:\n            continue\n",
        "",
        "gradients of one set: tiles on the diagonal count twice",
        ("tests/test_pairwise.py::test_one_set[chunked-False-plain-logsumexp]",),
    ),
    Mutant(
        "chunked", "fastcl/backends/chunked.py",
        "at = torch.cat([indices[rows], at + cols.start], 1)",
        "at = torch.cat([indices[rows], at], 1)",
        "neighbours: indices count from the start of a tile",
        ("tests/test_pairwise.py::test_tiles_merge",),
    ),
    Mutant(
        "chunked", "fastcl/backends/chunked.py",
        "((grad - unit * (unit * grad).sum(1, keepdim=True)) / length)",
        "(grad / length)",
        "the Jacobian of normalisation has no projection",
        ("tests/test_pairwise.py::test_l2_normalize[dtype1-False-chunked]",),
    ),
    Mutant(
        "chunked", "fastcl/backends/chunked.py",
        "short = largest < torch.finfo(dtype).tiny",
        "short = largest < torch.finfo(dtype).eps",
        "rows below 1e-7 are taken for rows of zeros",
        ("tests/test_pairwise.py::test_l2_normalize_neither_over_nor_underflows[dtype1-1e-30-chunked]",),
    ),
    Mutant(
        "chunked", "fastcl/backends/chunked.py",
        "s += pairs.row_bias[:, None]",
        "s += pairs.row_bias[:, None] * pairs.scale",
        "the bias of rows is multiplied by the scale",
        ("tests/test_pairwise.py::test_two_sets[chunked-False-3.0-row bias-logsumexp]",),
    ),
    Mutant(
        "chunked", "fastcl/backends/chunked.py",
        "s.masked_fill_(guide > pairs.row_limit[:, None], -torch.inf)",
        "s.masked_fill_(guide < pairs.row_limit[:, None], -torch.inf)",
        "the guide's mask lies on the wrong side of its limit",
        ("tests/test_pairwise.py::test_guide[2-False-plain-logsumexp-chunked]",),
    ),
    Mutant(
        "chunked", "fastcl/backends/chunked.py",
        'return torch.float32 if x.device.type == "mps" else torch.float64',
        "return torch.float32",
        "sums over tiles are accumulated in fp32, those of fp64 rows, too",
        ("tests/test_functional.py::test_doubles[mean-siglip-chunked]",),
    ),
    Mutant(
        "chunked", "fastcl/backends/chunked.py",
        "return s.sub_(row_lse[rows, None]).exp_().mul_(row_grad[rows, None])",
        "return s.sub_(row_lse.amax()).exp_().mul_(row_grad[rows, None])",
        "weights take the largest log-sum-exp, not that of their row",
        ("tests/test_pairwise.py::test_two_sets[chunked-False-3.0-plain-logsumexp]",),
    ),
]  # fmt: skip

_KERNELS = "fastcl/backends/_triton_kernels.py"


def _variant(words: str) -> str:
    return f"tests/test_triton.py::test_every_variant[{words}]"


_TRITON = [
    Mutant(
        "triton", _KERNELS,
        "tile = tl.load(at, mask=(r < COUNT)[:, None] & (d < D)[None, :], other=0.0)",
        "tile = tl.load(at, mask=(r < COUNT)[:, None] & (d <= D)[None, :], other=0.0)",
        "a row is read one feature too far",
        (_variant("whole rows-both-nothing-exp-dtype0"),),
    ),
    Mutant(
        "triton", _KERNELS,
        'return tl.where((cols < N)[None, :], s, float("-inf"))',
        'return tl.where((cols <= N)[None, :], s, float("-inf"))',
        "one column behind the last is kept",
        (_variant("whole rows-both-nothing-exp-dtype0"),),
    ),
    Mutant(
        "triton", _KERNELS,
        "s = tl.where(row_key[:, None] != col_key[None, :], float(\"-inf\"), s)",
        "s = tl.where(row_key[:, None] < col_key[None, :], float(\"-inf\"), s)",
        "pairs of different classes are kept where the row's is the larger number",
        (_variant("whole rows-both-everything-exp-dtype0"),),
    ),
    Mutant(
        "triton", _KERNELS,
        "                    row_low, row_high = _key_range(row_ranges, row, M, BLOCK_M, RANGE)\n"
        "                    near |= (row_low <= col_high) & (col_low <= row_high)",
        "                    row_low, row_high = _key_range(row_ranges, row, M, BLOCK_M, RANGE)\n"
        "                    near |= (row_low < col_high) & (col_low < row_high)",
        "sums: ranges of keys that touch in one key ask for no mask",
        ("tests/test_triton.py::test_key_ranges_that_touch_in_one_key",),
    ),
    Mutant(
        "triton", _KERNELS,
        "off = tl.where(row // SQUARE != col // SQUARE, 1.0, 0.0)",
        "off = tl.where(row != col, 1.0, 0.0)",
        "sums of one set: tiles beside the diagonal of a square count twice",
        ("tests/test_triton.py::test_one_set_of_many_tiles[torch.float32-32-32]",),
    ),
    Mutant(
        "triton", _KERNELS,
        "            visited = stop\n",
        "            visited = first\n",
        "sums: the second panel of a unit overwrites what the first left",
        ("tests/test_triton.py::test_one_set_of_many_tiles[torch.float32-32-3]",),
    ),
    Mutant(
        "triton", _KERNELS,
        "suspect = (total > 0.0) & (total < tl.exp2(24.0 - room))",
        "suspect = total < 0.0",
        "rows whose terms underflowed under the constant shift are not repaired",
        ("tests/test_triton.py::test_rows_that_a_constant_shift_cannot_serve_are_repaired[both-200.0]",),
    ),
    Mutant(
        "triton", _KERNELS,
        "total = total * tl.exp2((peak - base) * _LOG2E) + tl.sum(",
        "total = total + tl.sum(",
        "the running sum is not scaled down when the maximum rises",
        ("tests/test_triton.py::test_rows_that_a_constant_shift_cannot_serve_are_repaired[both-1500.0]",),
    ),
    Mutant(
        "triton", _KERNELS,
        "if wide > 0.0:",
        "if wide > 1.0:",
        "one exponential serves log-sum-exps that lie too far apart for it",
        ("tests/test_triton.py::test_log_sum_exps_far_apart_keep_their_weights",),
    ),
    Mutant(
        "triton", _KERNELS,
        "g *= tl.sigmoid(n - tl.load(positive + rows, mask=rows < M, other=0.0))",
        "g *= tl.sigmoid(tl.load(positive + rows, mask=rows < M, other=0.0) - n)",
        "the fused loss: the gradient of easy pairs and of hard ones are exchanged",
        ("tests/test_triton.py::test_contrastive_is_the_composition[10.0-True-torch.float32]",),
    ),
    Mutant(
        "triton", _KERNELS,
        "return (dz - z * tl.sum(z * dz, 1)[:, None]) / norm",
        "return dz / norm",
        "the Jacobian of normalisation has no projection",
        ("tests/test_triton.py::test_contrastive_is_the_composition[10.0-True-torch.float32]",),
    ),
    Mutant(
        "triton", _KERNELS,
        "tl.store(dx + at[:, None] * D + d[None, :], out / gain,",
        "tl.store(dx + at[:, None] * D + d[None, :], out,",
        "the gain of fp16 weights is not taken out again",
        ("tests/test_triton.py::test_fp16_weights_neither_vanish_nor_overflow[1e-09-False]",),
    ),
    Mutant(
        "triton", _KERNELS,
        "tl.abs(tl.load(grad + at * STRIDE, mask=at < COUNT, other=0.0))",
        "tl.load(grad + at * STRIDE, mask=at < COUNT, other=0.0)",
        "the gain of fp16 weights looks at positive gradients only",
        ("tests/test_triton.py::test_fp16_weights_neither_vanish_nor_overflow[-1e-09-False]",),
    ),
    Mutant(
        "triton", _KERNELS,
        "acc = _dot(e.to(k.dtype), k, acc * keep[:, None], PRECISION)",
        "acc = _dot(e.to(k.dtype), k, acc, PRECISION)",
        "frozen columns: the gradient so far is not scaled down when the maximum rises",
        ("tests/test_triton.py::test_frozen_columns_in_one_pass[False-torch.float32]",),
    ),
    Mutant(
        "triton", _KERNELS,
        "total += factor * tl.load(totals + at, mask=rows < M, other=0.0)",
        "total += tl.load(totals + at, mask=rows < M, other=0.0)",
        "frozen columns: splits are added as if they had one maximum",
        ("tests/test_triton.py::test_frozen_columns_in_one_pass[False-torch.float32]",),
    ),
    Mutant(
        "triton", _KERNELS,
        "rank = (bits.to(tl.int64) << 32) | (0x7FFFFFFF - cols).to(tl.int64)[None, :]",
        "rank = (bits.to(tl.int64) << 32) | (0x7FFFFFFF - cols // 2).to(tl.int64)[None, :]",
        "neighbours: two columns share a rank",
        ("tests/test_triton.py::test_topk_is_in_order_and_the_first_of_equals_first[2-torch.float32]",),
    ),
    Mutant(
        "triton", "fastcl/backends/triton.py",
        "_product(written[:, after].T, strip.x, dy[cols][after], first > 0)",
        "_product(written[:, after].T, strip.x, dy[cols][after], False)",
        "strips: each overwrites what those before gave to the columns",
        (_variant("strips-both-nothing-exp-dtype0"),),
    ),
]  # fmt: skip

_CPU = [
    Mutant(
        "native", "csrc/kernels.cpp",
        "I in = lanes() + col < all(t.cols);",
        "I in = lanes() + col <= all(t.cols);",
        "one column behind the last is kept",
        ("tests/test_native.py::test_every_instruction_set[baseline-9.0-False-True-exp]",),
    ),
    Mutant(
        "native", "csrc/kernels.cpp",
        "v = at == all(row) ? v * 0.5f : v;",
        "v = at == all(row) ? v : v;",
        "one set: the diagonal is not halved, and counts as a row and as a column",
        ("tests/test_native.py::test_every_instruction_set[baseline-9.0-True-False-exp]",),
    ),
    Mutant(
        "native", "csrc/kernels.cpp",
        "const int from = upper && !transposed ? r / KP * KP : 0;",
        "const int from = upper && !transposed ? r / KP * KP + KP : 0;",
        "gradients of one set: the products of a triangle begin one column late",
        ("tests/test_native.py::test_every_instruction_set[baseline-9.0-True-False-exp]",),
    ),
    Mutant(
        "native", "csrc/kernels.cpp",
        "times(basis, u + r, v + p * NR);",
        "times(basis, u + r, v + p * VL);",
        "weights take the factors of the wrong columns",
        ("tests/test_native.py::test_every_instruction_set[baseline-9.0-False-False-exp]",),
    ),
    Mutant(
        "native", "csrc/kernels.cpp",
        "p = p * z + all(2.f / 9);",
        "p = p * z + all(1.f / 9);",
        "softplus: a coefficient of its series is half of what it should be",
        ("tests/test_native.py::test_softplus_keeps_its_digits_over_the_whole_range[baseline]",),
    ),
    Mutant(
        "native", "csrc/kernels.cpp",
        "sum += more * __builtin_exp2(double(most) - top);",
        "sum += more;",
        "the safe path: a tile below the maximum is added without its factor",
        ("tests/test_native.py::test_every_instruction_set[baseline-700.0-False-False-exp]",),
    ),
    Mutant(
        "native", "csrc/kernels.cpp",
        "double total = dot(a[i] + even, b[j] + even, depth - even);",
        "double total = 0;",
        "fp64: the last features, which fill no vector, are left out",
        ("tests/test_native.py::test_doubles_on_every_instruction_set[baseline-9.0-False-False-exp]",),
    ),
    Mutant(
        "native", "csrc/elements.hpp",
        "return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);",
        "return uint16_t(bits >> 16);",
        "bf16 is cut off, not rounded",
        ("tests/test_native.py::test_halves_are_rounded_as_torch_rounds_them",),
    ),
    Mutant(
        "native", "csrc/engine.cpp",
        "const auto fits = [](i64 v) { return v == int32_t(v); };",
        "const auto fits = [](i64) { return true; };",
        "keys beyond 32 bits are cut off",
        ("tests/test_native.py::test_keys_beyond_32_bits",),
    ),
    Mutant(
        "native", "csrc/engine.cpp",
        "[&](double s) { return s == 0 || (s >= least && s < INF); }",
        "[&](double s) { return s == 0 || s < INF + 0 * least; }",
        "sums that lost terms to underflow are not computed again",
        ("tests/test_native.py::test_every_instruction_set[baseline-700.0-False-False-exp]",),
    ),
    Mutant(
        "native", "csrc/engine.cpp",
        "for (i64 i = 0; i < (2 * d == bm ? d : bm); i++) add(i, (i + d) % bm);",
        "for (i64 i = 0; i < bm; i++) add(i, (i + d) % bm);",
        "one set of an even number of blocks: the tiles half way round count twice",
        (_loss("nt_xent", "native", "130-8"),),
    ),
    Mutant(
        "native", "csrc/engine.cpp",
        "const double inverse = sum[i] == 0 ? 0 : 1 / sum[i];",
        "const double inverse = 1 / sum[i];",
        "frozen columns: a row without a pair divides 0 by 0",
        ("tests/test_pairwise.py::test_a_row_without_a_pair_sends_no_gradient[native-True-logsumexp]",),
    ),
    Mutant(
        "native", "csrc/engine.cpp",
        "    t.guide_ld = ld;\n    t.plain = false;\n",
        "    t.guide_ld = ld;\n",
        "tiles inside the matrix forget that there is a guide",
        ("tests/test_pairwise.py::test_guide_over_many_tiles[(300, 500)-native]",),
    ),
    Mutant(
        "native", "csrc/engine.cpp",
        "  scaled(dy, p.n);\n",
        "",
        "the common factor of weights is not taken out of the gradient of the columns",
        ("tests/test_native.py::test_every_instruction_set[baseline-9.0-False-False-exp]",),
    ),
    Mutant(
        "native", "csrc/topk.hpp",
        "values[place] = logits[c], indices[place] = first + c;",
        "values[place] = logits[c], indices[place] = c;",
        "neighbours: indices count from the start of a tile",
        ("tests/test_native.py::test_topk_over_several_tiles[dtype0]",),
    ),
    Mutant(
        "native", "csrc/rows.hpp",
        "for (; k < count; k++) chain[0] = combine(chain[0], term(k));",
        "for (; k + 1 < count; k++) chain[0] = combine(chain[0], term(k));",
        "lengths: the last feature is left out where eight do not divide their number",
        ("tests/test_pairwise.py::test_l2_normalize[dtype1-False-native]",),
    ),
    Mutant(
        "native", "csrc/normalize.cpp",
        "T::put((up[k] - unit[k] * along) * inverse)",
        "T::put(up[k] * inverse + 0 * along)",
        "the Jacobian of normalisation has no projection",
        ("tests/test_pairwise.py::test_l2_normalize[dtype1-False-native]",),
    ),
    Mutant(
        "native", "csrc/contrastive.cpp",
        "for (i64 a = pair; a < anchors; a += half) share",
        "for (i64 a = pair; a < half; a += half) share",
        "a positive receives nothing from the anchors of the second view",
        ("tests/test_native.py::test_contrastive[raw0-dtype0-2e-06-True-6.0]",),
    ),
    Mutant(
        "native", "csrc/contrastive.cpp",
        "read<R>(x, i, own);  // not as it was rounded",
        "for (double& u : own) u = inverse > 0 ? u / inverse : 0;",
        "the Jacobian takes the row as it was rounded",
        ("tests/test_native.py::test_contrastive[raw1-dtype1-0.004-True-6.0]",),
    ),
    Mutant(
        "native", "csrc/contrastive.cpp",
        "log = std::log1p(std::exp(-std::fabs(s)))",
        "log = std::log(1 + float(std::exp(-std::fabs(s))))",
        "easy pairs have no loss",
        ("tests/test_native.py::test_contrastive_keeps_the_digits_of_easy_pairs",),
    ),
    Mutant(
        "native", "csrc/contrastive.cpp",
        "anchors.lse[a] == -std::numeric_limits<float>::infinity() ? -anchors.lse[a] : anchors.lse[a]",
        "anchors.lse[a]",
        "a row without negatives weighs what it has not",
        ("tests/test_native.py::test_contrastive_of_a_pair_that_has_no_negatives",),
    ),
]  # fmt: skip


def _simulated(words: str) -> str:
    return f"tests/test_cuda.py::test_{words}"


_CUDA = [
    Mutant(
        "cuda", "csrc/cuda/pairs.cuh",
        "return !ptx::guard(rows.low > cols.high || cols.low > rows.high);",
        "return !ptx::guard(rows.low >= cols.high || cols.low >= rows.high);",
        "ranges of keys that touch in one key ask for no mask",
        (_simulated("key_ranges_that_touch_in_one_key[ampere]"),),
    ),
    Mutant(
        "cuda", "csrc/cuda/pairs.cuh",
        "u * (1 / 7.f + u * (1 / 9.f +",
        "u * (1 / 7.f + u * (1 / 18.f +",
        "softplus: a coefficient of its series is half of what it should be",
        (_simulated("softplus_keeps_its_digits_over_the_whole_range[ampere]"),),
    ),
    Mutant(
        "cuda", "csrc/cuda/tile.cuh",
        "power = fmaf(power, f, 0.240247443f);",
        "power = fmaf(power, f, 0.240227443f);",
        "2^v by a polynomial: one digit of a coefficient",
        (_simulated("the_polynomial_is_as_exact_as_its_comment_says"),),
    ),
    Mutant(
        "cuda", "csrc/cuda/tile.cuh",
        "factors[0] = L == Link::softplus || balance.wide || !side.sides.row.grad ? s.grad : s.scaled;",
        "factors[0] = L == Link::softplus || !side.sides.row.grad ? s.grad : s.scaled;",
        "columns bring scaled gradients where log-sum-exps lie too far apart for them",
        (_simulated("log_sum_exps_far_apart_keep_their_weights[ampere]"),),
    ),
    Mutant(
        "cuda", "csrc/cuda/sums.cuh",
        "plan.col_parts && !(p.symmetric && !ptx::guard(row < at.col));",
        "plan.col_parts && !(p.symmetric && !ptx::guard(row <= at.col));",
        "sums of one set: the first tile of the diagonal's square counts for its columns, too",
        (_simulated("one_set[0-ampere-150-64-exp-dtype0]"),),
    ),
    Mutant(
        "cuda", "csrc/cuda/sums.cuh",
        "total, own, p.m, row < at.visited);",
        "total, own, p.m, false);",
        "sums: the second panel of a unit overwrites what the first left",
        (_simulated("several_panels_and_splits[0-ampere-False]"),),
    ),
    Mutant(
        "cuda", "csrc/cuda/grad.cuh",
        "            ptx::mma_m16n8k16<kOperand<T>>(out[d / 16], a, y[2], y[3]);\n",
        "",
        "gradients of fp32 rows: weights are multiplied with their upper halves only",
        (_simulated("two_sets[0-ampere-False-exp-dtype1]"),),
    ),
    Mutant(
        "cuda", "csrc/cuda/grad.cuh",
        "each = (tile_count + side.splits - 1) / side.splits;",
        "each = tile_count / side.splits;",
        "gradients: the tiles that splits do not divide are skipped",
        (_simulated("gradients_of_few_rows_split_the_columns[ampere]"),),
    ),
    Mutant(
        "cuda", "csrc/cuda/sides.cuh",
        "return u.positive ? grad * sigmoid(u.lse[i] - u.positive[i]) : grad;",
        "return u.positive ? grad * sigmoid(u.positive[i] - u.lse[i]) : grad;",
        "the fused loss: the gradient of easy pairs and of hard ones are exchanged",
        (_simulated("contrastive[ampere-True-raw0-dtype0]"),),
    ),
    Mutant(
        "cuda", "csrc/cuda/sides.cuh",
        "most = fmaxf(most, fabsf(upstream(u, i)));",
        "most = fmaxf(most, upstream(u, i));",
        "the gain of fp16 weights looks at positive gradients only",
        (_simulated("fp16_weights_neither_vanish_nor_overflow[ampere--1e-09]"),),
    ),
    Mutant(
        "cuda", "csrc/cuda/vectors.cuh",
        "total != 0.0f && !(total >= ptx::exp2(24.0f - room) && total < INFINITY);",
        "total != 0.0f && !(total < INFINITY);",
        "rows whose terms underflowed under the constant shift are not repaired",
        (_simulated("rows_that_a_constant_shift_cannot_serve_are_repaired[ampere-False-200.0]"),),
    ),
    Mutant(
        "cuda", "csrc/cuda/vectors.cuh",
        "total = total * (peak == higher ? 1.0f : ptx::exp2((peak - higher) * kLog2E)) +",
        "total = total +",
        "the running sum is not scaled down when the maximum rises",
        (_simulated("rows_that_a_constant_shift_cannot_serve_are_repaired[ampere-False-1500.0]"),),
    ),
    Mutant(
        "cuda", "csrc/cuda/contrastive.cuh",
        "dz.v[e] = (dz.v[e] - z.v[e] * radial) / *length;",
        "dz.v[e] = (dz.v[e] - 0.0f * radial) / *length;",
        "the Jacobian of normalisation has no projection",
        (_simulated("contrastive[ampere-True-raw0-dtype0]"),),
    ),
    Mutant(
        "cuda", "csrc/cuda/contrastive.cuh",
        "const float share = -upstream(sides.row, i) - (",
        "const float share = -upstream(sides.row, i) + (",
        "the positive receives the second direction with the wrong sign",
        (_simulated("contrastive[ampere-False-raw0-dtype0]"),),
    ),
    Mutant(
        "cuda", "csrc/cuda/contrastive.cuh",
        "ranges[2 * i + 1] = of_one_view ? last % v.count : v.count - 1;",
        "ranges[2 * i + 1] = last % v.count;",
        "a range of keys in which one view ends and the other begins has the largest key of the second",
        (_simulated("contrastive_where_a_range_of_keys_is_of_both_views[ampere]"),),
    ),
    Mutant(
        "cuda", "csrc/cuda/hopper_sums.cuh",
        "                                     box + k > 0);",
        "                                     k > 0);",
        "sums on Hopper: the products of the first 64 features are overwritten by the next",
        (_simulated("one_set[0-hopper-70-128-exp-dtype0]"),),
    ),
    Mutant(
        "cuda", "csrc/cuda/hopper_grad.cuh",
        "        accumulate(weighed.stage);\n        multiply(tiles.stage);",
        "        accumulate(tiles.stage);\n        multiply(tiles.stage);",
        "gradients on Hopper: weights are multiplied with the tile after their own",
        (_simulated("one_set[0-hopper-150-64-exp-dtype0]"),),
    ),
    Mutant(
        "cuda", "csrc/cuda/hopper_wide.cuh",
        "const float2 before = product.add ? *out : float2{0.0f, 0.0f};",
        "const float2 before = float2{0.0f, 0.0f};",
        "strips on Hopper: each overwrites what those before gave to the columns",
        (_simulated("strips_of_long_rows[0-hopper-300-330-328-exp-dtype0]"),),
    ),
]  # fmt: skip

MUTANTS = (*_FORMULAS, *_CHUNKED, *_TRITON, *_CPU, *_CUDA)

if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, OSError, NotBuilt) as error:
        sys.exit(f"benchmarks.mutants: {error}")  # exit code 1
