"""Many processes that start at once on empty caches: none fails, and all compute and compile the same.

python -m benchmarks.cold_cache --processes 16

Each imports fastcl, waits for the others, and then, with all of them: computes a loss and its gradient on the CPU;
compiles Triton kernels for an architecture (nothing is launched, so no GPU is needed) into one empty
``TRITON_CACHE_DIR``; and writes and reads the file of ``fastcl tune`` in one empty ``FASTCL_CACHE_DIR``.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
ARCH, DTYPE = 90, "bfloat16"
ROWS = [[64, 64, 64, 64, 0, 4, 2]]  # tiles, such as fastcl tune finds
TIMES = 20


def work(number: int) -> dict[str, Any]:
    """What one process does: hashes of a loss with its gradient, and of the machine code of kernels."""
    import torch

    import fastcl
    from benchmarks.aot import launch_nothing
    from fastcl import _tune, functional
    from fastcl.backends import _triton_configs as configs
    from fastcl.pairwise import l2_normalize

    print("ready", flush=True)
    sys.stdin.readline()
    z = torch.nn.functional.normalize(torch.randn(300, 32, generator=torch.Generator().manual_seed(0)), dim=1)
    z.requires_grad_()
    bits = hashlib.sha256()
    for backend in fastcl.available_backends(z):
        with fastcl.use_backend(backend):
            loss = functional.nt_xent(z, temperature=0.1)
            (grad,) = torch.autograd.grad(loss, z)
        bits.update(loss.detach().numpy().tobytes() + grad.numpy().tobytes())
    kernels: dict[str, str] = {}

    def note(compiled: Any) -> None:
        kernels[compiled.metadata.name] = hashlib.sha256(compiled.asm["cubin"]).hexdigest()

    launch_nothing(ARCH, DTYPE, note)
    with fastcl.use_backend("triton"):
        rows = z.detach().to(getattr(torch, DTYPE)).requires_grad_()
        l2_normalize(rows).sum().backward()
    file = configs.tuned_file("Some GPU")
    for time in range(TIMES):
        # longer and shorter ones, which would show behind each other
        _tune._write(file, {"families": {"interpreter": {"sums": ROWS * (1 + (number + time) % 5)}}})
        configs.tuned.cache_clear()
        found = configs.tuned("Some GPU")["interpreter"]["sums"]
        assert {tuple(row) for row in found} == {("sums", *row) for row in ROWS}, found
    return {"loss": bits.hexdigest(), "kernels": kernels}


def run(processes: int) -> list[str]:
    """A sentence for everything that should not be."""
    with tempfile.TemporaryDirectory() as folder:
        caches = {"TRITON_CACHE_DIR": f"{folder}/triton", "FASTCL_CACHE_DIR": f"{folder}/fastcl"}
        ended = [*_together(processes, caches), *_together(1, caches)]  # the last reads what the others wrote
        failed = [f"process {i}: {said.strip().splitlines()[-1]}" for i, (code, _, said) in enumerate(ended) if code]
        if failed:
            return failed
        first, *others = (json.loads(printed) for _, printed, _ in ended)
        faults = [
            f"process {i} found {other}, process 0 {first}" for i, other in enumerate(others, 1) if other != first
        ]
        if not first["kernels"]:
            faults.append("no kernel was compiled")
        files = [file.name for file in Path(caches["FASTCL_CACHE_DIR"]).iterdir()]
        if len(files) != 1:
            faults.append(f"{files} in the cache of fastcl; expected the file of fastcl tune alone, and no drafts")
        return faults


def _together(count: int, caches: dict[str, str]) -> list[tuple[int, str, str]]:
    """Exit codes of so many processes, what they printed after they were all ready, and what they complained of."""
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}  # tests set it
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "benchmarks.cold_cache", "--number", str(number)],
            cwd=ROOT, env={**kept, **caches, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for number in range(count)
    ]  # fmt: skip
    try:
        for process in started:
            assert process.stdout is not None
            process.stdout.readline()  # it is ready, or has ended
        for process in started:
            assert process.stdin is not None
            with suppress(BrokenPipeError):
                process.stdin.write("\n")
                process.stdin.flush()
        printed = [process.communicate(timeout=600) for process in started]
    finally:
        for process in started:
            process.kill()
    return [(process.returncode, *texts) for process, texts in zip(started, printed, strict=True)]


def main() -> int:
    """1 if there is a fault."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cold_cache", description=__doc__.partition("\n")[0])
    parser.add_argument("--processes", type=int, default=16)
    parser.add_argument("--number", type=int, help="be one of them")
    args = parser.parse_args()
    if args.number is not None:
        print(json.dumps(work(args.number)))
        return 0
    faults = run(args.processes)
    print("\n".join(faults) or f"{args.processes} processes on cold caches, and one after them: no fault")
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
