"""Draw the committed pictures of ``results/`` anew from their records: nothing is measured.

python -m benchmarks.pictures
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from fastcl import _bench, _compare

RESULTS = Path(__file__).parent / "results"
OF_PEERS = RESULTS / "peers"  # of the many that a run of --peers draws, those that are kept


def main() -> None:
    """Draw, and name what was drawn."""
    argparse.ArgumentParser(prog="python -m benchmarks.pictures", description=__doc__.partition("\n")[0]).parse_args()
    alone = RESULTS / "nt_xent-cpu.png"
    _bench.plot(_record("nt_xent-cpu"), str(alone))
    print(alone)
    with tempfile.TemporaryDirectory() as folder:
        _compare.plot(_record("peers-cpu"), folder)
        for kept in sorted(OF_PEERS.glob("*.png")):
            kept.write_bytes(Path(folder, kept.name).read_bytes())
            print(kept)


def _record(name: str) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return record


if __name__ == "__main__":
    main()
