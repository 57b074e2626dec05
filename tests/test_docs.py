"""What the documentation shows is run, and its figures are those of the committed measurements."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import fastcl

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize(
    ("page", "least"), [("README.md", 3), ("docs/losses.md", 5), ("docs/distributed.md", 1), ("docs/grad_cache.md", 1)]
)
def test_snippets_run(page: str, least: int) -> None:
    snippets = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    assert len(snippets) >= least
    exec("\n".join(snippets), {})


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


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), target
