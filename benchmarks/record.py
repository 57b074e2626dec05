"""How a measurement is written down: the file, and the rows of one that were measured again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def write(file: Path | str | None, result: dict[str, Any]) -> None:
    """``result``, which begins with ``fastcl._info.provenance``, as indented JSON; nothing where no file is given."""
    if file is not None:
        Path(file).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def updated(
    file: str, now: dict[str, Any], keys: tuple[str, ...], findings: Callable[[list[Row]], list[str]]
) -> dict[str, Any]:
    """Earlier results with the rows of ``now`` in their places, and a note which command and commit those are of.

    Args:
        keys: which fields of a row say what it is of.
        findings: what rows refute, in sentences.
    """
    earlier: dict[str, Any] = json.loads(Path(file).read_text(encoding="utf-8"))

    def key(row: Row) -> tuple[Any, ...]:
        return tuple(row[name] for name in keys)

    new = {key(row): row for row in now["rows"]}
    rows = [new.get(key(row), row) for row in earlier["rows"]]
    updates = [*earlier.get("updates", []), {name: now[name] for name in ("command", "commit", "date")}]
    return {**earlier, "rows": rows, "findings": findings(rows), "updates": updates}
