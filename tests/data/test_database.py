"""What the scratch database adds to DuckDB."""

import signal

import pytest

from data.database import Database

ENDLESS = "SELECT sum(sin(range)) FROM range(1000000000000)"


@pytest.mark.parametrize("method", ["run", "rows", "value", "columns"])
def test_an_interrupt_is_a_keyboard_interrupt(tmp_path, method):
    db = Database(tmp_path / "scratch", "500MB")
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)  # an alarm that does as Ctrl-C does
    try:
        with pytest.raises(KeyboardInterrupt):
            signal.setitimer(signal.ITIMER_REAL, 0.3)
            getattr(db, method)(ENDLESS)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        db.close()


def test_another_error_keeps_its_kind(tmp_path):
    db = Database(tmp_path / "scratch", "500MB")
    with pytest.raises(Exception, match="no_such_table"):
        db.run("SELECT * FROM no_such_table")
    db.close()
