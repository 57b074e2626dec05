"""The house plan: imports point one way, and importing costs nothing that was not asked for."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import fastcl

ROOT = Path(fastcl.__file__).parent
# Each layer may import no layer that stands after it.
LAYERS = [
    "backends", "_ops", "pairwise", "triples", "hinges", "inspection", "functional", "distributed", "queue", "losses",
    "integrations", "trainer", "cli",
]  # fmt: skip
LEAVES = {
    "reference": set(),
    "testing": set(),
    "_measure": set(),
    "_settings": set(),
    "_checks": set(),
    "_across": set(),
    "_gathered": set(),
    "grad_cache": {"_checks"},
    "queue": {"_checks"},
}


def imports(path: Path) -> Iterator[str]:
    """Modules of fastcl that a file imports, by their first name."""
    depth = len(path.relative_to(ROOT).parts)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == depth:
            yield from [node.module.split(".")[0]] if node.module else [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fastcl"):
            yield from [a.name for a in node.names] if node.module == "fastcl" else [node.module.split(".")[1]]


def files(name: str) -> list[Path]:
    return sorted((ROOT / name).rglob("*.py")) if (ROOT / name).is_dir() else [ROOT / f"{name}.py"]


@pytest.mark.parametrize("name", LAYERS)
def test_imports_point_down(name: str) -> None:
    above = set(LAYERS[LAYERS.index(name) + 1 :])
    for path in files(name):
        assert not above & set(imports(path)), path


@pytest.mark.parametrize("name", LEAVES)
def test_leaves_import_nothing_above_them(name: str) -> None:
    for path in files(name):
        assert set(imports(path)) <= LEAVES[name], path


def test_kernels_know_nothing_of_losses() -> None:
    for path in files("backends"):
        assert set(imports(path)) <= {"_settings", "_C"}, path


def test_there_is_no_room_without_a_name() -> None:
    assert not [p for p in ROOT.rglob("*.py") if p.stem in ("utils", "util", "helpers", "common", "misc")]
