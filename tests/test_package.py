"""What is released: a source distribution that can do all that the checkout can, a wheel with the package alone."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import fastcl

ROOT = Path(__file__).parents[1]
NOT_RELEASED = shutil.ignore_patterns(
    ".*_cache", ".git", ".nox", ".venv", "__pycache__", "build", "dist", "runs", "site", "*.so", "*.egg-info"
)


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> tuple[set[str], set[str]]:
    """Names of the files in the source distribution, and in the wheel, which is built without the native module."""
    pytest.importorskip("setuptools", "77", reason="setuptools 77 or later builds fastcl")
    pytest.importorskip("pybind11", reason="pybind11 is needed to build fastcl")
    folder = tmp_path_factory.mktemp("released")
    shutil.copytree(ROOT, folder / "source", ignore=NOT_RELEASED)
    code = "from setuptools import build_meta; build_meta.build_sdist('..'); build_meta.build_wheel('..')"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder / "source", env=os.environ | {"FASTCL_NATIVE": "off"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    with tarfile.open(next(folder.glob("*.tar.gz"))) as archive:
        source = {file.name.partition("/")[2] for file in archive.getmembers() if file.isfile()}
    with zipfile.ZipFile(next(folder.glob("*-py3-none-any.whl"))) as archive:
        wheel = set(archive.namelist())
    return source, wheel


def test_a_source_distribution_holds_what_is_tracked(released: tuple[set[str], set[str]]) -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("this is no checkout")
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split(
        "\n"
    )
    tracked = {name for name in listed if name and (ROOT / name).exists()}
    assert tracked - released[0] == {".gitignore"}


def test_a_wheel_holds_the_package_alone(released: tuple[set[str], set[str]]) -> None:
    wheel = released[1]
    assert {name.partition("/")[0] for name in wheel} == {"fastcl", f"fastcl-{fastcl.__version__}.dist-info"}
    assert {"fastcl/py.typed", "fastcl/integrations/lightly.py"} <= wheel
    assert any(name.startswith("fastcl/trainer/data/") for name in wheel)
    assert f"fastcl-{fastcl.__version__}.dist-info/licenses/LICENSE" in wheel


def test_the_oldest_python_is_the_same_everywhere() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    promised = [int(minor) for minor in re.findall(r'"Programming Language :: Python :: 3\.(\d+)"', text)]
    assert promised == list(range(promised[0], promised[-1] + 1))
    for setting in ('requires-python = ">=3.{}"', 'target-version = "py3{}"', 'python_version = "3.{}"'):
        assert setting.format(promised[0]) in text


def test_the_citation_is_of_this_version() -> None:
    text = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    keys = dict(re.findall(r"^([a-z-]+): *(.*)$", text, re.MULTILINE))
    assert {
        "cff-version",
        "message",
        "title",
        "authors",
        "license",
    } <= keys.keys()  # what the schema wants, and a license
    assert keys["version"] == fastcl.__version__
    assert keys["license"] == "Apache-2.0"
