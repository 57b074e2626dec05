"""A new loss is four edits (CONTRIBUTING.md): they are made here, in a copy of the checkout, and the rest follows.

The loss is InfoLOOB, which CLOOB trains with (Fürst et al. 2021, arXiv:2110.11316): CLIP's, whose denominators lack the
positive, and the sum of its two directions.
"""

from __future__ import annotations

import importlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import fastcl
from fastcl import _bench, _selftest, functional

ROOT = Path(__file__).parents[1]
LIMIT = 240  # seconds for what runs in the copy; it takes about 15 on an idle core
NAME, LABEL = "info_loob", "info_loob-logits"  # the label tells the tests of this loss from those of others

SIGNATURE = """

def info_loob(
    q: Tensor,
    k: Tensor,
    *,
    temperature: Scalar,
    weights: Tensor | None = None,
    reduction: str = "mean",
    normalize: bool = False,
) -> Tensor:
"""
MEANING = '''\
    """Two cross-entropies, keys of queries and queries of keys, whose denominators lack the positive."""
    q, k = unit(q, normalize), unit(k, normalize)
    s = q @ k.T / temperature
    n, m = (logsumexp(t, not_self(q)) for t in (s, s.T))
    counted = n > -torch.inf
    loss = (n + m - 2 * s.diagonal()).masked_fill(~counted, 0)
    return reduced(loss, reduction, weights, counted)
'''
FORMULA = '''\
    r"""InfoLOOB of both directions (Fürst et al. 2021, arXiv:2110.11316). A row without negatives is not counted."""
    _checks.same_rows(q=q, k=k)
    q, k, scale = unit(q, normalize), unit(k, normalize), inverse(temperature, q)
    n, m = pair_logsumexp(q, k, scale=scale, drop=arange(q), both=True)
    counted = n != -torch.inf
    loss = torch.where(counted, n + m - 2 * scale * row_dot(q, k), 0)
    return reduced(loss, reduction, weights, counted=counted)
'''
MODULE = '''
class InfoLOOBLoss(_TemperatureLoss):
    """InfoLOOB (Fürst et al. 2021, arXiv:2110.11316): :func:`fastcl.functional.info_loob`."""

    def forward(self, query: Tensor, key: Tensor, *, weights: Tensor | None = None) -> Tensor:
        return self._evaluate(
            F.info_loob, query, key, temperature=self.temperature, weights=weights, **self._options
        )


def _holds_views('''
PAPER = """def info_loob() -> float:
    def row(i: int) -> float:
        others = [j for j in range(6) if j != i]
        of_query = log(exp(C6[i][i] / TAU) / sum(exp(C6[i][j] / TAU) for j in others))
        of_key = log(exp(C6[i][i] / TAU) / sum(exp(C6[j][i] / TAU) for j in others))
        return -of_query - of_key

    return mean([row(i) for i in range(6)])


def n_pair("""
# Which text of which file gives way to which, by edit; without a text the new one stands at the end.
EDITS = {
    "1: what it means": [
        ("fastcl/reference/queries.py", None, SIGNATURE + MEANING),
        ("fastcl/reference/__init__.py", "softmax, info_nce,", "softmax, info_loob, info_nce,"),
        ("fastcl/reference/__init__.py", '    "info_nce",', '    "info_loob", "info_nce",'),
        ("tests/test_reference.py", "def n_pair(", PAPER),
        (
            "tests/test_reference.py", "        (n_pair, (",
            '        (info_loob, (Q, K6), {"temperature": TAU}),\n        (n_pair, (',
        ),
    ],
    "2: how it is computed": [
        ("fastcl/functional/queries.py", None, SIGNATURE + FORMULA),
        ("fastcl/functional/__init__.py", "softmax, info_nce,", "softmax, info_loob, info_nce,"),
        ("fastcl/functional/__init__.py", '    "info_nce",', '    "info_loob", "info_nce",'),
    ],
    "3: the module": [
        ("fastcl/losses.py", "\ndef _holds_views(", MODULE),
        ("tests/test_errors.py", '"NPairLoss": (', '"InfoLOOBLoss": ({}, PAIR), "NPairLoss": ('),
        ("fastcl/__init__.py", "    InfoNCELoss,", "    InfoLOOBLoss, InfoNCELoss,"),
        ("fastcl/__init__.py", '    "InfoNCELoss",', '    "InfoLOOBLoss", "InfoNCELoss",'),
    ],
    "4: a row of CASES": [
        (
            "fastcl/testing.py", '    LossCase("n_pair"',
            f'    LossCase("{NAME}", _PAIR, _TAU, variant="logits"),\n    LossCase("n_pair"',
        ),
    ],
}  # fmt: skip

WRONG = ("fastcl/functional/queries.py", "n + m - 2 * scale", "n + m - scale")  # forgets the positive of one direction
Outcomes = dict[str, str]  # by the name of a test


