"""Where a run is: a bar with samples/s and time left on a terminal, else a line every ten seconds."""

import sys
import time

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 10


class Progress:
    """Counts samples up to `total`, from `done`. A context manager; `write` prints a line without harming the bar."""

    def __init__(self, total: int, done: int):
        self.total, self.done, self.note = total, done, ""
        self._is_terminal = sys.stderr.isatty()
        self._bar = tqdm(
            total=total, initial=done, unit=" samples", unit_scale=True, disable=not self._is_terminal, leave=False
        )
        self._first_done, self._began = done, time.monotonic()
        self._last_line = self._began

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *error) -> None:
        self._bar.close()

    def advance(self, num_samples: int) -> None:
        self.done += num_samples
        if self._is_terminal:
            self._bar.update(num_samples)
        elif (now := time.monotonic()) - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = now
            rate = (self.done - self._first_done) / (now - self._began)
            left = max(0, self.total - self.done) / rate
            self.write(f"{self.done:,} of {self.total:,} samples, {rate:,.0f}/s, {left:,.0f} s left, {self.note}")

    def show(self, note: str) -> None:
        """Sets the words at the end of the bar or line, such as the loss."""
        self.note = note
        self._bar.set_postfix_str(note, refresh=False)

    def write(self, line: str) -> None:
        tqdm.write(line, file=sys.stderr)
