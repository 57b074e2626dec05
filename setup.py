"""Builds fastcl._C, the CPU kernels: one C++ source compiled once per instruction set, no torch, no BLAS.

``FASTCL_NATIVE=off`` leaves it out and makes a pure Python package. Where it cannot be built, installing still succeeds
and the reason is written to ``fastcl/_native_build.txt``, which ``fastcl.explain`` and ``fastcl info`` point to.
Everything else stands in pyproject.toml.
"""

import os
import platform
import subprocess
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

REPORT = Path("fastcl", "_native_build.txt")
X86 = platform.machine().lower() in ("x86_64", "amd64")
AVX512 = ["-mavx2", "-mfma", "-mf16c", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"]
AVX512 += ["-mprefer-vector-width=512"]
TABLES = {"baseline": []}
if X86:
    TABLES |= {
        "avx2": ["-mavx2", "-mfma"],
        "avx512": AVX512,
        "avx512_bf16": [*AVX512, "-mavx512bf16", "-DFASTCL_BF16"],
    }
FLAGS = ["-std=c++20", "-O3", "-fvisibility=hidden", *(["-DFASTCL_X86"] if X86 else [])]
# Contraction into fused multiply-adds is what makes the kernels fast; GCC turns it off for -std=c++20.
FLAGS += ["-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", *os.environ.get("FASTCL_CXXFLAGS", "").split()]


class Build(build_ext):
    """Compiles every kernel table, then the extension; a failure is reported, not raised."""

    def build_extension(self, extension):
        target = Path(self.build_lib, REPORT)
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            if self.compiler.compiler_type == "msvc":
                raise RuntimeError("the kernels need GCC or Clang, and this Python builds with MSVC")
            extension.extra_objects = [self._table(name, flags) for name, flags in TABLES.items()]
            super().build_extension(extension)
            target.unlink(missing_ok=True)
            built = True
        except Exception as error:
            built = False
            log = getattr(self, "log_text", "")
            target.write_text(f"{type(error).__name__}: {error}\n\n{log}", encoding="utf-8")
            self.warn(f"fastcl._C was not built ({error}); fastcl runs without it, in plain torch")
        if self.inplace:  # an editable install has no build folder that lasts
            REPORT.unlink(missing_ok=True)
            if not built:
                REPORT.write_text(target.read_text(encoding="utf-8"), encoding="utf-8")

    def _table(self, name, flags):
        output = Path(self.build_temp, f"kernels_{name}.o")
        output.parent.mkdir(parents=True, exist_ok=True)
        names = [f"-DFASTCL_KERNELS={name}_kernels", f'-DFASTCL_ISA_NAME="{name}"']
        command = [*self.compiler.compiler_so, *FLAGS, *flags, *names, "-c", "csrc/kernels.cpp", "-o", str(output)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            self.log_text = f"{' '.join(command)}\n{done.stderr}"
            raise RuntimeError(f"the compiler failed on csrc/kernels.cpp for {name}")
        return str(output)

    def copy_extensions_to_source(self):
        if Path(self.get_ext_fullpath("fastcl._C")).exists() or Path(self.build_lib).rglob("_C*.so"):
            super().copy_extensions_to_source()


def extensions():
    setting = os.environ.get("FASTCL_NATIVE", "auto")
    if setting not in ("auto", "cpu", "off"):
        raise SystemExit(f"FASTCL_NATIVE is {setting!r}; expected auto, cpu or off")
    if setting == "off":
        return []
    import pybind11  # a build requirement

    return [
        Extension(
            "fastcl._C",
            ["csrc/bindings.cpp", "csrc/engine.cpp", "csrc/pool.cpp"],
            include_dirs=[pybind11.get_include()],
            extra_compile_args=FLAGS,
            extra_link_args=["-pthread"],
            language="c++",
            depends=[str(p) for p in Path("csrc").glob("*pp")],
            optional=True,
        )
    ]


setup(ext_modules=extensions(), cmdclass={"build_ext": Build})
