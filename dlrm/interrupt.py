"""Ctrl-C, and a scheduler's SIGTERM, as a request: a run ends between two steps and its weights are whole."""

import signal
import sys
import threading

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stop(KeyboardInterrupt):
    """The request, raised at a place where the weights are whole."""


class Interrupt:
    """A context manager: the first SIGINT or SIGTERM sets `requested`, to its number; the second ends at once.

    Outside the main thread, where Python allows no signal handlers, signals stay as they are.
    """

    def __init__(self):
        self.requested: int | None = None
        self._previous = {}

    def __enter__(self) -> "Interrupt":
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._request) for number in SIGNALS}
        return self

    def __exit__(self, *error) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def check(self) -> None:
        """Raises Stop if a signal came: for places where stopping at once is harmless."""
        if self.requested:
            raise Stop

    def _request(self, signum, frame) -> None:
        self.requested = signum
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        words = "interrupted" if signum == signal.SIGINT else "asked to end"
        print(f"\n{words}: stopping after this step (again: at once)", file=sys.stderr, flush=True)
