"""Without a terminal, progress is a line now and then with samples/s and the time left."""

import re

from dlrm import progress


def test_lines_count_from_where_the_run_was_resumed(capsys, monkeypatch):
    clock = iter([100.0, 104.0, 110.0, 112.0, 121.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    with progress.Progress(2_000, 500) as bar:  # begins at 100 s
        bar.show("step 3 loss 0.5")
        for _ in range(4):  # at 104, 110, 112 and 121 s
            bar.advance(250)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "1,000 of 2,000 samples, 50/s, 20 s left, step 3 loss 0.5",
        "1,500 of 2,000 samples, 48/s, 10 s left, step 3 loss 0.5",
    ]


def test_a_terminal_gets_a_bar_with_rate_and_note(capsys, monkeypatch):
    monkeypatch.setattr(progress.sys.stderr, "isatty", lambda: True, raising=False)
    with progress.Progress(2_000, 0) as bar:
        bar.show("loss 0.5")
        bar._bar.mininterval = 0
        bar.advance(1_000)
        bar.write("step 1  valid AUC 0.7")
    text = capsys.readouterr().err
    assert re.search(r"1.00k/2.00k \[.* samples/s, loss 0.5\]", text) and "step 1  valid AUC 0.7\n" in text
