"""Compile every kernel for every architecture, on a machine without a GPU, and read what came out.

    python -m benchmarks.aot --json benchmarks/results/aot.json

The losses of ``fastcl.testing.HOT`` and a call with every mask and bias run as they would on a GPU, on CPU tensors,
with Triton told to compile for one architecture after another and to launch nothing. So every kernel is compiled with
its real launch arguments, alignments and options. Triton keeps what it compiled by the hash of source and options
(``TRITON_CACHE_DIR``): a second run only disassembles.

CUDA C++ kernels are read from the object files of the module's own build (``setup.py``), which are compiled first where
they are not up to date.

Each row is one compiled kernel: registers per thread, bytes of stack (what did not fit into registers: a spill), shared
memory of a block against what the architecture has, and counts of instructions in the machine code.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
# Shared memory a block may have, in bytes: CUDA C++ Programming Guide, technical specifications per compute capability.
SHARED_LIMIT = {75: 65536, 80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}
MATRIX = {  # machine instructions that multiply matrices, by the name of their family in PTX
    "wgmma": "HGMMA",
    "tcgen05": "UTC[HQ]MMA",
    "mma.sync": "HMMA",
}
WIDE = r"(LDG|LDGSTS)\.E\S*\.128|UTMALDG|UBLKCP"  # 16 bytes per thread, or a bulk copy
SPILL = r"(LDL|STL)\b"
INSTRUCTION = r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@\S+\s+)?([A-Z][\w.]*)"
# What machine code says of shared memory includes, from sm_90 on, the system's own share; the limit does not.
SYSTEM_SHARED = dict.fromkeys((90, 100, 120), 1024)
LOOP = {"exponentials": r"MUFU\.EX2", "products": "HGMMA|UTC[HQ]MMA|HMMA"}
# Kernels that always multiply matrices; _finish_kernel does only where it may have to compute a block again.
PRODUCTS = {
    "_sums_kernel", "_grad_kernel", "_weights_kernel", "_product_kernel", "_one_pass_kernel", "_topk_kernel",
}  # fmt: skip
# Sources of CUDA C++ kernels that always multiply, and by which instructions.
CUDA_PRODUCTS = {
    "csrc/cuda/sums.cu": "mma.sync",
    "csrc/cuda/grad.cu": "mma.sync",
    "csrc/cuda/hopper_sums.cu": "wgmma",
    "csrc/cuda/hopper_grad.cu": "wgmma",
    "csrc/cuda/hopper_wide.cu": "wgmma",
}
# Shared memory that a launch asks for, as a kernel's source calls it, by its template arguments; others need no more
# than a few bytes.
DYNAMIC_SHARED = {
    "sums": "kSumsShared<{1}>",
    "grad": "kGradShared<{1}>",
    "hopper_sums": "hopper::SumsLayout<{1}>::kBytes",
    "hopper_grad": "hopper::GradLayout<{1}>::kBytes",
    "hopper_wide": "hopper::WideLayout::kBytes",
    "hopper_product": "hopper::WideLayout::kBytes",
}
# Template arguments as csrc/kernels.hpp numbers them.
ENUMERATORS = {"Dtype": ("f32", "bf16", "f16", "f64"), "Link": ("exp", "softplus")}
DTYPES = ("float32", "tf32", "float16", "bfloat16")
ROWS, DIM = 256, 128  # a multiple of 16, and of what a 16-byte load needs
ODD_ROWS, ODD_DIM = 101, 37
# Between them they launch every kernel; the last with every mask, where registers are short.
FEW = (
    "nt_xent", "clip", "clip, strips", "pair_logsumexp, frozen columns", "pair_topk", "pair_logsumexp, every mask",
)  # fmt: skip
# Bytes that tiles may spill which were faster all the same than any that does not, on an H200 (docs/gpu.md).
MEASURED = {"_grad_kernel": 448, "_weights_kernel": 192, "_topk_kernel": 200}
STRIP_ROWS = 4096  # long enough for strips of weights


@dataclass
class Compiled:
    """One kernel for one architecture."""

    kernel: str  # of Triton _sums_kernel; of CUDA C++ sums<bf16, 128, exp>
    arch: int
    dtype: str
    used_by: list[str]  # losses; of CUDA C++ the source
    aligned: bool  # D is a multiple of 8
    warps: int
    registers: int
    stack_bytes: int
    spill_instructions: int
    shared_bytes: int
    shared_limit: int
    instructions: int
    wide_loads: int
    matrix: dict[str, int]
    loop: dict[str, int]  # of the loop that multiplies: all instructions, and some kinds of them

    @property
    def is_cuda(self) -> bool:
        return self.used_by[0].endswith(".cu")

    @property
    def multiplies(self) -> bool:
        return self.kernel in PRODUCTS or self.used_by[0] in CUDA_PRODUCTS

    @property
    def family(self) -> str | None:
        """The matrix instructions that it should use."""
        return CUDA_PRODUCTS.get(self.used_by[0]) or matrix_family(self.arch, self.dtype)


def compile_all(arch: int, dtype: str, few: bool = False) -> list[Compiled]:
    """Every kernel that fastcl launches with rows of this dtype on this architecture. Changes Triton for good.

    ``few``: of the losses used most, which launch every kernel once.
    """
    import torch

    seen: dict[str, tuple[Any, bool, set[str]]] = {}
    using: list[Any] = ["", True]

    def note(compiled: Any) -> None:
        # what it was compiled from: the same source with the same arguments has the same hash
        seen.setdefault(compiled.metadata.hash, (compiled, using[1], set()))[2].add(using[0])

    launch_nothing(arch, dtype, note)
    rows_dtype = torch.float32 if dtype == "tf32" else getattr(torch, dtype)
    for name, aligned, call in _calls(rows_dtype):
        if few and name not in FEW:
            continue
        using[:] = [name, aligned]
        call()
    return [_read(compiled, arch, dtype, sorted(users), aligned) for compiled, aligned, users in seen.values()]


def launch_nothing(arch: int, dtype: str, note: Callable[[Any], None]) -> None:
    """From now on Triton compiles for this architecture, tells ``note`` of every kernel, and launches none."""
    import torch
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver

    import fastcl.backends.triton as backend

    class NoDevice:
        """Answers what Triton asks a driver before it compiles."""

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", arch, 32)

        def get_current_device(self) -> int:
            return arch  # compiled kernels are kept by device

        def get_current_stream(self, device: int) -> int:
            return 0

        def get_active_torch_device(self) -> torch.device:
            return torch.device("cpu")

    driver.set_active(NoDevice())
    run = triton.JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        compiled = run(self, *args, grid=grid, warmup=True, **kwargs)
        note(compiled)
        return compiled

    triton.JITFunction.run = compile_only
    backend.unsupported = lambda op, x: None
    backend._by_library = lambda y: False  # our own product of strips, which runs where torch's cannot
    processors = {75: 40, 80: 108, 86: 84, 89: 128, 90: 132, 100: 148, 120: 170}  # of the largest GPU of each
    limits = backend.Limits("", (arch // 10, arch % 10), processors[arch])
    backend.limits = lambda device: limits  # type: ignore[assignment]
    torch.backends.cuda.matmul.allow_tf32 = dtype == "tf32"


def _calls(dtype: Any) -> list[tuple[str, bool, Callable[[], None]]]:
    """Name, whether D is aligned, and a function that runs forward and backward."""
    import torch

    from fastcl import functional, pairwise, use_backend
    from fastcl.testing import HOT, LossCase

    def backward(result: Any) -> None:
        sum(t.sum() for t in (result if isinstance(result, tuple) else (result,))).backward()

    def loss(case: LossCase, rows: int = ROWS, d: int = DIM) -> Callable[[], None]:
        def call() -> None:
            args, kwargs = case.inputs(rows // case.rows(1)[0], d, dtype=dtype)
            with use_backend("triton"):
                backward(getattr(functional, case.name)(*args, normalize=d == DIM, **kwargs))

        return call

    def frozen() -> None:
        q, k = torch.randn(ROWS, DIM).to(dtype).requires_grad_(), torch.randn(2 * ROWS, DIM).to(dtype)
        with use_backend("triton"):
            backward(pairwise.pair_logsumexp(q, k, scale=2.0))

    def mining() -> None:
        q = torch.randn(ROWS, DIM).to(dtype).requires_grad_()
        with use_backend("triton"):
            unit = pairwise.l2_normalize(q)
            unit.sum().backward()
            for topk in (1, 20, 200):
                pairwise.pair_topk(unit.detach(), topk=topk, drop=torch.arange(ROWS))

    def everything(function: Any, n: int, d: int, symmetric: bool) -> Callable[[], None]:
        def call() -> None:
            q, k = (torch.randn(n, d).to(dtype).requires_grad_() for _ in range(2))
            bias, keys = torch.randn(n, requires_grad=True), torch.arange(n)
            given = dict(scale=torch.tensor(2.0, requires_grad=True), row_bias=bias, drop=keys, only=keys)
            with use_backend("triton"):
                if symmetric:
                    backward(function(q, col_bias=bias, **given))
                else:
                    ceiling = torch.zeros(n)
                    backward(function(q, k, col_bias=bias * 1, ceiling=ceiling, both=True, **given))

        return call

    by_name = {case.name: case for case in HOT}
    lse, softplus = pairwise.pair_logsumexp, pairwise.pair_softplus_sum
    return [
        *((c.label, True, loss(c)) for c in HOT),
        *((f"nt_xent, D = {d}", True, loss(by_name["nt_xent"], ROWS, d)) for d in (64, 256, 512)),
        *((f"{n}, strips", True, loss(by_name[n], STRIP_ROWS, 512)) for n in ("nt_xent", "clip", "siglip")),
        ("pair_logsumexp, frozen columns", True, frozen),
        ("pair_topk", True, mining),
        ("pair_logsumexp, every mask", True, everything(lse, ROWS, DIM, False)),
        ("pair_logsumexp, every mask, odd sizes", False, everything(lse, ODD_ROWS, ODD_DIM, False)),
        ("pair_logsumexp, every mask, one set", True, everything(lse, ROWS, DIM, True)),
        ("pair_softplus_sum, every mask", True, everything(softplus, ROWS, DIM, False)),
        *((f"pair_softplus_sum, every mask, D = {d}", True, everything(softplus, ROWS, d, False)) for d in (64, 256)),
    ]


def _read(compiled: Any, arch: int, dtype: str, users: list[str], aligned: bool) -> Compiled:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        resources = _tool("cuobjdump", "--dump-resource-usage", file.name)
        code = _tool("nvdisasm", "-c", "--no-dataflow", file.name)  # the same text, sooner
    found = re.search(r"REG:(\d+) STACK:(\d+)", resources)
    assert found, resources
    return Compiled(
        kernel=compiled.metadata.name,
        arch=arch,
        dtype=dtype,
        used_by=users,
        aligned=aligned,
        warps=compiled.metadata.num_warps,
        registers=int(found[1]),
        stack_bytes=int(found[2]),
        shared_bytes=compiled.metadata.shared,
        shared_limit=SHARED_LIMIT[arch],
        **_counts(code),
    )


def compile_cuda() -> list[Compiled]:
    """Every CUDA C++ kernel, for the architectures that it ships for.

    Raises:
        RuntimeError: nvcc was not found, or does not compile them, with its words.
    """
    import setup

    nvcc = setup.find_nvcc()
    objects = setup.cuda_objects(nvcc)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for (source, _), path in zip(objects.values(), setup.compiled(objects), strict=True):
            _tool("cuobjdump", "--extract-elf", "all", str(ROOT / path), cwd=folder)
            for cubin in sorted(Path(folder).glob("*.cubin")):
                rows += _read_cuda(cubin, source)
                cubin.unlink()
        asked = _dynamic_shared(nvcc, {row.kernel: row.used_by[0] for row in rows}, Path(folder))
    return [replace(row, shared_bytes=row.shared_bytes + asked.get(row.kernel, 0)) for row in rows]


def _read_cuda(cubin: Path, source: str) -> list[Compiled]:
    arch = int(re.findall(r"sm_(\d+)", cubin.name)[-1])
    resources, listing = _tool("cuobjdump", "--dump-resource-usage", str(cubin)), _tool("nvdisasm", str(cubin))
    rows = []
    for symbol, registers, stack, shared in re.findall(
        r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)", resources
    ):
        threads = re.search(
            rf"\.section\s+\.nv\.info\.{symbol},.*?EIATTR_MAX_THREADS.*?\.word\s+(0x\w+)", listing, re.DOTALL
        )
        code = re.search(rf"^\.text\.{symbol}:$(.*?)(?=\.section)", listing, re.DOTALL | re.MULTILINE)
        assert threads and code, symbol
        kernel = _cuda_name(symbol)
        rows.append(
            Compiled(
                kernel=kernel,
                arch=arch,
                dtype="bfloat16" if "bf16" in kernel else "float16" if "f16" in kernel else "float32",
                used_by=[source],
                aligned=True,
                warps=int(threads[1], 16) // 32,
                registers=int(registers),
                stack_bytes=int(stack),
                shared_bytes=int(shared) - SYSTEM_SHARED.get(arch, 0),
                shared_limit=SHARED_LIMIT[arch],
                **_counts(code[1]),
            )
        )
    return rows


def _cuda_name(symbol: str) -> str:
    """``sums<bf16, 128, exp>`` of what the compiler calls it."""
    full = subprocess.run(["c++filt", symbol], capture_output=True, text=True, check=True).stdout
    found = re.search(r"(\w+)_kernel(<.*?>)?\(", full)
    assert found, full
    return found[1] + re.sub(r"\(fastcl::(\w+)\)(\d)", lambda m: ENUMERATORS[m[1]][int(m[2])], found[2] or "")


def _dynamic_shared(nvcc: str, kernels: dict[str, str], folder: Path) -> dict[str, int]:
    """Bytes that a launch of each kernel asks for, by a program that prints what the sources say."""
    lines, headers = [], []
    for kernel, source in kernels.items():
        name, *arguments = re.findall(r"\w+", kernel)
        if name in DYNAMIC_SHARED:
            headers.append(f'#include "{ROOT / source}h"')
            lines.append(f'std::printf("%s: %d\\n", "{kernel}", {DYNAMIC_SHARED[name].format(*arguments)});')
    program = "\n".join(
        [*dict.fromkeys(headers), "#include <cstdio>", "using namespace fastcl::cuda;", "int main() {", *lines, "}"]
    )
    (folder / "program.cu").write_text(program, encoding="utf-8")
    subprocess.run([nvcc, "-std=c++20", "-arch=sm_90a", "program.cu", "-o", "program"], cwd=folder, check=True)
    printed = subprocess.run([folder / "program"], capture_output=True, text=True, check=True).stdout
    return {kernel: int(size) for kernel, size in re.findall(r"(.*): (\d+)", printed)}


def _counts(code: str) -> dict[str, Any]:
    """Of a kernel's machine code."""
    instructions = re.findall(INSTRUCTION, code, re.MULTILINE)
    return {
        "spill_instructions": _count(SPILL, instructions),
        "instructions": len(instructions),
        "wide_loads": _count(WIDE, instructions),
        "matrix": {family: n for family, name in MATRIX.items() if (n := _count(name, instructions))},
        "loop": _loop(code),
    }


