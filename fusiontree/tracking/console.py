"""The console of a run: a live line with a progress bar in a terminal, plain lines in a log file."""

from __future__ import annotations

import logging
import math
import sys
import time
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

log = logging.getLogger(__name__)

NOTICE = 25
"""Log level between INFO and WARNING: messages that ``--quiet`` shows."""
_REDRAW_S = 0.1
_PACE_STEPS = 5
"""Steps after which the time to the end is announced."""


def clock(seconds: float) -> str:
    """Return a duration as ``1d 02:03:04`` or ``02:03:04``."""
    days, rest = divmod(int(seconds), 86400)
    text = f"{rest // 3600:02d}:{rest % 3600 // 60:02d}:{rest % 60:02d}"
    return f"{days}d {text}" if days else text


def short(number: float) -> str:
    """Return a count with a metric suffix: 12.3k, 4.56M."""
    for limit, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= limit:
            return f"{number / limit:.3g}{suffix}"
    return f"{number:.3g}"


def report_bytes(say: Callable[[str], None], label: str, every_s: float = 10.0) -> Callable[[int, int], None]:
    """Return a function of bytes done and bytes in total that reports the progress of ``label`` every ``every_s``."""
    reported = time.monotonic()

    def report(done: int, total: int) -> None:
        nonlocal reported
        if time.monotonic() - reported >= every_s:
            reported = time.monotonic()
            say(f"{label}: {done / 1e9:.1f} of {total / 1e9:.1f} GB")

    return report


class RunningMean:
    """Exponential mean; the weight of a value falls to 1/e after ``span`` further values. Unbiased from the first."""

    def __init__(self, span: float = 20.0) -> None:
        """Start without values."""
        self._decay, self._sum, self._weight = 1 - 1 / max(span, 1.0), 0.0, 0.0

    def add(self, value: float) -> float:
        """Add a value, unless it is not finite; return the mean, or NaN before the first finite value."""
        if not math.isfinite(value):
            return self._sum / self._weight if self._weight else math.nan
        self._sum = self._decay * self._sum + value
        self._weight = self._decay * self._weight + 1
        return self._sum / self._weight


