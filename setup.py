"""Builds fastcl._C: the CPU kernels, C++20 and nothing else, and the CUDA kernels where nvcc is found; never torch.

``FASTCL_NATIVE=cpu`` leaves out the CUDA kernels, ``off`` the module, which makes a pure Python package;
``FASTCL_CXXFLAGS`` adds compiler flags, ``FASTCL_CUDA_ARCHS`` says for which GPUs ("80;90a"). nvcc is looked for in
``CUDA_HOME``, on the PATH, and among packages of this Python. Where something cannot be built, installing still
succeeds, and the reason and the compiler's words are kept in ``fastcl/_native_build.txt`` or ``fastcl/_cuda_build.txt``
of the installation, to which ``fastcl.explain`` and ``fastcl info`` point. Objects that are up to date are not compiled
again.
Everything else stands in pyproject.toml.
"""

import importlib.util
import os
import platform
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

REPORT, CUDA_REPORT = Path("fastcl", "_native_build.txt"), Path("fastcl", "_cuda_build.txt")
X86 = platform.machine().lower() in ("x86_64", "amd64")
AVX2 = ["-mavx2", "-mfma"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mprefer-vector-width=512"]
TABLES = {"baseline": []}
if X86:
    TABLES |= {"avx2": AVX2, "avx512": AVX512, "avx512_bf16": [*AVX512, "-mavx512bf16", "-DFASTCL_BF16"]}
# Contraction into fused multiply-adds is what makes the kernels fast; GCC leaves it out of -std=c++20.
FLAGS = ["-std=c++20", "-O3", "-g0", "-fPIC", "-fvisibility=hidden", "-ffp-contract=fast", "-fno-math-errno"]
FLAGS += ["-fno-trapping-math", *(["-DFASTCL_X86"] if X86 else []), *os.environ.get("FASTCL_CXXFLAGS", "").split()]


CUDA_SOURCES = ("sums", "grad", "vectors", "contrastive")
CUDA_FLAGS = ["-std=c++20", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden", "--threads", "2"]


def find_nvcc():
    """The CUDA compiler, or None."""
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    candidates = [Path(home, "bin", "nvcc") for home in homes]
    candidates += [Path(found)] if (found := shutil.which("nvcc")) else []
    packages = importlib.util.find_spec("nvidia")
    for folder in packages.submodule_search_locations if packages else []:
        candidates += sorted(Path(folder).glob("*/bin/nvcc"), reverse=True)
    candidates.append(Path("/usr/local/cuda/bin/nvcc"))
    return next((str(c) for c in candidates if c.exists()), None)


def architectures():
    """What nvcc is told: machine code for each, and for the first also PTX, which later GPUs compile for themselves."""
    archs = os.environ.get("FASTCL_CUDA_ARCHS", "80;90a").split(";")
    first = f"arch=compute_{archs[0]},code=[sm_{archs[0]},compute_{archs[0]}]"
    return [f"-gencode={code}" for code in (first, *(f"arch=compute_{a},code=sm_{a}" for a in archs[1:]))]


def run(command, source):
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{command[0]} failed on {source}\n\n{' '.join(command)}\n{done.stderr}{done.stdout}")
    return done


class Build(build_ext):
    """Compiles the kernel tables and the rest side by side, and links them; a failure is reported, not raised."""

    def build_extension(self, extension):
        module = Path(self.get_ext_fullpath(extension.name))
        for stale in (module, *self.reports(REPORT), *self.reports(CUDA_REPORT), *Path("fastcl").glob("_C.*")):
            stale.unlink(missing_ok=True)
        try:
            if self.compiler.compiler_type == "msvc":
                raise RuntimeError("the kernels need GCC or Clang, and this Python builds with MSVC")
            with ThreadPoolExecutor((os.cpu_count() or 1) + 1) as workers:  # one of them waits for the CUDA objects
                cuda = workers.submit(self.cuda_objects, workers)
                jobs = [
                    (
                        f"kernels_{name}",
                        "kernels",
                        [f"-DFASTCL_KERNELS={name}_kernels", f'-DFASTCL_ISA_NAME="{name}"', *own],
                    )
                    for name, own in TABLES.items()
                ] + [(name, name, []) for name in ("engine", "doubles", "normalize", "pool")]
                objects = [workers.submit(self.object_file, extension, *job) for job in jobs]
                with_cuda = cuda.result()
                bindings = self.object_file(extension, "bindings", "bindings", ["-DFASTCL_CUDA"] if with_cuda else [])
            extension.extra_objects = [*(o.result() for o in objects), bindings, *with_cuda]
            super().build_extension(extension)
            self.built = True
        except Exception as error:
            self.built = False
            self.report(REPORT, f"{error}\n")
            self.warn(f"fastcl._C is not built, so fastcl runs in plain torch on a CPU: {error}")

    def reports(self, report):
        """Where it is kept: in what is installed, and beside the sources where those are used."""
        return (Path(self.build_lib, report), report)

    def report(self, report, text):
        for file in self.reports(report) if self.editable_mode or self.inplace else self.reports(report)[:1]:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8")

    def object_file(self, extension, name, source, own_flags):
        includes = [f"-I{folder}" for folder in (*self.include_dirs, *extension.include_dirs)]
        return self.compiled(name, f"csrc/{source}.cpp", [*self.compiler.compiler_so, *includes, *FLAGS, *own_flags])

    def compiled(self, name, source, command):
        """An object file, compiled unless it is newer than all of csrc and was compiled by the same command."""
        output, note = Path(self.build_temp, f"{name}.o"), Path(self.build_temp, f"{name}.command")
        command = [*command, "-c", source, "-o", str(output)]
        newest = max(file.stat().st_mtime for file in Path("csrc").rglob("*") if file.is_file())
        current = output.exists() and note.exists() and note.read_text(encoding="utf-8") == "\n".join(command)
        if not current or output.stat().st_mtime < newest:
            output.parent.mkdir(parents=True, exist_ok=True)
            note.unlink(missing_ok=True)
            run(command, source)
            note.write_text("\n".join(command), encoding="utf-8")
        return str(output)

    def cuda_objects(self, workers):
        """Objects and libraries of the CUDA kernels; none, and a report, where they cannot be built."""
        try:
            if os.environ.get("FASTCL_NATIVE") == "cpu":
                raise RuntimeError("FASTCL_NATIVE is cpu")
            nvcc = find_nvcc()
            if nvcc is None:
                raise RuntimeError("nvcc was not found in CUDA_HOME, on the PATH, or among packages of this Python")
            command = [nvcc, *CUDA_FLAGS, *architectures()]
            objects = [
                workers.submit(self.compiled, f"cuda_{name}", f"csrc/cuda/{name}.cu", command) for name in CUDA_SOURCES
            ]
            # nvcc knows where its own libraries are, wherever it was installed
            said = run([nvcc, "--dryrun", "-c", "-x", "cu", os.devnull, "-o", os.devnull], "its own paths").stderr
            libraries = re.findall(r'"(-L[^"]*)"', next(line for line in said.splitlines() if "LIBRARIES=" in line))
            return [*(o.result() for o in objects), *libraries, "-lcudart_static", "-ldl", "-lrt"]
        except Exception as error:
            self.report(CUDA_REPORT, f"{error}\n")
            self.warn(f"fastcl is built without CUDA C++ kernels; Triton's serve GPUs: {str(error).splitlines()[0]}")
            return []

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
