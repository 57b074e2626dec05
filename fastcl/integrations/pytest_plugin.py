"""Run a library's own tests against the drop-ins.

``pytest -p fastcl.integrations.pytest_plugin --fastcl-patch=lightly lightly/tests/loss``. Classes are swapped before
tests are collected, so that ``from lightly.loss import NTXentLoss`` finds ours.
"""

from __future__ import annotations

from typing import Any

from . import Patch, patch

_patches: list[Patch] = []


def pytest_addoption(parser: Any) -> None:
    group = parser.getgroup("fastcl")
    group.addoption("--fastcl-patch", default="", help="libraries whose losses are replaced, separated by commas")
    group.addoption("--fastcl-strict", action="store_true", help="with the originals' numbers where they are wrong")


def pytest_configure(config: Any) -> None:
    libraries = [name for name in config.getoption("--fastcl-patch").split(",") if name]
    _patches.append(patch(*libraries, strict=config.getoption("--fastcl-strict"), verbose=False))


def pytest_report_header() -> list[str]:
    return [str(done) for done in _patches]


def pytest_unconfigure() -> None:
    while _patches:
        _patches.pop().undo()
