"""setup.py: what is compiled for which GPU, only what changed is compiled again, and what is said when it fails."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

import setup

needs_compiler = pytest.mark.skipif(not shutil.which("g++"), reason="g++ is not installed")


@pytest.mark.parametrize(
    ("architectures", "hopper", "wanted"),
    [
        ("80;90a", (), {"vectors": "80;90a", "sums": "80;90a", "grad": "80;90a"}),
        ("80;90a", ("wgmma",), {"vectors": "80;90a", "sums": "80", "grad": "80", "wgmma": "90a"}),
        ("90a", ("wgmma",), {"vectors": "90a", "sums": "90a", "grad": "90a", "wgmma": "90a"}),
        ("86;89", ("wgmma",), {"vectors": "86;89", "sums": "86;89", "grad": "86;89"}),
    ],
)
def test_which_source_is_compiled_for_which_gpu(
    architectures: str, hopper: tuple[str, ...], wanted: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    archs = architectures.split(";")
    monkeypatch.setattr(setup, "ARCHITECTURES", archs)
    monkeypatch.setattr(setup, "CUDA_SOURCES", ("vectors",))
    monkeypatch.setattr(setup, "HOPPER_SOURCES", hopper)
    monkeypatch.setattr(setup, "HOPPER_FLAGS", ["-DFASTCL_HOPPER"] if hopper and "90a" in archs else [])
    objects = setup.cuda_objects("nvcc")
    assert objects.keys() == {f"cuda_{name}" for name in wanted}
    for name, given in wanted.items():
        _, command = objects[f"cuda_{name}"]
        codes = [flag.partition(",code=")[2] for flag in command if flag.startswith("-gencode")]
        first = given.split(";")[0]
        ptx = [] if first == "90a" else [f"compute_{first}"]
        assert codes == [*(f"sm_{arch}" for arch in given.split(";")), *ptx]
        assert ("-DFASTCL_HOPPER" in command) == bool(setup.HOPPER_FLAGS)


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two sources, of which one includes a header."""
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc" / "one.cpp").write_text('#include "one.hpp"\nint one() { return number; }\n')
    (tmp_path / "csrc" / "one.hpp").write_text("constexpr int number = 1;\n")
    (tmp_path / "csrc" / "two.cpp").write_text("int two() { return 2; }\n")
    monkeypatch.setattr(setup, "ROOT", tmp_path)
    return tmp_path


def compile_both(project: Path, *flags: str) -> list[int]:
    """When each object was written, in nanoseconds."""
    objects = {name: (f"csrc/{name}.cpp", ["g++", *flags]) for name in ("one", "two")}
    return [os.stat(project / path).st_mtime_ns for path in setup.compiled(objects)]


@needs_compiler
def test_only_what_changed_is_compiled_again(project: Path) -> None:
    one, two = compile_both(project)
    assert compile_both(project) == [one, two]
    (project / "csrc" / "one.hpp").write_text("constexpr int number = 3;\n")
    again, same = compile_both(project)
    assert again > one and same == two
    with_quotes = compile_both(project, '-DNAME="$a b"')
    assert with_quotes[0] > again and with_quotes[1] > same
    assert compile_both(project, '-DNAME="$a b"') == with_quotes


@needs_compiler
def test_a_failure_has_the_words_of_the_compiler_and_stops_nothing_else(project: Path) -> None:
    (project / "csrc" / "one.hpp").write_text("#error no number\n")
    with pytest.raises(RuntimeError, match=r"^g\+\+ failed on csrc/one\.cpp\n[\s\S]*no number"):
        compile_both(project)
    assert (project / setup.OBJECTS / "two.o").exists()


def test_a_missing_ninja_is_a_reason(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    with pytest.raises(RuntimeError, match="pip install ninja"):
        compile_both(project)
