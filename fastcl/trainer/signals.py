"""SIGTERM and SIGINT as a request, which the training loop grants at the end of a step instead of dying inside it."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

SIGNALS = (signal.SIGTERM, signal.SIGINT)  # preemption and Ctrl-C


class Request:
    """Attributes: received, the signal that came first; 0 where none has."""

    def __init__(self) -> None:
        self.received = 0


@contextmanager
def requests(*, insist: bool) -> Iterator[Request]:
    """Inside, :data:`SIGNALS` are noted and do nothing else; what handled them before does so again afterwards.

    Only the main thread may handle signals: in another one nothing changes. A signal that is ignored, or handled by
    something that is not Python, stays so. Who leaves without granting a request gets the signal then.

    Args:
        insist: whether Ctrl-C after a first signal raises KeyboardInterrupt at once. Of several ranks the launcher may
            send a second one for a single keystroke, and one that left alone would keep the others waiting.
    """
    request = Request()

    def note(number: int, frame: FrameType | None) -> None:
        if insist and request.received and number == signal.SIGINT:
            request.received = 0  # granted
            raise KeyboardInterrupt
        request.received = request.received or number

    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                before[number] = signal.signal(number, note)
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if request.received:  # too late for the last step
        signal.raise_signal(request.received)


def leave(number: int) -> NoReturn:
    """End as the signal asks: KeyboardInterrupt for SIGINT, else SystemExit with the code that shells give it."""
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(128 + number)
