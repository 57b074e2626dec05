"""Environment variables that change how fastcl runs, read once, here and nowhere else.

``FASTCL_BACKEND``       force one backend for the whole process (as ``fastcl.use_backend`` does for a block)
``FASTCL_CACHE_DIR``     folder of what ``fastcl tune`` found; the user's cache folder when unset
``FASTCL_CPU_ISA``       run the native kernels of a lower instruction set than the machine's best: avx2, baseline, ...
``FASTCL_FP32``          how GPU kernels multiply fp32 rows: auto (in fp32, or TF32 where torch may) or bf16x3 (each
                         number as the sum of two bf16 numbers: nearly fp32, on the matrix units). Those of CUDA C++
                         know bf16x3 only, and serve fp32 rows where that or TF32 is allowed
``FASTCL_WORKSPACE_MB``  scratch memory a kernel may use beside its inputs and outputs, in MiB

``FASTCL_NATIVE``, ``FASTCL_CXXFLAGS`` and ``FASTCL_CUDA_ARCHS`` are read by setup.py, ``FASTCL_UPSTREAM`` by
``benchmarks.dropins``.
"""

from __future__ import annotations

import math
import os
import warnings
from pathlib import Path

KNOWN = (
    "FASTCL_BACKEND",
    "FASTCL_CACHE_DIR",
    "FASTCL_CPU_ISA",
    "FASTCL_CUDA_ARCHS",
    "FASTCL_CXXFLAGS",
    "FASTCL_FP32",
    "FASTCL_NATIVE",
    "FASTCL_UPSTREAM",
    "FASTCL_WORKSPACE_MB",
)


def _choice(name: str, choices: tuple[str, ...]) -> str:
    text = os.environ.get(name) or choices[0]
    if text in choices:
        return text
    warnings.warn(f"{name} is {text!r}; expected one of {', '.join(choices)}. {choices[0]} is used.", stacklevel=3)
    return choices[0]


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
fp32: str = _choice("FASTCL_FP32", ("auto", "bf16x3"))
workspace_bytes: int | None = _workspace()  # None: each backend's own default


def cache_folder() -> Path:
    """The user's own cache folder, which need not exist; asked for at the time of use, as nothing else needs it."""
    if folder := os.environ.get("FASTCL_CACHE_DIR"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastcl"
