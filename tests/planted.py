"""A plugin of pytest: would every numeric assertion notice a wrong result, and how near its bound is the right one?

    python -m pytest -p tests.planted --planted-json FILE tests

Where an assertion holds, it is asked again with what came made wrong, in every way below; one that still holds accepts
a wrong result, and the run fails. Asked are ``oracle.assert_close``, ``oracle.error(...) < bound``, and what PyTorch
and pytest have: ``torch.testing.assert_close``, ``torch.allclose``, ``torch.isclose`` and ``pytest.approx``.
``torch.equal`` is not: it accepts nothing but the very bits.
"""

from __future__ import annotations

import json
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import oracle


def _worst_row(t: Tensor) -> int:
    """The longest row: the one whose loss matters most."""
    return int(t.reshape(len(t), -1).norm(dim=1).argmax())


def _one_element(t: Tensor, value: float) -> Tensor:
    t = t.clone(memory_format=torch.contiguous_format)
    t.view(-1)[int(t.abs().argmax())] = value
    return t


def _row(t: Tensor, factor: float) -> Tensor:
    t = t.clone()
    t[_worst_row(t)] *= factor
    return t


# What is wrong with a result, as kernels go wrong: a sign, a factor, a row, a tile, a dtype's range.
WRONGS: dict[str, Callable[[Tensor], Tensor]] = {
    "zero": torch.zeros_like,
    "negated": torch.neg,
    "doubled": lambda t: 2 * t,
    "halved": lambda t: t / 2,
    "1 % large": lambda t: 1.01 * t,
    "without its signs": torch.abs,
    "a constant added": lambda t: t + t.abs().mean(),
    "one NaN": lambda t: _one_element(t, math.nan),
    "one inf": lambda t: _one_element(t, math.inf),
    "transposed": lambda t: t.mT.reshape(t.shape),
    "one row off": lambda t: t.roll(1, 0),
    "one column off": lambda t: t.roll(1, -1),
    "backwards": lambda t: t.flip(0),
    "a row missing": lambda t: _row(t, 0.0),
    "a row counted twice": lambda t: _row(t, 2.0),
    "half of the rows missing": lambda t: torch.cat([t[: len(t) // 2], torch.zeros_like(t[len(t) // 2 :])]),
}
_OF_ROWS = 9  # those from here on want two rows

# Assertions that are not asked, by the file or the test that makes them.
EXCEPT = {
    "drawn.py": "what drawn inputs give may be as small as its rounding; every invariant has a planted bug of its own",
    "test_invariants.py": "the same",
    "test_a_step_in_16_bits_is_nearly_the_step_in_32": "a network in 16 bits is itself a per cent off",
    "test_few_label_probe_is_each_draw_by_itself": "two minimisations end a tenth of a point apart",
    "test_losses_reach_the_fused_operator": "compared with rows that were not rounded to bf16",
}

# A wrong is one where it moves what came by this much: a row of zeros is not missed, nor a symmetric matrix transposed.
LEAST = 0.005


def wrongs(got: Tensor, want: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Every wrong of a result, shape and dtype kept, that differs from it."""
    got = got.detach()
    if got.numel() == 0 or not got.is_floating_point() or not bool(got.isfinite().all()):
        return
    nothing = not bool(want.any())
    if nothing:  # what came is a rounding error, of which the double is as good
        got = torch.ones_like(got)
        yield "not zero", got
    size = float(got.double().norm())
    for i, (name, spoil) in enumerate(WRONGS.items()):
        if (i >= _OF_ROWS and (got.ndim == 0 or len(got) < 2)) or (name == "transposed" and got.ndim < 2):
            continue
        if nothing and name == "zero":
            continue
        wrong = spoil(got)
        distance = float((wrong.double() - got.double()).norm())
        if math.isnan(distance) or (size > 0 and distance > LEAST * size):
            yield name, wrong


class Watch:
    """What was seen in one test."""

    def __init__(self, test: str = "") -> None:
        self.test = test
        self.asked = 0
        self.planted: Counter[str] = Counter()
        self.accepted: list[str] = []
        self.nearest: dict[str, float] = {}  # by bound, the largest relative error it let pass
        self.inside = False

    def plant(self, kind: str, got: Tensor, want: Tensor, holds: Callable[[Tensor], bool]) -> None:
        """Ask an assertion that holds of ``got`` about everything that is wrong with it."""
        if self.inside or EXCEPT.keys() & {self.test, _caller().partition(":")[0]}:
            return
        self.asked += 1
        with self.one():
            for name, wrong in wrongs(got, want):
                self.planted[name] += 1
                if holds(wrong):
                    self.accepted.append(f"{_caller()} ({kind}): {name}")

    @contextmanager
    def one(self) -> Iterator[None]:
        """An assertion that is made of others is one."""
        before, self.inside = self.inside, True
        try:
            yield
        finally:
            self.inside = before

    def note(self, bound: float, error: float) -> None:
        if not self.inside and bound > 0:
            key = f"{bound:.3g}"
            self.nearest[key] = max(self.nearest.get(key, 0.0), error)


watch = Watch()


def _caller() -> str:
    """The line that asserts."""
    frame = sys._getframe(1)
    while frame.f_back and frame.f_code.co_filename == __file__:
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"


class Error(float):
    """A relative error that knows what it is of, so that its comparison with a bound can be asked again."""

    got: Tensor
    want: Tensor

    def _holds(self, bound: float, compare: Callable[[float, float], bool]) -> bool:
        if not compare(float(self), bound):
            return False
        watch.note(bound, float(self))
        watch.plant("error", self.got, self.want, lambda wrong: compare(_error(wrong, self.want), bound))
        return True

    def __lt__(self, bound: float) -> bool:
        return self._holds(bound, float.__lt__)

    def __le__(self, bound: float) -> bool:
        return self._holds(bound, float.__le__)

    __hash__ = float.__hash__


_error, _assert_close = oracle.error, oracle.assert_close


def error(got: Tensor, want: Tensor) -> Error:
    found = Error(_error(got, want))
    found.got, found.want = got, want
    return found


def assert_close(got: Tensor, want: Tensor, tolerance: float, *, floor: float = 0.0, what: str = "") -> None:
    with watch.one():
        _assert_close(got, want, tolerance, floor=floor, what=what)
    relative = _error(got, want)
    if relative <= tolerance:
        watch.note(tolerance, relative)
    watch.plant("assert_close", got, want, lambda wrong: _passes(_assert_close, wrong, want, tolerance, floor=floor))


def _passes(function: Callable[..., object], *args: Any, **kwargs: Any) -> bool:
    try:
        return function(*args, **kwargs) is not False
    except AssertionError:
        return False


def _watched_torch(function: Callable[..., Any], kind: str) -> Callable[..., Any]:
    def watched(got: Any, want: Any, *args: Any, **kwargs: Any) -> Any:
        with watch.one():
            result = function(got, want, *args, **kwargs)
        if isinstance(got, Tensor) and (result is None or bool(torch.as_tensor(result).all())):

            def holds(wrong: Tensor) -> bool:
                try:
                    again = function(wrong, want, *args, **kwargs)
                except AssertionError:
                    return False
                return again is None or bool(torch.as_tensor(again).all())

            watch.plant(kind, got, torch.as_tensor(want), holds)
        return result

    return watched


def _watched_approx(compare: Callable[[Any, Any], bool]) -> Callable[[Any, Any], bool]:
    def equal(self: Any, got: Any) -> bool:
        result = compare(self, got)
        if result and not watch.inside and isinstance(got, float):
            came, wanted = (torch.tensor(value, dtype=torch.float64) for value in (got, self.expected))
            watch.plant("approx", came, wanted, lambda wrong: bool(compare(self, float(wrong))))
        return result

    return equal


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--planted-json", metavar="FILE", help="what every test compared, and what it accepted")


def pytest_sessionstart() -> None:
    """Before the tests import what they call."""
    oracle.error, oracle.assert_close = error, assert_close  # type: ignore[assignment]
    for module, name in ((torch, "allclose"), (torch, "isclose"), (torch.testing, "assert_close")):
        setattr(module, name, _watched_torch(getattr(module, name), name))
    approx = type(pytest.approx(1.0))
    approx.__eq__ = _watched_approx(approx.__eq__)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    global watch
    watch = Watch(item.name.partition("[")[0])
    try:
        return (yield)
    finally:
        item.user_properties.append(
            (
                "planted",
                {
                    "asked": watch.asked,
                    "planted": dict(watch.planted),
                    "accepted": watch.accepted,
                    "nearest": watch.nearest,
                },
            )
        )


TESTS: dict[str, dict[str, Any]] = {}


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Set-up, call and tear-down of each test; with pytest-xdist the process that reports has those of all."""
    test = TESTS.setdefault(report.nodeid, {"outcome": "passed"})
    if report.outcome != "passed":
        test["outcome"] = report.outcome
    if report.skipped:
        test["reason"] = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    test.update(dict(report.user_properties).get("planted", {}))


def accepted(tests: dict[str, dict[str, Any]]) -> list[str]:
    return sorted({wrong for test in tests.values() for wrong in test.get("accepted", ())})


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workerinput"):  # a process of pytest-xdist
        return
    file = session.config.getoption("--planted-json")
    if file:
        Path(file).write_text(json.dumps(TESTS, indent=1), encoding="utf-8")
    if accepted(TESTS) and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: Any) -> None:
    count = sum(sum(test.get("planted", {}).values()) for test in TESTS.values())
    asked = sum(test.get("asked", 0) for test in TESTS.values())
    found = accepted(TESTS)
    terminalreporter.section("planted wrongs")
    terminalreporter.write_line(f"{asked:,} assertions refused {count - len(found):,} of {count:,} wrong results")
    for line in found:
        terminalreporter.write_line(f"ACCEPTED {line}")
