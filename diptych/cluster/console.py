"""What the launcher shows: a spinner and a summary on a terminal, plain lines elsewhere."""

import sys
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.status import Status

from core.clock import Clock, monotonic
from diptych.cluster.logfiles import LogLine
from diptych.cluster.plan import ClusterPlan


class Screen:
    """The launcher's side of standard output."""

    def __init__(self, console: Console, *, console_level: int, clock: Clock = monotonic) -> None:
        """`console_level`: least severe log lines of children to show, as in `logging`."""
        self._console = console
        self._level = console_level
        self._clock = clock
        self._began = clock()
        self._status: Status | None = None

    def step(self, text: str) -> None:
        """What is going on now; stays until the next step or `end_steps`."""
        if not self._console.is_terminal:
            self.line(text)
        elif self._status is None:
            self._status = self._console.status(escape(text))
            self._status.start()
        else:
            self._status.update(escape(text))

    def done(self, text: str) -> None:
        """A step that is behind us."""
        self.line(f"{text} ({self._clock() - self._began:.1f} s)")

    def end_steps(self) -> None:
        """Take the spinner away."""
        if self._status is not None:
            self._status.stop()
            self._status = None

    def line(self, text: str) -> None:
        """One line, as it is."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def child_line(self, name: str, line: LogLine) -> None:
        """A line of a child: shown if grave enough, else at most a hint of progress."""
        if line.level >= self._level:
            self.line(f"[{name}] {line.text}")
        elif line.stage:
            self.step(f"  {name}: {line.stage}")
        elif self._status is not None and line.level:
            self.step(f"starting: {name}: {line.text.split(maxsplit=2)[-1]}")

    def ready(self, plan: ClusterPlan, log_folder: str) -> None:
        """The summary that ends the start."""
        self.end_steps()
        took = self._clock() - self._began
        body = (
            f'{{"model": "{plan.model_name}", "stream": true, "temperature": 0, '
            '"messages": [{"role": "user", "content": "What is the capital of France?"}]}'
        )
        for child in plan.children:
            self.line(f"  {child.name:<10} metrics {child.metrics_url}")
        if plan.console:
            self.line(f"  {'console':<10} {plan.base_url}/console")
        self.line(f"  logs in {log_folder}")
        self.line("")
        self.line(f"Ready after {took:.1f} s: {plan.model_name} at {plan.base_url}/v1")
        self.line("")
        self.line(
            f"  curl -N {plan.base_url}/v1/chat/completions "
            f"-H 'Content-Type: application/json' -d '{body}'"
        )
        self.line(f"  {_this_command()} chat --url {plan.base_url}")
        self.line("")
        self.line("Ctrl-C ends it.")


def _this_command() -> str:
    """How the user called `diptych`, to be copied from here."""
    return sys.argv[0] if Path(sys.argv[0]).name == "diptych" else "python -m diptych"
