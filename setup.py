"""Builds fastcl._C, the CPU kernels: C++20 and nothing else, one source compiled once per instruction set.

``FASTCL_NATIVE=off`` leaves it out and makes a pure Python package; ``FASTCL_CXXFLAGS`` adds compiler flags. Where the
module cannot be built, installing still succeeds, and the reason and the compiler's words are kept in
``fastcl/_native_build.txt`` of the installation, to which ``fastcl.explain`` and ``fastcl info`` point.
Everything else stands in pyproject.toml.
"""

import os
import platform
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

REPORT = Path("fastcl", "_native_build.txt")
X86 = platform.machine().lower() in ("x86_64", "amd64")
AVX2 = ["-mavx2", "-mfma"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mprefer-vector-width=512"]
TABLES = {"baseline": []}
if X86:
    TABLES |= {"avx2": AVX2, "avx512": AVX512, "avx512_bf16": [*AVX512, "-mavx512bf16", "-DFASTCL_BF16"]}
# Contraction into fused multiply-adds is what makes the kernels fast; GCC leaves it out of -std=c++20.
FLAGS = ["-std=c++20", "-O3", "-g0", "-fPIC", "-fvisibility=hidden", "-ffp-contract=fast", "-fno-math-errno"]
FLAGS += ["-fno-trapping-math", *(["-DFASTCL_X86"] if X86 else []), *os.environ.get("FASTCL_CXXFLAGS", "").split()]


class Build(build_ext):
    """Compiles the kernel tables and the rest side by side, and links them; a failure is reported, not raised."""

    def build_extension(self, extension):
        module, report = Path(self.get_ext_fullpath(extension.name)), Path(self.build_lib, REPORT)
        for stale in (module, report, REPORT, *Path("fastcl").glob("_C.*")):
            stale.unlink(missing_ok=True)
        try:
            if self.compiler.compiler_type == "msvc":
                raise RuntimeError("the kernels need GCC or Clang, and this Python builds with MSVC")
            jobs = [
                (
                    f"kernels_{name}",
                    "kernels",
                    [f"-DFASTCL_KERNELS={name}_kernels", f'-DFASTCL_ISA_NAME="{name}"', *own],
                )
                for name, own in TABLES.items()
            ] + [(name, name, []) for name in ("engine", "doubles", "normalize", "pool", "bindings")]
            with ThreadPoolExecutor(os.cpu_count()) as workers:
                extension.extra_objects = list(workers.map(lambda job: self.object_file(extension, *job), jobs))
            super().build_extension(extension)
            self.built = True
        except Exception as error:
            self.built = False
            for file in (report, REPORT) if self.editable_mode or self.inplace else (report,):
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(f"{error}\n", encoding="utf-8")
            self.warn(f"fastcl._C is not built, so fastcl runs in plain torch on a CPU: {error}")

    def object_file(self, extension, name, source, own_flags):
        output = Path(self.build_temp, f"{name}.o")
        output.parent.mkdir(parents=True, exist_ok=True)
        includes = [f"-I{folder}" for folder in (*self.include_dirs, *extension.include_dirs)]
        command = [
            *self.compiler.compiler_so,
            *includes,
            *FLAGS,
            *own_flags,
            "-c",
            f"csrc/{source}.cpp",
            "-o",
            str(output),
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{command[0]} failed on csrc/{source}.cpp\n\n{' '.join(command)}\n{done.stderr}")
        return str(output)

    def copy_extensions_to_source(self):
        if self.built:
            super().copy_extensions_to_source()


def extensions():
    setting = os.environ.get("FASTCL_NATIVE", "auto")
    if setting not in ("auto", "cpu", "off"):
        raise SystemExit(f"FASTCL_NATIVE is {setting!r}; expected auto, cpu or off")
    if setting == "off":
        return []
    import pybind11  # a build requirement

    flags = [flag for flag in FLAGS if flag.startswith("-fsanitize")]
    return [
        Extension(
            "fastcl._C",
            sources=[],  # compiled by Build.object_file
            include_dirs=[pybind11.get_include()],
            extra_link_args=["-pthread", *flags],
            language="c++",
            optional=True,
        )
    ]


setup(ext_modules=extensions(), cmdclass={"build_ext": Build})
