"""The CUDA C++ kernels, from their own source, on the simulator: ordinary memory, hostile timing, no GPU."""

import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from importlib.machinery import ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import ModuleType

import pytest
import torch

from fastcl.backends import Pairs, Sides, _cuda, chunked

from .oracle import assert_close

CSRC = Path(__file__).parent.parent / "csrc"
SOURCES = ("sums", "grad", "vectors")
LINKS = ("exp", "softplus")
# Of a gradient, whose weights are rounded to the dtype of the rows before they are multiplied.
GRADIENT = {torch.bfloat16: 4e-3, torch.float16: 6e-4}
each_dtype = pytest.mark.parametrize("dtype", list(GRADIENT))
SEEDS = (0, 7, 8)


def build(folder: Path, csrc: Path = CSRC) -> ModuleType:
    """Compile the kernels for the simulator and load them."""
    pybind11 = pytest.importorskip("pybind11", reason="the simulator's Python module is made with pybind11")
    flags = ["-std=c++20", "-O1", "-fPIC", "-fvisibility=hidden", "-DFASTCL_SIMULATE"]
    flags += [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]

    def compile_one(source: Path) -> str:
        output = folder / f"{source.stem}.o"
        done = subprocess.run(
            ["g++", *flags, "-x", "c++", "-c", str(source), "-o", str(output)], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return str(output)

    sources = [*(csrc / "cuda" / f"{name}.cu" for name in SOURCES), csrc / "sim" / "module.cpp"]
    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, sources))
    library = folder / f"_simulated{sysconfig.get_config_var('EXT_SUFFIX')}"
    subprocess.run(["g++", "-shared", *objects, "-o", str(library)], check=True)
    loader = ExtensionFileLoader("_simulated", str(library))
    module = module_from_spec(spec_from_loader("_simulated", loader))  # type: ignore[arg-type]
    loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def simulator(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    if sys.platform != "linux":
        pytest.skip("the simulator is built with g++ on Linux")
    return build(tmp_path_factory.mktemp("simulator"))


@pytest.fixture(params=SEEDS)
def seed(request: pytest.FixtureRequest, simulator: ModuleType, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(_cuda, "kernels", simulator)
    simulator.seed(request.param)
    return int(request.param)


@pytest.fixture
def kernels(simulator: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setattr(_cuda, "kernels", simulator)
    simulator.seed(0)
    return simulator


def unit(n: int, d: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    z = torch.randn(n, d, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(z, dim=1).to(dtype)


def integers(n: int, below: int, seed: int) -> torch.Tensor:
    return torch.randint(below, (n,), generator=torch.Generator().manual_seed(seed))


def one_set(n: int, d: int, dtype: torch.dtype, scale: float = 10.0) -> Pairs:
    z = unit(n, d, dtype)
    keys = torch.arange(n) // 2
    return Pairs(z, z, torch.tensor(scale), drop_x=keys, drop_y=keys, symmetric=True)


def two_sets(m: int, n: int, d: int, dtype: torch.dtype, masked: bool) -> Pairs:
    pairs = Pairs(unit(m, d, dtype), unit(n, d, dtype, 1), torch.tensor(5.0))
    if not masked:
        return pairs
    return pairs._replace(
        row_bias=torch.linspace(-1, 1, m), col_bias=torch.linspace(2, 0, n), drop_x=integers(m, 9, 0),
        drop_y=integers(n, 9, 1), only_x=integers(m, 2, 2), only_y=integers(n, 2, 3),
        row_ceiling=torch.linspace(1, 4, m), col_ceiling=torch.linspace(4, 1.5, n),
    )  # fmt: skip


def in_fp64(pairs: Pairs) -> Pairs:
    wide = [t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in pairs]
    return Pairs._make(wide)


def check(link: str, pairs: Pairs, tolerance: float = 1e-5) -> None:
    """Results and gradients of both sides against fp64."""
    exact, both = in_fp64(pairs), not pairs.symmetric
    row, col = chunked.reduce(link, exact, both, True)
    for got, want in zip(_cuda.reduce(link, pairs, both), (row, col), strict=True):
        assert_close(got, want, tolerance)
    rows = (row.masked_fill(row == -torch.inf, torch.inf), torch.linspace(0.5, 1.5, len(row)).double())
    cols = (col.masked_fill(col == -torch.inf, torch.inf), torch.linspace(2, 1, len(col)).double()) if both else rows
    choices = [Sides(*rows, *cols)] if pairs.symmetric else [Sides(*rows, *cols), Sides(*rows), Sides(None, None, *cols)]
    for sides in choices:
        narrow = Sides(*(t if t is None else t.float() for t in sides))
        got = _cuda.grad(link, pairs, narrow, True, both, True)[:4]
        want = chunked.grad(link, exact, sides, True, both, True)
        limits = (GRADIENT[pairs.x.dtype], GRADIENT[pairs.x.dtype], 10 * tolerance, 10 * tolerance)
        for g, w, limit in list(zip(got, want, limits, strict=True))[: 4 if both else 3]:  # one set has no second side
            assert_close(g, w, limit)


@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize(("n", "d"), [(150, 64), (150, 40), (70, 128), (40, 200)])
def test_one_set(n: int, d: int, link: str, seed: int) -> None:
    check(link, one_set(n, d, torch.bfloat16))


@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize("masked", [False, True])
def test_two_sets(masked: bool, link: str, seed: int) -> None:
    check(link, two_sets(70, 150, 64, torch.bfloat16, masked))


@each_dtype
@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize(("m", "n", "d"), [(1, 1, 8), (64, 128, 128), (33, 65, 256), (130, 3, 136)])
def test_shapes(m: int, n: int, d: int, link: str, dtype: torch.dtype, kernels: ModuleType) -> None:
    check(link, two_sets(m, n, d, dtype, False))
    check(link, two_sets(m, n, d, dtype, True))