class Console:
    """Shows a run on the main rank. Other ranks construct it with ``enabled=False``; all calls do nothing there.

    Call :meth:`start` at the first step and after a return to a checkpoint, then :meth:`after_step` per step with
    :meth:`logged` and :meth:`validated` where these happen, :meth:`say` for messages, and :meth:`close` at the end.
    """

    def __init__(
        self,
        max_steps: int,
        *,
        enabled: bool = True,
        live: bool | None = None,
        backends: Callable[[], str] | None = None,
        window: int = 50,
    ) -> None:
        """Show nothing yet.

        Args:
            max_steps: steps of the whole run.
            enabled: whether this rank writes to the console.
            live: show a progress bar; None: if standard output is a terminal and messages of level INFO are shown.
            backends: returns the chosen backends of the operations, complete after the first step.
            window: steps from which the time left is estimated, so that a pause or a slow start does not distort it.
        """
        self.max_steps, self.enabled, self._backends = max_steps, enabled, backends
        self._live = enabled and (sys.stdout.isatty() and log.isEnabledFor(logging.INFO) if live is None else live)
        self._window = window
        self._marks: deque[tuple[int, float]] = deque(maxlen=window)
        self._loss = RunningMean()
        self._rates = ""
        self._announced = False
        self._bar: tqdm | None = None
        self._drawn = 0.0
        self._redirected = ExitStack()

    def start(self, step: int) -> None:
        """Begin, or continue after a return to a checkpoint, with the step after ``step``."""
        self._marks.clear()
        self._marks.append((step, time.monotonic()))
        if self._live and self._bar is None:
            self._redirected.enter_context(logging_redirect_tqdm())
            self._bar = tqdm(total=self.max_steps, file=sys.stdout, dynamic_ncols=True, bar_format="starting")
        if self._bar is not None:
            self._bar.n = step

    def after_step(self, step: int, loss: float | None, tokens: int, epochs: list[float]) -> None:
        """Note the end of a step.

        Args:
            step: its number.
            loss: mean cross-entropy in nats per token; None if the step was skipped.
            tokens: tokens trained on so far.
            epochs: passes over each token source so far.
        """
        if not self.enabled:
            return
        self._marks.append((step, time.monotonic()))
        smoothed = self._loss.add(loss) if loss is not None else None
        if self._backends is not None:
            self.say(f"backends   {self._backends()}")
            self._backends = None
        eta = self.eta_s()
        if not self._announced and len(self._marks) > _PACE_STEPS and eta is not None and step < self.max_steps:
            self._announced = True
            self.say(f"to the end {self.max_steps - step:,} steps in about {clock(eta)}")
        if self._bar is not None:
            self._bar.n = step
            due = time.monotonic() - self._drawn >= _REDRAW_S or step == self.max_steps
            if smoothed is not None and due:
                self._draw(step, smoothed, tokens, epochs, eta)

    def _draw(self, step: int, loss: float, tokens: int, epochs: list[float], eta: float | None) -> None:
        assert self._bar is not None
        self._drawn = time.monotonic()
        passes = f"{epochs[0]:.2f}" if len(epochs) == 1 else "/".join(f"{epoch:.2f}" for epoch in epochs)
        left = clock(eta) if eta is not None else "--:--:--"
        # A narrow terminal cuts the end of the line.
        text = f"step {step}/{self.max_steps}  loss {loss:.4f}  eta {left}{self._rates}  {short(tokens)} tokens"
        self._bar.bar_format = f"{{percentage:3.0f}}% {{bar:12}} {text}  {passes} epochs"
        self._bar.refresh()

    def logged(self, values: dict[str, Any]) -> None:
        """Show the metrics of a logged step: a line of its own where there is no progress bar."""
        if not self.enabled:
            return
        if self._bar is None:
            log.info(self.line(values))
            return
        self._rates = f"  {short(values['tokens_per_s'])} tok/s"
        if values.get("mfu") is not None:
            self._rates += f"  mfu {values['mfu']:.1%}"
        self._rates += f"  {values['peak_memory_gib']:.1f} GiB"

    def validated(self, step: int, loss: float, tokens: int, name: str = "") -> None:
        """Show a validation: mean ``loss`` in nats per token over ``tokens`` tokens of the dataset ``name``."""
        text = f"step {step}/{self.max_steps}  validation loss {loss:.4f} on {tokens} tokens{name and f' of {name}'}"
        self.say(f"\033[1;36m{text}\033[0m" if self._bar is not None else text, NOTICE)

    def evaluated(self, step: int, measures: dict[str, dict[str, float]], seconds: float, share: float) -> None:
        """Show an evaluation: each task's main measure, its seconds, and their share of the time of the steps."""
        mains = [next(iter(found.items())) for found in measures.values()]
        text = ", ".join(f"{task} {name} {value:.4g}" for task, (name, value) in zip(measures, mains, strict=True))
        text = f"step {step}/{self.max_steps}  evaluation {text}  ({seconds:.1f} s, {share:.2%} of the step time)"
        self.say(f"\033[1;36m{text}\033[0m" if self._bar is not None else text, NOTICE)

    def say(self, message: str, level: int = logging.INFO) -> None:
        """Write a message; with ``--quiet`` only messages of level NOTICE and above are shown."""
        if self.enabled:
            log.log(level, message)

    def close(self) -> None:
        """Leave the last state of the progress bar on the screen."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        self._redirected.close()

    def eta_s(self) -> float | None:
        """Seconds left by the pace of the last steps, or None before there is a pace."""
        if len(self._marks) < 2:
            return None
        (first, begin), (last, end) = self._marks[0], self._marks[-1]
        return (self.max_steps - last) * (end - begin) / max(1, last - first)

    def line(self, values: dict[str, Any]) -> str:
        """Return the line of a logged step."""
        parts = [
            f"step {values['step']}/{self.max_steps}",
            f"loss {values['loss']:.4f}",
            f"grad {values['grad_norm']:.3g}",
            f"lr {values['lr']:.2e}",
            f"{short(values['tokens_per_s'])} tok/s",
        ]
        if values.get("mfu") is not None:
            parts.append(f"mfu {values['mfu']:.1%}")
        eta = self.eta_s()
        parts.append(f"eta {clock(eta)}" if eta is not None else "eta --:--:--")
        return "  ".join(parts)
