"""The environment report: what ``fastcl info`` prints, and what a bug report should contain."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from . import _settings
from ._version import __version__
from .backends import OPS, choose, native

_OTHER_SETTINGS = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "TRITON_INTERPRET")  # that change what fastcl does


def report() -> dict[str, Any]:
    """Versions, machine, devices, backends, caches and settings, as plain values for ``json.dumps``.

    Where torch sees no GPU nothing of CUDA is initialised. Memory is in bytes. Nothing is written.
    """
    return {
        "versions": versions(),
        "machine": machine(),
        "cuda": _cuda(),
        "backends": {str(device): _backends(device) for device in devices()},
        "native": native.status(),
        "caches": _caches(),
        "settings": {
            name: os.environ.get(name) for name in sorted({*_settings.KNOWN, *_OTHER_SETTINGS, *_fastcl_variables()})
        },
    }


def text(report: dict[str, Any]) -> str:
    """The report for people."""
    machine, cuda = report["machine"], report["cuda"]
    lines = ["versions", *_columns(report["versions"])]
    lines += ["machine", *_columns({**machine, "cuda": cuda["status"]})]
    lines += [
        f"  {gpu['device']}  {gpu['name']}, capability {gpu['capability']}, {gpu['memory_bytes'] / 2**30:.1f} GiB"
        for gpu in cuda["devices"]
    ]
    for device, ops in report["backends"].items():
        lines.append(f"backends for float32 rows on {device}")
        for op, answer in ops.items():
            lines.append(f"  {op:<7} {answer['chosen'] or 'none: ' + answer['error']}")
            lines += [f"{'':10}not {name}: {reason}" for name, reason in answer["others"].items()]
    lines += ["native module", f"  {report['native']}"]
    lines += ["caches", *_columns(report["caches"])]
    lines += ["settings", *_columns({k: "not set" if v is None else v for k, v in report["settings"].items()})]
    return "\n".join(lines)


def versions() -> dict[str, str]:
    """Of fastcl, Python and the packages it computes with."""
    return {
        "fastcl": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _installed("triton"),
        "numpy": _installed("numpy"),
    }


def machine() -> dict[str, Any]:
    """What decides how fast the CPU is; no host name."""
    return {
        "os": f"{platform.system()} {platform.release()}",
        "cpu": cpu_model(),
        "cpus": os.cpu_count(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }


def cpu_model() -> str:
    """The processor's name, or at least its architecture."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine()


def commit() -> str | None:
    """Short hash of the checkout this runs from, with -dirty where files differ; ``None`` for an installed package."""
    source = Path(__file__).resolve().parent.parent
    if not (source / ".git").exists():
        return None
    command = ["git", "--no-optional-locks", "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, cwd=source, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None  # no git, or no commit yet


def provenance(command: str) -> dict[str, Any]:
    """What every record of a measurement begins with: ``command``, ``date`` (UTC), ``commit`` and ``versions``."""
    date = datetime.now(timezone.utc).strftime("%Y-%m-%d")
    return {"command": command, "date": date, "commit": commit(), "versions": versions()}


def devices() -> list[torch.device]:
    """The CPU and every CUDA device that torch sees."""
    return [torch.device("cpu"), *(torch.device("cuda", i) for i in range(_cuda_count()))]


def _cuda() -> dict[str, Any]:
    built = torch.version.cuda or torch.version.hip
    found = []
    for i in range(_cuda_count()):
        gpu = torch.cuda.get_device_properties(i)
        found.append(
            {
                "device": f"cuda:{i}",
                "name": gpu.name,
                "capability": f"{gpu.major}.{gpu.minor}",
                "memory_bytes": gpu.total_memory,
            }
        )
    if found:
        status = f"{len(found)} device{'s' * (len(found) > 1)}, torch is built for {built}"
    else:
        status = f"no device found, torch is built for {built}" if built else "this torch is built without CUDA"
    return {"status": status, "devices": found}


def _cuda_count() -> int:
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _backends(device: torch.device) -> dict[str, Any]:
    rows = torch.ones(2, 8, device=device)
    return {op: choose(op, rows)._asdict() for op in OPS}


def _caches() -> dict[str, str]:
    home = os.environ.get("TRITON_HOME") or Path.home()
    triton = os.environ.get("TRITON_CACHE_DIR") or str(Path(home, ".triton", "cache"))
    ours = f"{_settings.cache_folder()} (only fastcl tune writes there)"
    return {"fastcl": ours, "triton": triton, "inductor": _inductor_cache()}


def _inductor_cache() -> str:
    if folder := os.environ.get("TORCHINDUCTOR_CACHE_DIR"):
        return folder
    try:
        from torch._inductor.runtime.cache_dir_utils import default_cache_dir
    except ImportError:
        return "unknown: this torch does not tell"
    return default_cache_dir()


def _fastcl_variables() -> list[str]:
    return [name for name in os.environ if name.startswith("FASTCL_")]


def _installed(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _columns(values: dict[str, Any]) -> list[str]:
    width = max(map(len, values))
    return [f"  {name:<{width}}  {value}" for name, value in values.items()]
