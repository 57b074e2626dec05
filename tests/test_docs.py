"""What the documentation shows is run, what it quotes is there, and its figures are those of committed measurements."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import fastcl
from fastcl.integrations import Patch

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
OPTIONAL = {  # packages that a snippet may want: those of the extras, and libraries that are copied, not installed
    "grad_cache", "inf_cl", "lightly", "losses", "open_clip", "pytorch_metric_learning", "sentence_transformers",
    "solo", "torchvision",
}  # fmt: skip


def fences(page: Path, language: str) -> list[str]:
    return [code for found, code in FENCE.findall(page.read_text(encoding="utf-8")) if found == language]


def run(code: str, names: dict[str, Any], page: Path) -> dict[str, Any]:
    """The names after running a snippet; a skip where it wants a package that is not there."""
    try:
        exec(compile(code, str(page), "exec"), names)
    except ImportError as error:
        # fastcl.integrations says in words which library it stands in for, and keeps what was raised
        missing = error if error.name else error.__cause__
        name = (missing.name or "").partition(".")[0] if isinstance(missing, ImportError) else ""
        if name not in OPTIONAL:
            raise
        pytest.skip(f"{name} is not installed")
    return names


@pytest.fixture(autouse=True)
def leave_no_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(tmp_path)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@pytest.mark.parametrize(
    "page", [page for page in PAGES if fences(page, "python")], ids=lambda page: page.relative_to(ROOT).as_posix()
)
def test_snippets_run(page: Path) -> None:
    run("\n".join(fences(page, "python")), {}, page)


def test_pages_with_snippets_are_found() -> None:
    shown = {page.relative_to(ROOT).as_posix(): len(fences(page, "python")) for page in PAGES}
    least = {"README.md": 3, "docs/index.md": 4, "docs/losses.md": 5, "docs/large_batches.md": 4, "docs/trainer.md": 1}
    assert all(shown[page] >= count for page, count in least.items()), shown


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_a_block_names_its_language(page: Path) -> None:
    """So that Python does not hide from ``test_snippets_run``."""
    languages = {language for language, _ in FENCE.findall(page.read_text(encoding="utf-8"))}
    assert languages <= {"python", "diff", "bash", "text"}


DROPINS = ROOT / "docs/dropins.md"


@pytest.mark.parametrize("change", fences(DROPINS, "diff"), ids=lambda change: change.splitlines()[0].lstrip("+-"))
def test_a_drop_in_gives_what_stood_there_before(change: str) -> None:
    shared = "\n".join(fences(DROPINS, "python"))
    losses = []
    for side in "+-":  # ours first: it runs where the original is not installed
        names: dict[str, Any] = {}
        if side == "-" and "inf_cl" in change:
            pytest.skip("Inf-CL's kernels need a GPU, where tests/integrations/test_parity.py compares them")
        if "model" in change:
            pytest.importorskip("sentence_transformers", reason="sentence_transformers is not installed")
            from benchmarks.dropins.sentence_transformers import tiny_model

            names["model"] = tiny_model()
        code = "\n".join(line[1:] for line in change.splitlines() if line[:1] in (side, " ", ""))
        try:
            losses.append(run(f"{shared}\n{code}", names, DROPINS)["loss"])
        finally:
            for patch in (value for value in names.values() if isinstance(value, Patch)):
                patch.undo()
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-6)  # a few roundings of fp32 sums in another order


def test_every_library_has_a_before_and_an_after() -> None:
    changes = "".join(fences(DROPINS, "diff"))
    assert all(f"from fastcl.integrations.{library} import" in changes for library in fastcl.integrations.LIBRARIES)


def test_every_loss_has_a_line_in_docs_losses() -> None:
    page = (ROOT / "docs/losses.md").read_text()
    missing = [name for name in fastcl.functional.__all__ if f"`{name}(" not in page]
    missing += [name for name in fastcl.__all__ if name.endswith("Loss") and f"`{name}" not in page]
    assert not missing


def test_tables_are_those_of_the_committed_measurements() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.render", "--check"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_benchmark_has_a_line_that_says_how_to_run_it() -> None:
    page = (ROOT / "benchmarks/README.md").read_text()
    programs = [
        file
        for file in [*ROOT.glob("benchmarks/*.py"), ROOT / "benchmarks/dropins/__main__.py"]
        if '__name__ == "__main__"' in file.read_text()
    ]
    names = {"dropins" if file.stem == "__main__" else file.stem for file in programs}
    assert len(names) >= 20
    assert {name for name in names if f"-m benchmarks.{name}" not in page} == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), target


def texts_of_the_source() -> str:
    """Every string of fastcl and setup.py, one a line; what a message fills in is ``{}``."""
    found = []
    for file in [ROOT / "setup.py", *sorted((ROOT / "fastcl").rglob("*.py"))]:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = (str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values)
                found.append("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(found)


def test_errors_in_troubleshooting_are_those_of_the_source() -> None:
    """``...`` stands for what a message fills in; the parts between are quoted as they are written.

    ``_checks.sentence`` and others put a message together of what came, what was expected and how to mend it.
    """
    page = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")
    quoted = re.findall(r"^### `(.+)`$", page, re.MULTILINE)
    source = texts_of_the_source()
    joint = re.compile(r"\s*\.\.\.\s*|^got |; expected ")

    def is_quoted(part: str) -> bool:
        pieces = [part] if part.rstrip(".:") in source else part.split(". ")
        return all(piece.rstrip(".:") in source for piece in pieces)

    wrong = [part for entry in quoted for part in joint.split(entry) if not is_quoted(part)]
    assert not wrong
    vague = [entry for entry in quoted if sum(map(len, joint.split(entry))) < 15]
    assert not vague
    assert len(quoted) >= 20 and len(set(quoted)) == len(quoted)


def test_tests_named_in_reliability_are_there() -> None:
    page = (ROOT / "docs/reliability.md").read_text(encoding="utf-8")
    named = re.findall(r"`(tests/(?:\w+/)*test_\w+\.py)(?:::(\w+))?`", page)
    assert len(named) >= 30
    missing = [file for file, _ in named if not (ROOT / file).exists()]
    missing += [f"{file}::{test}" for file, test in named if test and f"\ndef {test}(" not in (ROOT / file).read_text()]
    assert not missing
