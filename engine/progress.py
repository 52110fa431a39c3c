"""A bar on standard error while a batch of prompts runs: prompts done, tokens per second.

Drawn by engine/llm.py between steps, in the thread that runs them.
"""

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from core.clock import Clock, monotonic

_DRAW_INTERVAL_S = 0.1


class BatchProgress:
    """Counts what a batch has done and shows it, at most ten times a second."""

    def __init__(
        self, total: int, *, shown: bool, console: Console | None = None, clock: Clock = monotonic
    ) -> None:
        """Count towards `total` prompts.

        Args:
            total: prompts of the batch.
            shown: draw the bar.
            console: where to; standard error if None.
            clock: monotonic seconds.
        """
        self._clock = clock
        self._tokens = 0
        self._done = 0
        self._began = self._drawn_at = clock()
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[speed]}"),
            TimeRemainingColumn(),
            console=console or Console(stderr=True),
            auto_refresh=False,
            disable=not shown,
        )
        self._task = self._bar.add_task("prompts", total=total, speed="")

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._draw(self._clock())
        self._bar.stop()

    def advance(self, *, tokens: int, ended: bool) -> None:
        """A sequence got `tokens` more, and perhaps its end."""
        self._tokens += tokens
        self._done += ended
        now = self._clock()
        if now - self._drawn_at >= _DRAW_INTERVAL_S:
            self._draw(now)

    def _draw(self, now: float) -> None:
        self._drawn_at = now
        elapsed_s = now - self._began
        speed = f"{self._tokens / elapsed_s:,.0f} tokens/s" if elapsed_s > 0 else ""
        self._bar.update(self._task, completed=self._done, speed=speed, refresh=True)


def on_terminal() -> bool:
    """True if somebody looks at standard error."""
    return Console(stderr=True).is_terminal
