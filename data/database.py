"""A scratch DuckDB database on disk, bounded in memory, with one progress bar over all steps of a preparation."""

import time
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import duckdb
import numpy as np
from tqdm import tqdm

POLL_SECONDS = 0.2
DELAY_SECONDS = 1.0  # a preparation that takes less shows no bar
BAR_FORMAT = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}, {remaining} left"


class Database:
    """DuckDB in a new folder, which is the caller's to delete: what exceeds memory_limit (e.g. "1GB") spills there.
    The shares of all steps sum to 1; they are guesses of the time that each takes."""

    def __init__(self, folder: Path, memory_limit: str):
        folder.mkdir()
        try:
            config = {"memory_limit": memory_limit, "temp_directory": str(folder / "spill")}
            self.con = duckdb.connect(str(folder / "stage.duckdb"), config=config)
        except duckdb.Error as error:
            raise ValueError(f"data.memory_limit={memory_limit!r}: {error}; write e.g. 1GB or 500MB") from None
        self.con.execute("SET enable_progress_bar = true; SET enable_progress_bar_print = false")  # only to be asked
        # disable=None: no bar without a terminal
        self.bar = tqdm(total=1.0, desc="data", delay=DELAY_SECONDS, disable=None, leave=False, bar_format=BAR_FORMAT)
        self.done, self.share, self.started = 0.0, 0.0, time.monotonic()

    def step(self, name: str, share: float) -> None:
        """Names the step that begins now, and its share of the whole; the ones before it are done."""
        self.done, self.share = self.done + self.share, share
        self.bar.set_description_str(f"data: {name}", refresh=False)
        self.progress(0.0)

    def progress(self, fraction: float) -> None:
        """Moves the bar within the current step."""
        self.bar.n = self.done + self.share * min(1.0, max(0.0, fraction))
        if time.monotonic() - self.started > DELAY_SECONDS:
            self.bar.refresh()

    def run(self, sql: str) -> None:
        """Executes SQL while the bar follows how far DuckDB says it is."""
        self._execute(sql, follow=True)

    def rows(self, sql: str) -> list[tuple]:
        """The rows of a small result."""
        return self._execute(sql).fetchall()

    def value(self, sql: str) -> object:
        """The one value of a result of one row and one column."""
        return self._execute(sql).fetchone()[0]

    def columns(self, sql: str) -> dict[str, np.ndarray]:
        """The columns of a result; no value may be NULL."""
        return self._execute(sql).fetchnumpy()

    def _execute(self, sql: str, *, follow: bool = False) -> duckdb.DuckDBPyConnection:
        """Executes SQL in a thread: Ctrl-C, which only the main thread gets, then stops it at once."""
        with ThreadPoolExecutor(1) as pool:
            query = pool.submit(self.con.execute, sql)
            try:
                while wait([query], POLL_SECONDS).not_done:
                    if follow:
                        self.progress(self.con.query_progress() / 100)
            except KeyboardInterrupt:
                while wait([query], POLL_SECONDS).not_done:
                    self.con.interrupt()  # again and again: one that comes before the query begins is lost
                raise
            return query.result()

    def close(self) -> None:
        self.bar.close()
        self.con.close()


def quoted(name: str) -> str:
    """The name as an SQL identifier."""
    return '"' + name.replace('"', '""') + '"'


def column_sql(name: str) -> str:
    """A column of a loaded table as an SQL identifier: prefixed, lest a column named rowid hide DuckDB's own, which is
    the row's place, or another what a query makes."""
    return quoted(f"column {name}")


def literal(text: object) -> str:
    """The text as an SQL string."""
    return "'" + str(text).replace("'", "''") + "'"
