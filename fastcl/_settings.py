"""Environment variables that change how fastcl runs, read once, here and nowhere else.

``FASTCL_BACKEND``       force one backend for the whole process (as ``fastcl.use_backend`` does for a block)
``FASTCL_CPU_ISA``       run the native kernels of a lower instruction set than the machine's best: avx2, baseline, ...
``FASTCL_WORKSPACE_MB``  scratch memory a kernel may use beside its inputs and outputs, in MiB

``FASTCL_NATIVE`` and ``FASTCL_CXXFLAGS`` are read by setup.py.
"""

from __future__ import annotations

import math
import os
import warnings

KNOWN = ("FASTCL_BACKEND", "FASTCL_CPU_ISA", "FASTCL_CXXFLAGS", "FASTCL_NATIVE", "FASTCL_WORKSPACE_MB")


def _workspace() -> int | None:
    text = os.environ.get("FASTCL_WORKSPACE_MB")
    if not text:
        return None
    try:
        megabytes = float(text)
    except ValueError:
        megabytes = math.nan
    if not 0 <= megabytes < math.inf:
        warnings.warn(
            f"FASTCL_WORKSPACE_MB is {text!r}; expected a number of MiB, 0 or more. The default is used.", stacklevel=2
        )
        return None
    return int(megabytes * 2**20)


for _name in sorted(os.environ):
    if _name.startswith("FASTCL_") and _name not in KNOWN:
        warnings.warn(
            f"{_name} is set, but this version of fastcl does not know it; it knows {', '.join(KNOWN)}. "
            "It has no effect: check the spelling.",
            stacklevel=2,
        )

backend: str = os.environ.get("FASTCL_BACKEND") or "auto"
cpu_isa: str | None = os.environ.get("FASTCL_CPU_ISA") or None  # None: the best this machine has
workspace_bytes: int | None = _workspace()  # None: each backend's own default
