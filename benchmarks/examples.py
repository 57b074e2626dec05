"""What the examples of docs/examples learn: each over three seeds, in full.

python -m benchmarks.examples      a few minutes; writes results/examples.json
"""

from __future__ import annotations

import argparse
import importlib.util
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from fastcl._info import cpu_model, provenance

from .record import write

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = sorted((ROOT / "docs" / "examples").glob("*.py"))
SEEDS = (0, 1, 2)
VARIANTS: dict[str, list[dict[str, Any]]] = {"sentences": [{"hard": False}]}  # beside the defaults
RESULT = Path(__file__).parent / "results" / "examples.json"


def main() -> None:
    """Run every example and write the record."""
    argparse.ArgumentParser(prog="python -m benchmarks.examples", description=__doc__.partition("\n")[0]).parse_args()
    head = provenance("python -m benchmarks.examples")  # before anything is written
    rows = []
    for path in EXAMPLES:
        for settings in ({}, *VARIANTS.get(path.stem, [])):
            start = time.process_time()
            figures = [load(path).main(seed=seed, **settings) for seed in SEEDS]
            seconds = (time.process_time() - start) / len(SEEDS)
            rows.append({"example": path.stem, "settings": settings, "figures": figures, "cpu_seconds": seconds})
            print(rows[-1], flush=True)
    result = {
        **head,
        "machine": {"device": cpu_model(), "threads": torch.get_num_threads()},
        "seeds": SEEDS,
        "rows": rows,
    }
    write(RESULT, result)


def load(path: Path) -> ModuleType:
    """A script as a module; it need not be on the path."""
    spec = importlib.util.spec_from_file_location(f"example_{path.stem}", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