def change(folder: Path, file: str, old: str | None, new: str) -> None:
    text = (folder / file).read_text(encoding="utf-8")
    assert old is None or text.count(old) == 1, f"{file}: {old}"
    (folder / file).write_text(text + new if old is None else text.replace(old, new), encoding="utf-8")


# ---- in the copy: python -m tests.test_four_edits FILE --------------------------------------------------------------


def outcomes(expression: str, *names: str) -> Outcomes:
    """How the tests of some files end that are meant by an expression, as of ``pytest -k``."""
    found: Outcomes = {}

    class Listener:
        def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
            if report.when == "call" or not report.passed:
                found[report.nodeid.partition("::")[2]] = report.outcome

    files = [f"tests/test_{name}.py" for name in names]
    options = ["-o", "addopts=", "-p", "no:cacheprovider", "--tb=short", "-q", "-k", expression]
    pytest.main([*options, *files], plugins=[Listener()])
    return found


def main(file: str) -> None:
    """Writes what follows from the four edits, as JSON; then spoils the formula, and adds what tests say of that."""
    found: dict[str, Any] = {"fastcl": fastcl.__file__}
    found["right"] = outcomes(
        f"{NAME} or InfoLOOB or every_loss_has_a_formula or every_public_name",
        "functional", "reference", "pairwise", "family", "errors",
    )  # fmt: skip
    from benchmarks import family

    _selftest.CASES = tuple(case for case in _selftest.CASES if case.name == NAME)
    _selftest.NAMES = ("chunked",)
    found["selftest"] = {row["loss"]: row["passed"] for row in _selftest.run((torch.float32,))["rows"]}
    settings = _bench.Settings(NAME, rows=(16,), dim=8, rounds=1)
    found["bench"] = [row["contender"] for row in _bench.run(settings, lambda line: None)["rows"]]
    found["family"] = [case.label for case in family.ROWS]
    change(Path(), *WRONG)
    for module in (functional.queries, functional):
        importlib.reload(module)
    found["wrong"] = outcomes(f"{NAME} and (matches_reference or doubles or low_precision)", "functional")
    Path(file).write_text(json.dumps(found), encoding="utf-8")


# ---- here -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the copy wrote."""
    folder = tmp_path_factory.mktemp("copy")
    for part in ("fastcl", "tests", "benchmarks"):
        shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("results"))
    for edit in EDITS.values():
        for one in edit:
            change(folder, *one)
    done = subprocess.run(
        [sys.executable, "-m", "tests.test_four_edits", "found.json"],
        cwd=folder, capture_output=True, text=True, timeout=LIMIT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    written: dict[str, Any] = json.loads((folder / "found.json").read_text(encoding="utf-8"))
    assert Path(written["fastcl"]).is_relative_to(folder)
    return {**written, "printed": done.stdout}


def of_backend(outcomes: Outcomes, test: str, backend: str) -> set[str]:
    """How a test of all backends ended on one."""
    return {ended for name, ended in outcomes.items() if name.startswith(f"{test}[") and f"-{backend}" in name}


def test_the_tests_follow(found: dict[str, Any]) -> None:
    right = found["right"]
    assert "failed" not in right.values(), found["printed"]
    assert {name.partition("[")[0] for name, ended in right.items() if ended == "passed"} >= {
        "test_matches_reference", "test_doubles", "test_gradcheck", "test_low_precision", "test_reductions",
        "test_weights", "test_low_precision_is_no_worse_than_torch", "test_tiny_batches", "test_compiles_as_one_graph",
        "test_the_family_allocates_no_matrix", "test_a_wrong_gradient_is_noticed", "test_a_wrong_sum_is_noticed",
        "test_the_papers_formula", "test_every_loss_has_a_formula_here", "test_explain_explains_every_loss",
        "test_a_value_of_a_wrong_type_is_refused_in_words", "test_every_public_name_that_takes_rows_is_asked",
    }  # fmt: skip
    assert of_backend(right, "test_matches_reference", "chunked") == {"passed"}
    for backend in ("native", "triton"):  # which may not be here
        assert of_backend(right, "test_matches_reference", backend) in ({"passed"}, {"skipped"})


def test_the_command_line_and_the_benchmarks_follow(found: dict[str, Any]) -> None:
    assert found["selftest"][LABEL]
    assert {"dense", "chunked"} <= {*found["bench"]}
    assert LABEL in found["family"]


@pytest.mark.parametrize("test", ["test_matches_reference", "test_doubles", "test_low_precision"])
def test_a_wrong_formula_is_noticed(test: str, found: dict[str, Any]) -> None:
    for backend in ("chunked", "native", "triton"):
        right, wrong = (of_backend(found[name], test, backend) for name in ("right", "wrong"))
        assert "failed" in wrong or right <= {"skipped"}, backend


if __name__ == "__main__":
    main(sys.argv[1])