def _loop(code: str) -> dict[str, int]:
    """Instructions of the innermost loop that multiplies; where none does, of one with exponentials, or of any; of
    several, that with the most of both. Empty where nothing loops.

    A loop is what lies between a label and a branch back to it. A path taken rarely (masks) that the assembler left
    inside counts as if it were always taken.
    """
    listing: list[str] = []
    labels: dict[str, int] = {}
    loops = []
    for line in code.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label[1]] = len(listing)
        elif found := re.match(INSTRUCTION, line):
            listing.append(found[1])
            back = re.search(r"`\((\.L_x_\d+)\)", line)
            if found[1].startswith("BRA") and back and back[1] in labels:
                loops.append((labels[back[1]], len(listing)))

    def count(pattern: str, loop: tuple[int, int]) -> int:
        return _count(pattern, listing[slice(*loop)])

    for pattern in (LOOP["products"], LOOP["exponentials"], ""):
        some = [loop for loop in loops if count(pattern, loop)]
        if some:
            break

    def innermost(among: list[tuple[int, int]]) -> list[tuple[int, int]]:
        return [(a, b) for a, b in some if not any((c, d) != (a, b) and a <= c and d <= b for c, d in among)]

    # A wait that tries again may be a loop inside, or a jump back from far behind, which looks like a long loop.
    busy = "|".join(LOOP.values())
    inner = innermost(loops) or innermost(some)
    begin, end = max(inner, key=lambda loop: (count(busy, loop), loop[0] - loop[1]), default=(0, 0))
    body = listing[begin:end]
    return {"all": len(body), **{kind: n for kind, name in LOOP.items() if (n := _count(name, body))}} if body else {}


