"""Every environment that fastcl promises to work in: ``nox -l`` lists them, ``nox -s SESSION`` makes one and runs it.

Versions of Python are those of the classifiers in pyproject.toml, and the oldest torch is that of its requirements.
Where uv is installed it makes the environments, which share one copy of torch then, and fetches missing Pythons; a
session whose Python is not to be had is skipped, and says so (``--error-on-missing-interpreters``: fails).
"""

from __future__ import annotations

import re
from pathlib import Path

import nox

nox.needs_version = ">=2025.2.9"
nox.options.default_venv_backend = "uv|virtualenv"
nox.options.error_on_missing_interpreters = False  # on CI nox would have it an error
nox.options.sessions = ["lint", "types", "docs"]

PROJECT = nox.project.load_toml("pyproject.toml")
PYTHONS = nox.project.python_versions(PROJECT)
(OLDEST,) = (found[1] for line in PROJECT["project"]["dependencies"] if (found := re.match(r"torch>=([\d.]+)", line)))
# Triton of that torch has an interpreter for NumPy of that time; nothing but tests runs it.
REQUIREMENTS = {f"torch{OLDEST}": [f"torch=={OLDEST}.*", "numpy<2.4"], "newest": ["torch"]}


@nox.session(python=PYTHONS)
@nox.parametrize("versions", [nox.param(name, id=name) for name in REQUIREMENTS])
def tests(session: nox.Session, versions: str) -> None:
    """The tests, or those that are named after --, on one Python and one torch."""
    session.install("-e", ".[dev]", *REQUIREMENTS[versions])
    session.run("pytest", *session.posargs)


@nox.session
def lint(session: nox.Session) -> None:
    """Style and simple mistakes of Python and C++."""
    session.install(*PROJECT["project"]["optional-dependencies"]["lint"])
    session.run("make", "lint", external=True)


@nox.session
def types(session: nox.Session) -> None:
    """mypy, strict."""
    session.install("-e", ".[dev]", env={"FASTCL_NATIVE": "off"})
    session.run("mypy")


@nox.session
def docs(session: nox.Session) -> None:
    """The documentation as a site, in site/."""
    session.install("-e", ".[docs]", env={"FASTCL_NATIVE": "off"})
    session.run("make", "docs", external=True)


@nox.session
def release(session: nox.Session) -> None:
    """A source distribution and wheels, in dist/, each installed and tried."""
    session.install("pip", "twine", "-e", ".[dev]", env={"FASTCL_NATIVE": "off"})
    session.run("python", ".ci/release.py", "dist")
    session.run("twine", "check", "--strict", *map(str, Path("dist").glob("fastcl-*")))
