"""Ctrl-C as a request, so that a run ends between two steps and its weights are whole."""

import signal
import sys
import threading


class Stop(KeyboardInterrupt):
    """Ctrl-C, raised at a place where the weights are whole."""


class Interrupt:
    """A context manager: the first Ctrl-C sets `requested`, the second raises KeyboardInterrupt as usual.

    Outside the main thread, where Python allows no signal handlers, Ctrl-C stays as it is.
    """

    def __init__(self):
        self.requested = False
        self._previous = None

    def __enter__(self) -> "Interrupt":
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGINT, self._request)
        return self

    def __exit__(self, *error) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)

    def check(self) -> None:
        """Raises Stop if Ctrl-C was pressed: for places where stopping at once is harmless."""
        if self.requested:
            raise Stop

    def _request(self, signum, frame) -> None:
        self.requested = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
        print("\ninterrupted: stopping after this step (Ctrl-C again: at once)", file=sys.stderr, flush=True)