def _count(pattern: str, instructions: list[str]) -> int:
    return sum(bool(re.match(pattern, i)) for i in instructions)


def _tool(name: str, *options: str, cwd: str | None = None) -> str:
    """What one of the tools says that come with Triton."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([tool, *options], capture_output=True, text=True, check=True, cwd=cwd).stdout


def faults(rows: list[Compiled]) -> list[str]:
    """A sentence for everything that a compiled kernel should not be."""
    found = []
    for row in rows:
        name = f"{row.kernel} for sm_{row.arch}, {row.dtype}, of {row.used_by[0]}"
        if row.shared_bytes > row.shared_limit:
            found.append(f"{name}: {row.shared_bytes} bytes of shared memory, the architecture has {row.shared_limit}")
        allowed = MEASURED.get(row.kernel, 0) if row.arch == 90 and row.dtype in ("bfloat16", "float16") else 0
        if row.stack_bytes > allowed or (row.spill_instructions and not allowed):
            found.append(f"{name}: spills {row.stack_bytes} bytes of registers")
        if (row.matrix or row.multiplies) and set(row.matrix) != ({row.family} if row.family else set()):
            found.append(f"{name}: multiplies with {sorted(row.matrix) or 'fp32 units'}, expected {row.family}")
        if row.aligned and row.multiplies and not row.wide_loads:
            found.append(f"{name}: no 16-byte loads of aligned rows")
    return found


def matrix_family(arch: int, dtype: str) -> str | None:
    """The matrix instructions that Triton's products of these rows should use; it has none before Ampere."""
    if dtype == "float32" or arch < 80:
        return None
    return {90: "wgmma", 100: "tcgen05"}.get(arch, "mma.sync")


