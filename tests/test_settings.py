"""Environment variables, each in a process of its own, since they are read once."""

import os
import subprocess
import sys

import pytest


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True
    )


def test_an_unknown_variable_warns() -> None:
    done = run("import fastcl", FASTCL_BACKND="chunked")
    assert "FASTCL_BACKND is set, but this version of fastcl does not know it" in done.stderr
    assert done.returncode == 0


def test_a_workspace_that_is_no_number_warns() -> None:
    done = run("from fastcl import _settings; print(_settings.workspace_bytes)", FASTCL_WORKSPACE_MB="plenty")
    assert "expected a number of MiB" in done.stderr
    assert done.stdout.strip() == "None"


@pytest.mark.parametrize(("name", "expected"), [("triton", "needs float32"), ("nupmy", "got backend 'nupmy'")])
def test_the_backend_is_forced_or_refused(name: str, expected: str) -> None:
    done = run(
        "import torch; from fastcl.pairwise import pair_topk; pair_topk(torch.eye(3).double(), topk=2)",
        FASTCL_BACKEND=name,
    )
    assert expected in done.stderr


def test_importing_is_silent() -> None:
    done = run("import fastcl")
    assert done.stdout == done.stderr == ""
