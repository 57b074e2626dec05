"""Builds what users install from a clean clone of this commit, and tries each of it in an environment of its own.

    python .ci/release.py [FOLDER]      keeps the files in FOLDER, customarily dist

They are the source distribution, and made of it the wheel with the C++ kernels, for this Python and platform, and the
wheel without them (``FASTCL_NATIVE=off``), for every one. An environment holds torch and what torch requires, linked
from the Python that runs this: nothing large is downloaded again, and neither this checkout nor a package that fastcl
forgot to require is there. CUDA C++ kernels, which take minutes, are left out. Needs the extra ``dev``, git and a C++20
compiler.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import venv
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
TRIAL = """
import sys
from pathlib import Path
import torch, fastcl
from fastcl.backends import native

assert Path(fastcl.__file__).is_relative_to(sys.prefix), f"{fastcl.__file__} is not of {sys.prefix}"
assert (native._C is not None) == (sys.argv[1] == "native"), native.status()
rows = torch.nn.functional.normalize(torch.randn(66, 17))
results = []
for functions in (fastcl.functional, fastcl.reference):
    z = rows.clone().requires_grad_()
    loss = functions.nt_xent(z, temperature=0.1)
    results.append((loss, *torch.autograd.grad(loss, z)))
torch.testing.assert_close(*results)
"""


def main(keep: str | None = None) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source, dist = folder / "source", folder / "dist"
        run("git", "clone", "--quiet", ROOT, source)
        python("-m", "build", "--no-isolation", "--outdir", dist, source, FASTCL_NATIVE="cpu")
        sdist, native = only(dist, "*.tar.gz"), only(dist, "*.whl")
        python("-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", dist, sdist, FASTCL_NATIVE="off")
        pure = only(dist, "*-py3-none-any.whl")
        python_tag = f"-cp{sys.version_info[0]}{sys.version_info[1]}-"
        assert python_tag in native.name and "linux" in native.name, f"{native.name} is not for this Python and Linux"
        # The kernels that pip would make of the source distribution are those in the wheel: one compilation is enough.
        for number, (file, kind) in enumerate([(native, "native"), (pure, "pure"), (sdist, "pure")]):
            try_in_new_environment(folder / str(number), file, kind)
        if keep:
            shutil.copytree(dist, keep, dirs_exist_ok=True)
        print(f"built, installed and tried: {sdist.name}, {native.name}, {pure.name}")


def try_in_new_environment(folder: Path, file: Path, kind: str) -> None:
    """Install, compare a loss with its definition, and, of a wheel, let ``fastcl selftest`` compare all."""
    print(f"+ {file.name} in a new environment", flush=True)
    venv.create(folder, symlinks=True)
    link_torch(only(folder, "lib/python*/site-packages"))
    python("-m", "pip", "--python", folder / "bin/python", "install", "--quiet", file, FASTCL_NATIVE="off")
    (folder / "trial.py").write_text(TRIAL, encoding="utf-8")
    run(folder / "bin/python", "trial.py", kind, cwd=folder)
    if file.suffix == ".whl":
        run(folder / "bin/fastcl", "selftest", cwd=folder)


def link_torch(site: Path) -> None:
    """Links torch, and what it requires, into the packages of an environment."""
    waiting, seen = [("torch", "")], set()
    while waiting:
        name, extra = waiting.pop()
        if (name, extra) in seen:
            continue
        seen.add((name, extra))
        found = metadata.distribution(name)
        for top in {file.parts[0] for file in found.files or ()} - {"..", "__pycache__"}:
            if not (site / top).exists():  # packages of NVIDIA share a folder
                (site / top).symlink_to(Path(str(found.locate_file(top))))
        for needed in map(Requirement, found.requires or ()):
            if needed.marker is None or needed.marker.evaluate({"extra": extra}):
                waiting += [(needed.name, extra) for extra in ("", *needed.extras)]


def only(folder: Path, pattern: str) -> Path:
    (found,) = folder.glob(pattern)
    return found


def python(*command: str | Path, **variables: str) -> None:
    run(sys.executable, *command, **variables)


def run(*command: str | Path, cwd: Path | None = None, **variables: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | variables
    subprocess.run(command, cwd=cwd, env=environment, check=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