def compile_everything(
    archs: Iterable[int] = tuple(SHARED_LIMIT), dtypes: Iterable[str] = DTYPES, workers: int = 2, few: bool = False
) -> tuple[list[Compiled], list[dict[str, Any]]]:
    """All kernels, and what could not be compiled, with the compiler's reason: arch, dtype, reason."""
    jobs = [(arch, dtype) for arch in archs for dtype in dtypes if not (arch < 80 and dtype == "tf32")]
    with ThreadPoolExecutor(workers) as pool:
        results = list(pool.map(lambda job: _in_a_process(job[0], job[1], few), jobs))
    rows = [row for result in results if isinstance(result, list) for row in result]
    failed = [
        {"arch": arch, "dtype": dtype, "reason": result}
        for (arch, dtype), result in zip(jobs, results, strict=True)
        if isinstance(result, str)
    ]
    return rows, failed


def _in_a_process(arch: int, dtype: str, few: bool) -> list[Compiled] | str:
    """Of its own: Triton's driver and what it compiled belong to one architecture, and its compiler may abort."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}  # tests set it
    command = [sys.executable, "-m", "benchmarks.aot", "--one", str(arch), dtype, *(["--few"] if few else [])]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env={**environment, "OMP_NUM_THREADS": "1"}
    )
    if done.returncode:
        return (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    return [Compiled(**row) for row in json.loads(done.stdout.splitlines()[-1])]


def main() -> int:
    """Compile, print a line per architecture and dtype, write the rows; 1 if there is a fault."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.aot", description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--archs",
        default=",".join(map(str, SHARED_LIMIT)),
        help="compute capabilities, with commas (default: %(default)s)",
    )
    parser.add_argument("--dtypes", default=",".join(DTYPES), help="of the rows, with commas (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="processes that compile (default: %(default)s)")
    parser.add_argument("--json", help="write the record here")
    parser.add_argument("--few", action="store_true", help="only what launches every kernel once")
    parser.add_argument("--one", nargs=2, metavar=("ARCH", "DTYPE"), help="compile here, and print the rows as JSON")
    args = parser.parse_args()
    if args.one:
        print(json.dumps([asdict(row) for row in compile_all(int(args.one[0]), args.one[1], args.few)]))
        return 0
    rows, failed = compile_everything(map(int, args.archs.split(",")), args.dtypes.split(","), args.workers, args.few)
    try:
        rows += compile_cuda()
    except RuntimeError as error:
        failed.append({"arch": 80, "dtype": "CUDA C++", "reason": str(error).splitlines()[0]})
    for key in dict.fromkeys((row.arch, row.dtype, row.is_cuda) for row in rows):
        group = [row for row in rows if (row.arch, row.dtype, row.is_cuda) == key]
        print(
            f"{'CUDA C++' if key[2] else 'Triton':<9}sm_{key[0]:<4} {key[1]:<9} {len(group):>3} kernels, "
            f"at most {max(r.registers for r in group)} registers, "
            f"{max(r.stack_bytes for r in group)} bytes spilled, {max(r.shared_bytes for r in group):,} of "
            f"{group[0].shared_limit:,} bytes shared, {', '.join({m for r in group for m in r.matrix}) or 'fp32 units'}"
        )
    for failure in failed:
        print(f"sm_{failure['arch']} {failure['dtype']}: not compiled ({failure['reason']})")
    wrong = faults(rows)
    print("\n".join(wrong) or f"{len(rows)} kernels, no fault")
    if args.json:
        _write(args.json, rows, failed)
    return bool(wrong or failed)


def _write(path: str, rows: list[Compiled], failed: list[dict[str, Any]]) -> None:
    from importlib.metadata import version

    import setup
    from fastcl._info import provenance

    nvcc = subprocess.run([setup.find_nvcc(), "--version"], capture_output=True, text=True, check=True).stdout
    head = {
        **provenance("python -m benchmarks.aot --json benchmarks/results/aot.json"),
        "versions": {
            **{name: version(name) for name in ("torch", "triton")},
            "nvcc": re.findall(r"V([\d.]+)", nvcc)[0],
        },
        "not_compiled": failed,
    }
    lines = ",\n".join(f"  {json.dumps(asdict(row))}" for row in rows)
    with open(path, "w", encoding="utf-8") as file:
        file.write(json.dumps(head, indent=1)[:-2] + f',\n "rows": [\n{lines}\n ]\n}}\n')


if __name__ == "__main__":
    sys.exit(main())
