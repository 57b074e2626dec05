"""Builds fastcl._C: the CPU kernels, C++20 and nothing else, and the CUDA kernels where nvcc is found; never torch.

``FASTCL_NATIVE=cpu`` leaves out the CUDA kernels, ``off`` the module, which makes a pure Python package;
``FASTCL_CXXFLAGS`` adds compiler flags, ``FASTCL_CUDA_ARCHS`` says for which GPUs ("80;90a"). nvcc is looked for in
``CUDA_HOME``, on the PATH, and among packages of this Python. Where something cannot be built, installing still
succeeds, and the reason and the compiler's words are kept in ``fastcl/_native_build.txt`` or ``fastcl/_cuda_build.txt``
of the installation, to which ``fastcl.explain`` and ``fastcl info`` point; ``FASTCL_NATIVE=cuda`` makes it an error.
Ninja compiles, and keeps objects in ``build/native``: of any build after the first, only what changed.
Everything else stands in pyproject.toml.
"""

import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
OBJECTS = Path("build", "native")
REPORT, CUDA_REPORT = Path("fastcl", "_native_build.txt"), Path("fastcl", "_cuda_build.txt")
SETTING = os.environ.get("FASTCL_NATIVE", "auto")

X86 = platform.machine().lower() in ("x86_64", "amd64")
AVX2 = ["-mavx2", "-mfma"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mprefer-vector-width=512"]
TABLES = {"baseline": []}
if X86:
    TABLES |= {"avx2": AVX2, "avx512": AVX512, "avx512_bf16": [*AVX512, "-mavx512bf16", "-DFASTCL_BF16"]}
# Contraction into fused multiply-adds is what makes the kernels fast; GCC leaves it out of -std=c++20.
FLAGS = ["-std=c++20", "-O3", "-g0", "-fPIC", "-fvisibility=hidden", "-ffp-contract=fast", "-fno-math-errno"]
FLAGS += ["-fno-trapping-math", *(["-DFASTCL_X86"] if X86 else []), *os.environ.get("FASTCL_CXXFLAGS", "").split()]

ARCHITECTURES = os.environ.get("FASTCL_CUDA_ARCHS", "80;90a").split(";")
CUDA_SOURCES = ("vectors", "contrastive")  # for all of them
AMPERE_SOURCES = ("sums", "grad")
HOPPER_SOURCES = (
    "hopper_sums",
    "hopper_grad",
    "hopper_wide",
)  # for sm_90a alone, where they take the place of AMPERE_SOURCES
CUDA_FLAGS = ["-std=c++20", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden", "--threads", "2"]
HOPPER_FLAGS = ["-DFASTCL_HOPPER"] if HOPPER_SOURCES and "90a" in ARCHITECTURES else []


def cpu_objects(compiler):
    """Name of every object file of the CPU kernels: its source, and the command that compiles it."""
    own = {
        f"kernels_{name}": [f"-DFASTCL_KERNELS={name}_kernels", f'-DFASTCL_ISA_NAME="{name}"', *flags]
        for name, flags in TABLES.items()
    }
    kernels = {name: ("csrc/kernels.cpp", [*compiler, *FLAGS, *flags]) for name, flags in own.items()}
    others = ("engine", "doubles", "normalize", "contrastive", "pool")
    return kernels | {name: (f"csrc/{name}.cpp", [*compiler, *FLAGS]) for name in others}


def cuda_objects(nvcc):
    """The same of the CUDA kernels: what takes longest comes first, so that nothing waits for it at the end."""
    sources = {name: architectures_of(name) for name in (*HOPPER_SOURCES, *AMPERE_SOURCES, *CUDA_SOURCES)}
    return {
        f"cuda_{name}": (f"csrc/cuda/{name}.cu", [nvcc, *CUDA_FLAGS, *HOPPER_FLAGS, *generated_code(archs)])
        for name, archs in sources.items()
        if archs
    }


def architectures_of(source):
    """Those among ``ARCHITECTURES`` that a CUDA source is compiled for."""
    if source in HOPPER_SOURCES:
        return ["90a"] if HOPPER_FLAGS else []
    if source in AMPERE_SOURCES and HOPPER_FLAGS:
        return [arch for arch in ARCHITECTURES if arch != "90a"] or ARCHITECTURES
    return ARCHITECTURES


def generated_code(archs):
    """What nvcc is told: machine code for each, and of the first PTX, which later GPUs compile for themselves."""
    codes = [f"arch=compute_{arch},code=sm_{arch}" for arch in archs]
    if archs[0].isdigit():  # PTX of sm_90a serves no other GPU
        codes.append(f"arch=compute_{archs[0]},code=compute_{archs[0]}")
    return [f"-gencode={code}" for code in codes]


def cuda_libraries(nvcc):
    """What a program with CUDA kernels is linked with: nvcc knows where its own are, wherever it was installed."""
    told = [nvcc, "--dryrun", "-c", "-x", "cu", os.devnull, "-o", os.devnull]
    said = subprocess.run(told, capture_output=True, text=True, check=True).stderr
    folders = re.findall(r'"(-L[^"]*)"', next(line for line in said.splitlines() if "LIBRARIES=" in line))
    return [*folders, "-lcudart_static", "-ldl", "-lrt"]


def find_nvcc():
    """The CUDA compiler.

    Raises:
        RuntimeError: it is not there, or not wanted.
    """
    if SETTING == "cpu":
        raise RuntimeError("FASTCL_NATIVE is cpu")
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    candidates = [Path(home, "bin", "nvcc") for home in homes]
    candidates += [Path(found)] if (found := shutil.which("nvcc")) else []
    packages = importlib.util.find_spec("nvidia")
    for folder in packages.submodule_search_locations if packages else []:
        candidates += sorted(Path(folder).glob("*/bin/nvcc"), reverse=True)
    candidates.append(Path("/usr/local/cuda/bin/nvcc"))
    for candidate in candidates:
        if candidate.exists():
            return str(candidate)
    raise RuntimeError("nvcc was not found in CUDA_HOME, on the PATH, or among packages of this Python")


def compiled(objects, folder=OBJECTS):
    """Paths of the object files, in the order of their names, after Ninja has compiled those that are not up to date.

    Raises:
        RuntimeError: with the compiler's words.
    """
    scripts = sysconfig.get_path("scripts")  # a virtual environment need not be active
    ninja = shutil.which("ninja", path=os.pathsep.join([scripts, os.environ.get("PATH", "")]))
    if ninja is None:
        raise RuntimeError("ninja was not found on the PATH; pip install ninja")
    # Every output notes which headers it was made from; Ninja itself notes the command.
    rule = "rule compile\n  command = $command_line\n  depfile = $out.d\n  deps = gcc\n"
    text = f"builddir = {folder}\n{rule}"
    for name, (source, command) in objects.items():
        output = f"{folder}/{name}.o"
        dependencies = "-MD" if source.endswith(".cu") else "-MMD"
        line = shlex.join([*command, dependencies, "-MF", f"{output}.d", "-c", source, "-o", output])
        text += f"build {output}: compile {source}\n  command_line = {line.replace('$', '$$')}\n"
    file = ROOT / folder / "build.ninja"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")
    # A failure does not stop the others: the next call may need them without what failed.
    done = subprocess.run([ninja, "--quiet", "-k", "0", "-f", file], capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        failed = re.search(r"FAILED: .*?([\w-]+)\.o", done.stdout)
        source, command = objects[failed[1]] if failed else ("build.ninja", [ninja])
        raise RuntimeError(f"{command[0]} failed on {source}\n\n{done.stdout}{done.stderr}")
    return [f"{folder}/{name}.o" for name in objects]


class Build(build_ext):
    """Compiles and links; a failure is reported, and raised only by ``FASTCL_NATIVE=cuda``."""

    def build_extension(self, extension):
        module = Path(self.get_ext_fullpath(extension.name))
        reports = [Path(folder, name) for folder in (self.build_lib, "") for name in (REPORT, CUDA_REPORT)]
        for stale in (module, *reports, *Path("fastcl").glob("_C.*")):
            stale.unlink(missing_ok=True)
        self.built = False
        try:
            if self.compiler.compiler_type == "msvc":
                raise RuntimeError("the kernels need GCC or Clang, and this Python builds with MSVC")
            extension.extra_objects = self.objects(extension)
            super().build_extension(extension)
            self.built = True
        except Exception as error:
            self.report(REPORT, error, "fastcl._C is not built, so fastcl runs in plain torch on a CPU")

    def objects(self, extension):
        """Object files and libraries: with the CUDA kernels, or a report why without them."""
        compiler = self.compiler.compiler_so
        includes = [f"-I{folder}" for folder in (*self.include_dirs, *extension.include_dirs)]
        bindings = [*compiler, *includes, *FLAGS]
        cpu = cpu_objects(compiler)
        try:
            nvcc = find_nvcc()
            with_cuda = ("csrc/bindings.cpp", [*bindings, "-DFASTCL_CUDA", *HOPPER_FLAGS])
            return compiled(cuda_objects(nvcc) | cpu | {"bindings": with_cuda}) + cuda_libraries(nvcc)
        except Exception as error:
            self.report(CUDA_REPORT, error, "fastcl is built without CUDA C++ kernels; Triton's serve GPUs")
        return compiled(cpu | {"bindings": ("csrc/bindings.cpp", bindings)})

    def report(self, name, error, consequence):
        if SETTING == "cuda":
            raise SystemExit(f"FASTCL_NATIVE is cuda, and the kernels cannot be built: {error}")
        file = Path(self.build_lib, name)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{error}\n", encoding="utf-8")
        self.warn(f"{consequence}: {str(error).splitlines()[0]}")

    def copy_extensions_to_source(self):
        """For a build that is used where the sources are; reports go with the module, or come instead of it."""
        if self.built:
            super().copy_extensions_to_source()
        for name in (REPORT, CUDA_REPORT):
            if Path(self.build_lib, name).exists():
                shutil.copy(Path(self.build_lib, name), name)


def extensions():
    if SETTING not in ("auto", "cpu", "cuda", "off"):
        raise SystemExit(f"FASTCL_NATIVE is {SETTING!r}; expected auto, cpu, cuda or off")
    if SETTING == "off":
        return []
    import pybind11  # a build requirement

    return [
        Extension(
            "fastcl._C",
            sources=[],  # compiled by Build.objects
            include_dirs=[pybind11.get_include()],
            extra_link_args=["-pthread", *(flag for flag in FLAGS if flag.startswith("-fsanitize"))],
            language="c++",
            optional=True,
        )
    ]


if __name__ == "__main__":  # benchmarks.aot reads what it compiles
    setup(ext_modules=extensions(), cmdclass={"build_ext": Build})
