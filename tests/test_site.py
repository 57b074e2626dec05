"""The documentation site: built strictly, without a network, and complete."""

from __future__ import annotations

import html
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ELSEWHERE = re.compile(
    r'(?:<script[^>]*\bsrc|<link[^>]*rel="(?:stylesheet|preload)"[^>]*href|<img[^>]*\bsrc)="(?:https?:)?//'
)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for package in ("mkdocs", "material", "mkdocstrings_handlers.python", "latex2mathml"):
        pytest.importorskip(package, reason=f"{package} is not installed: pip install -e '.[docs]'")
    folder = tmp_path_factory.mktemp("site")
    nowhere = {"https_proxy": "http://127.0.0.1:9", "http_proxy": "http://127.0.0.1:9", "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT, env=os.environ | nowhere, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr  # a broken link, an unknown argument in a docstring, a page in no menu
    return folder


def text(page: Path) -> str:
    return html.unescape(re.sub(r"<[^>]+>", "", page.read_text(encoding="utf-8")))


def test_pages_load_nothing_from_elsewhere(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > 20
    assert not [page.name for page in pages if ELSEWHERE.search(page.read_text(encoding="utf-8"))]


def test_formulas_are_mathml(site: Path) -> None:
    page = (site / "losses.html").read_text(encoding="utf-8")
    assert page.count("<math") > 30
    assert "arithmatex" not in page


def test_the_reference_has_every_public_name(site: Path) -> None:
    import fastcl

    pages = "".join(page.read_text(encoding="utf-8") for page in (site / "api").glob("*.html"))
    for module in ("functional", "pairwise"):
        names = (
            getattr(fastcl, module).__all__ if module == "functional" else ["pair_logsumexp", "pair_topk", "row_dot"]
        )
        assert not [name for name in names if f'id="fastcl.{module}.{name}"' not in pages]
    missing = [
        name
        for name in fastcl.__all__
        if name not in ("functional", "pairwise", "reference", "__version__")
        and not re.search(rf'id="fastcl\.[\w.]*{name}"', pages)
    ]
    assert not missing
    assert not re.search(r":(?:func|class|meth|data|math):`", pages)  # a role that was left as it is


def test_what_lies_outside_docs_is_there(site: Path) -> None:
    for file in ("CHANGELOG.html", "CONTRIBUTING.html", "SECURITY.html", "benchmarks/results/h100-probe.txt"):
        assert (site / file).exists()
    assert (site / "benchmarks/results/nt_xent-cpu.png").exists()
    assert "### Added" not in text(site / "CHANGELOG.html")
