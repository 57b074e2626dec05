"""The planted wrongs of benchmarks/mutants.py: each can be planted, names tests that are there, and was noticed."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from benchmarks import mutants
from benchmarks.mutants import MUTANTS, PARTS, ROOT, Mutant, Outcome
from fastcl.backends import native

RECORD = ROOT / "benchmarks" / "results" / "mutants.json"


def test_there_are_enough_of_every_part() -> None:
    of_parts = Counter(mutant.part for mutant in MUTANTS)
    assert len(MUTANTS) >= 30 and of_parts.keys() == PARTS.keys() and min(of_parts.values()) >= 8, of_parts
    planted = {(mutant.file, mutant.old, mutant.new) for mutant in MUTANTS}
    assert len(planted) == len(MUTANTS)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: f"{mutant.part}-{mutant.what}")
def test_a_mutant_can_be_planted(mutant: Mutant, tmp_path: Path) -> None:
    """Its text stands once in a file of formulas or kernels, and another comes in its place."""
    assert mutant.file.startswith(("fastcl/", "csrc/")) and mutant.what and mutant.tests
    before = (ROOT / mutant.file).read_text(encoding="utf-8")
    copy = tmp_path / mutant.file
    copy.parent.mkdir(parents=True)
    copy.write_text(before, encoding="utf-8")
    mutants.plant(mutant, tmp_path)
    assert copy.read_text(encoding="utf-8") != before
    with pytest.raises(ValueError, match=r"^got .+ 0 times in .+; expected it once, .+\. Mend the mutant "):
        mutants.plant(Mutant(mutant.part, mutant.file, "nowhere to be found", "", "x", ()), tmp_path)


def test_the_tests_that_mutants_name_are_there() -> None:
    """Asked of pytest, in one process; those of the native module have its instruction sets in their names."""
    wanted = {test for mutant in MUTANTS for test in mutant.tests if native._C is not None or "[baseline" not in test}
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-o", "addopts=", "-p", "no:cacheprovider"]
    done = subprocess.run([*command, *sorted(wanted)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert set(done.stdout.splitlines()) >= wanted


def test_the_record_is_of_these_mutants_and_all_were_killed() -> None:
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    assert list(mutants.killed_before(record)) == list(MUTANTS)
    for row in record["rows"]:
        assert row["outcome"] == "killed" and row["test"] in row["tests"], row
        assert row["commit"] and not row["commit"].endswith("-dirty"), row


# ---- the machinery, on files of a few lines --------------------------------------------------------------------------

SOURCE = """
def mean(numbers):
    return sum(numbers) / len(numbers)  # of numbers
"""
TEST = """
import pytest
from code_under_test import mean

def test_mean():
    assert mean([1, 2]) == 1.5, "1.5 is wanted"

@pytest.fixture
def refused():
    assert mean([1, 3]) == 2

def test_of_a_fixture(refused):
    pass

def test_skipped():
    pytest.skip("for a reason")
"""
FATES = {
    "killed": ("/ len", "/ 2 / len", "test_mean"),
    "survived": ("of numbers", "of some numbers", "test_mean"),
    "raised": ("/ len(numbers)", "/ 0", "test_mean"),
    "a syntax error": ("/ len", "/ / len", "test_mean"),
    "a test that is not there": ("of numbers", "of some numbers", "test_median"),
    "a fixture that fails": ("/ len", "/ 2 / len", "test_of_a_fixture"),
    "a skipped test": ("of numbers", "of some numbers", "test_skipped"),
}


@pytest.fixture
def template(tmp_path: Path) -> Path:
    (tmp_path / "code_under_test.py").write_text(SOURCE)
    (tmp_path / "test_it.py").write_text(TEST)
    return tmp_path


@pytest.mark.parametrize("fate", FATES)
def test_fates_are_told_apart(fate: str, template: Path) -> None:
    old, new, test = FATES[fate]
    mutant = Mutant("formulas", "code_under_test.py", old, new, "x", (f"test_it.py::{test}",))
    outcome = mutants.run(mutant, template, mutants.nothing_to_build)
    assert outcome.kind == (fate if fate in ("killed", "survived", "raised") else "not run"), outcome
    if fate == "killed":
        assert outcome.test == "test_it.py::test_mean" and "1.5 is wanted" in outcome.words
    assert (template / "code_under_test.py").read_text() == SOURCE  # a mutant lives in its own copy


def test_what_cannot_be_built_or_takes_too_long_is_not_killed(template: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mutant = Mutant("formulas", "code_under_test.py", "/ len", "/ 2 / len", "x", ("test_it.py::test_mean",))

    def refuse(folder: Path) -> None:
        raise mutants.NotBuilt("error: expected ';'")

    assert mutants.run(mutant, template, refuse) == Outcome("not built", words="error: expected ';'")
    monkeypatch.setattr(mutants, "LIMIT", 0.01)
    assert mutants.run(mutant, template, mutants.nothing_to_build).kind == "timed out"


def test_a_mutant_of_a_real_copy_is_killed_and_a_harmless_change_survives(tmp_path: Path) -> None:
    """With what a whole run does before: tests that do not pass as they are prove nothing."""
    if not (ROOT / ".git").exists():
        pytest.skip("this is no checkout: git says which files are copied")
    queue = next(mutant for mutant in MUTANTS if mutant.file == "fastcl/queue.py")
    made = mutants.templates([queue], tmp_path)["formulas"]
    outcome = mutants.run(queue, made, PARTS["formulas"])
    assert outcome.kind == "killed" and outcome.test == queue.tests[0]
    harmless = Mutant("formulas", queue.file, "The last ``size`` embeddings", "The ``size`` last", "x", queue.tests)
    assert mutants.run(harmless, made, PARTS["formulas"]) == Outcome("survived")
    with pytest.raises(ValueError, match=r"^got not run .+; expected all to run and to pass\. Mend that first\.$"):
        mutants.templates(
            [Mutant("formulas", queue.file, "x", "y", "x", ("tests/test_queue.py::test_not_there",))],
            tmp_path / "other",
        )
