"""A scratch DuckDB database on disk, bounded in memory, with one progress bar over all steps of a preparation."""

import threading
from pathlib import Path

import duckdb
import numpy as np
from tqdm import tqdm

POLL_SECONDS = 0.2
BAR_FORMAT = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}, {remaining} left"


class Database:
    """DuckDB in a new folder, which is the caller's to delete: what exceeds memory_limit (e.g. "1GB") spills there.
    num_steps: how many times step() will be called; the bar counts them in hundredths."""

    def __init__(self, folder: Path, num_steps: int, *, memory_limit: str):
        folder.mkdir()
        try:
            config = {"memory_limit": memory_limit, "temp_directory": str(folder / "spill")}
            self.con = duckdb.connect(str(folder / "stage.duckdb"), config=config)
        except duckdb.Error as error:
            raise ValueError(f"data.memory_limit={memory_limit!r}: {error}; write e.g. 1GB or 500MB") from None
        self.con.execute("SET enable_progress_bar = true; SET enable_progress_bar_print = false")  # only to be asked
        # delay: a preparation of less than a second shows nothing; disable=None: nor does one without a terminal
        self.bar = tqdm(total=100 * num_steps, desc="data", delay=1, disable=None, leave=False, bar_format=BAR_FORMAT)
        self.steps_done = 0

    def step(self, name: str) -> None:
        """Names the step that begins now; the ones before it are done."""
        self.bar.n = 100 * self.steps_done
        self.bar.set_description_str(f"data: {name}")
        self.steps_done += 1

    def progress(self, fraction: float) -> None:
        """Moves the bar within the current step."""
        self.bar.n = 100 * (self.steps_done - 1) + min(99.0, max(0.0, 100 * fraction))
        self.bar.refresh()

    def run(self, sql: str) -> None:
        """Executes SQL while the bar follows how far DuckDB says it is."""
        done = threading.Event()

        def follow() -> None:
            while not done.wait(POLL_SECONDS):
                self.progress(self.con.query_progress() / 100)

        follower = threading.Thread(target=follow, daemon=True)
        follower.start()
        try:
            self.con.execute(sql)
        finally:
            done.set()
            follower.join()

    def rows(self, sql: str) -> list[tuple]:
        """The rows of a small result."""
        return self.con.execute(sql).fetchall()

    def value(self, sql: str) -> object:
        """The one value of a result of one row and one column."""
        return self.con.execute(sql).fetchone()[0]

    def columns(self, sql: str) -> dict[str, np.ndarray]:
        """The columns of a result; no value may be NULL."""
        return self.con.execute(sql).fetchnumpy()

    def close(self) -> None:
        self.bar.close()
        self.con.close()


def quoted(name: str) -> str:
    """The name as an SQL identifier."""
    return '"' + name.replace('"', '""') + '"'


def literal(text: object) -> str:
    """The text as an SQL string."""
    return "'" + str(text).replace("'", "''") + "'"
