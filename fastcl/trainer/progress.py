"""How far a run is: a bar where somebody watches, a line every few seconds where nobody does."""

from __future__ import annotations

import sys
import time
from types import TracebackType

import torch

from .collapse import COLLAPSED
from .errors import need

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

_EVERY = 5.0  # seconds between lines


class Progress:
    """Use as a context manager; call :meth:`update` after every step."""

    def __init__(self, steps: int, start: int, device: torch.device) -> None:
        self.steps, self.device = steps, device
        self.bar = None
        if sys.stderr.isatty():
            self.bar = need("tqdm", "the progress bar").tqdm(total=steps, initial=start, unit="step", file=sys.stderr)
        self.start, self.began = start, time.monotonic()
        self.last_line = self.began

    def update(self, step: int, loss: float, images_per_second: float, loss_share: float) -> None:
        """``step`` steps are done."""
        shown = f"loss {loss:.3f}, {images_per_second:.0f} images/s, loss share {loss_share:.0%}{_memory(self.device)}"
        if self.bar is not None:
            self.bar.set_postfix_str(shown, refresh=False)
            self.bar.update(step - self.bar.n)
            return
        now = time.monotonic()
        if now - self.last_line >= _EVERY or step == self.steps:
            self.last_line = now
            left = (now - self.began) / (step - self.start) * (self.steps - step)
            print(f"step {step}/{self.steps}: {shown}, {left:.0f} s left", file=sys.stderr, flush=True)

    def probed(self, step: int, effective_rank: float) -> None:
        """The embeddings have this effective rank; a line of warning where they have collapsed."""
        if effective_rank < COLLAPSED:
            self.say(
                f"warning: step {step}: the effective rank of the embeddings is {effective_rank:.2f}, below "
                f"{COLLAPSED:.0f}: they have collapsed. Lower --learning-rate, or check the views of an image."
            )

    def say(self, line: str) -> None:
        """A line on stderr, above the bar where there is one."""
        (self.bar.write if self.bar is not None else print)(line, file=sys.stderr)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.close()


def _memory(device: torch.device) -> str:
    """The most that was in use so far: by torch on a GPU, elsewhere by the process, where the system tells."""
    if device.type == "cuda":
        used = torch.cuda.max_memory_allocated(device)
    elif resource is None:
        return ""
    else:  # kibibytes, but bytes on a Mac
        used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return f", memory {used / 2**30:.2f} GiB"
