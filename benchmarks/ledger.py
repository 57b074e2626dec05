"""Which GPU kernels were verified on a GPU, on which, and when.

    python -m benchmarks.ledger            prints the table
    python -m benchmarks.ledger --check    exits with 1 where a kernel was not, or has changed since

A Triton kernel is known by the hash of its syntax tree, with every function, class and constant of the backend that it
or the functions that launch it reach: a comment, a docstring or a line break does not age it, a change in a helper or
in a table of tiles does. CUDA C++ kernels are known by their source: its text and that of the headers it includes,
without comments and white space, and the syntax tree of what launches them. Needs nothing but Python.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import re
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SOURCES = [f"fastcl/backends/{name}.py" for name in ("triton", "_triton_kernels", "_triton_configs")]
LAUNCH = "_launch"
CUDA_SOURCES = "csrc/cuda/*.cu"
CUDA_LAUNCH, NOT_LAUNCHING = "fastcl/backends/_cuda.py", "unsupported"
SIMULATOR = "csrc/sim"  # headers of tests, not of a GPU


def kernel_hashes(source: str) -> dict[str, str]:
    """Name of every kernel of a source (``@triton.jit``, named ``..._kernel``) and the hash of what it runs."""
    defined = _defined(source)
    kernels = [
        name
        for name, node in defined.items()
        if isinstance(node, ast.FunctionDef)
        and name.endswith("_kernel")
        and any(ast.unparse(d).startswith("triton.jit") for d in node.decorator_list)
    ]
    launchers = {kernel: [name for name, node in defined.items() if kernel in _names(node)] for kernel in kernels}
    return {kernel: _hash([kernel, LAUNCH, *launchers[kernel]], defined) for kernel in kernels}


def triton_hashes(root: Path = ROOT) -> dict[str, str]:
    return kernel_hashes("\n".join((root / source).read_text(encoding="utf-8") for source in SOURCES))


def cuda_hashes(root: Path = ROOT) -> dict[str, str]:
    """Path of every source of CUDA C++ kernels and the hash of what it is compiled from, and launched by."""
    found = {}
    for source in sorted(root.glob(CUDA_SOURCES)):
        defined = _defined((root / CUDA_LAUNCH).read_text(encoding="utf-8"))
        launch = _hash([name for name in defined if name != NOT_LAUNCHING], defined)
        text = "\n".join([launch, *(f"{file} {bare}" for file, bare in sorted(_included(source, root).items()))])
        found[str(source.relative_to(root))] = hashlib.sha256(text.encode()).hexdigest()[:16]
    return found


def cuda_sources(root: Path = ROOT) -> dict[str, str]:
    """Name of every launch of CUDA C++ kernels, and the source that it is in."""
    return {
        name: str(source.relative_to(root))
        for source in sorted(root.glob(CUDA_SOURCES))
        for name in re.findall(r"^void (\w+)\(", source.read_text(encoding="utf-8"), re.MULTILINE)
    }


def hashes(root: Path = ROOT) -> dict[str, str]:
    """Those of all kernels of a checkout."""
    return triton_hashes(root) | cuda_hashes(root)


def _included(file: Path, root: Path) -> dict[str, str]:
    """Path and bare text of a C++ file and of all that it includes from this project."""
    found: dict[str, str] = {}
    waiting = [file]
    while waiting:
        file = waiting.pop().resolve()
        path = str(file.relative_to(root.resolve()))
        if path in found or path.startswith(SIMULATOR):
            continue
        text = file.read_text(encoding="utf-8")
        found[path] = "".join(re.sub(r"//.*|/\*[\s\S]*?\*/", "", text).split())
        waiting += [file.parent / name for name in re.findall(r'#include "(.+?)"', text)]
    return found


def _defined(source: str) -> dict[str, ast.stmt]:
    """Functions, classes and constants of a module, by name."""
    defined: dict[str, ast.stmt] = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            defined[node.name] = node
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                if isinstance(target, ast.Name):
                    defined[target.id] = node
    return defined


@lru_cache(maxsize=None)  # kernels share helpers
def _names(tree: ast.AST) -> set[str]:
    """Everything that is read by its name, or from a module by its name."""
    found = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}
    return found | {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)}


def _hash(roots: list[str], defined: dict[str, ast.stmt]) -> str:
    reached: dict[str, str] = {}
    waiting = [name for name in roots if name in defined]
    while waiting:
        name = waiting.pop()
        if name in reached:
            continue
        tree = _without_docstrings(defined[name])
        reached[name] = ast.dump(tree)
        waiting += _names(tree) & defined.keys()
    text = "\n".join(f"{name} {reached[name]}" for name in sorted(reached))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@lru_cache(maxsize=None)
def _without_docstrings(tree: ast.stmt) -> ast.stmt:
    tree = ast.parse(ast.unparse(tree)).body[0]  # a copy, without line numbers and comments
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return tree


def status(root: Path = ROOT) -> list[dict[str, Any]]:
    """For every kernel: ``kernel``, ``hash``, ``state`` (current, stale, never), ``gpu``, ``date``, ``commit``."""
    records = []
    for file in sorted((root / "benchmarks" / "results").glob("*.json")):
        result = json.loads(file.read_text(encoding="utf-8"))
        if "kernels" in result:
            records.append(result)
    records.sort(key=lambda record: record["date"])
    rows = []
    for kernel, digest in hashes(root).items():
        verified = [r for r in records if r["kernels"].get(kernel, {}).get("verified")]
        same = [r for r in verified if r["kernels"][kernel]["hash"] == digest]
        last: dict[str, Any] = (same or verified or [{}])[-1]
        rows.append(
            {
                "kernel": kernel,
                "hash": digest,
                "state": "current" if same else "stale" if verified else "never",
                "gpu": last.get("machine", {}).get("gpu"),
                "date": last.get("date"),
                "commit": last.get("commit"),
            }
        )
    return rows


def sentence(row: dict[str, Any]) -> str:
    """The state of a kernel in words."""
    if row["state"] == "never":
        return "not yet run on a GPU"
    at = f"verified on {row['gpu']}, {row['date']}, commit {row['commit']}"
    return at if row["state"] == "current" else f"{at}, but its source has changed since"


def main(argv: list[str] | None = None) -> int:
    """Print a line per kernel; 1 if a check finds one that is not verified as it stands."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ledger", description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="exit with 1 unless all are verified as they stand")
    check = parser.parse_args(argv).check
    rows = status()
    for row in rows:
        print(f"{row['kernel']} {row['hash']}: {sentence(row)}")
    return 1 if check and any(row["state"] != "current" for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
