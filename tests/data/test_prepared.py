"""The prepared folder is complete or absent, and its batches are the rows that were written."""

import json
import os
import subprocess
import sys
import time
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tables import bags_of

from data import prepared
from data.prepared import Prepared, Writer, fingerprint, in_batches, is_complete, prepare_once, shuffled


def build(folder, rows=100, seed=0):
    """Two single-valued features with 5 ids (6 and 7 unseen) and one multi-valued feature with 3 (4 unseen)."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, 4, rows)
    writer = Writer(folder, 1)
    ids, bags = rng.integers(0, 8, (rows, 2)), rng.integers(0, 5, lengths.sum())
    half = rows // 2
    cut = lengths[:half].sum()
    dense, labels = rng.normal(size=(rows, 3)), rng.integers(0, 2, rows)
    writer.append(dense[:half], ids[:half], labels[:half], [(lengths[:half], bags[:cut])])
    writer.append(dense[half:], ids[half:], labels[half:], [(lengths[half:], bags[cut:])])
    counts = {"train": rows * 6 // 10, "valid": rows // 10}
    counts["test"] = rows - sum(counts.values())
    writer.finish(
        {
            "cardinalities": {"a": 5, "b": 5, "m": 3},
            "num_samples": counts,
            "last": "test",
            "num_dense": 3,
            "num_multi": 1,
        },
    )
    split = np.split(bags, np.cumsum(lengths)[:-1])
    return [(dense[i].astype(np.float32), [[ids[i, 0]], [ids[i, 1]], split[i]], labels[i]) for i in range(rows)]


def read(folder, split, **options):
    defaults = {"epoch": 0, "start": 0, "seed": 0, "block": 1 << 20, "keep_unseen": {"a", "b", "m"}, "batch_size": 8}
    options, data = defaults | options, Prepared(folder)
    limits = data.limits(options.pop("keep_unseen"))
    return [data.take(split, index, limits) for index in data.picks(split, **options)]


def assert_same(batches, rows):
    got = [s for b in batches for s in zip(b.dense.numpy(), bags_of(b), b.labels.tolist(), strict=True)]
    assert len(got) == len(rows)
    for (dense, bags, label), (want_dense, want_bags, want_label) in zip(got, rows, strict=True):
        np.testing.assert_array_equal(dense, want_dense)
        assert bags == [list(map(int, bag)) for bag in want_bags] and label == want_label


def test_valid_and_test_are_the_rows_written_in_order(tmp_path):
    rows = build(tmp_path)
    assert_same(read(tmp_path, "valid"), rows[60:70])
    assert_same(read(tmp_path, "test"), rows[70:])
    assert_same(read(tmp_path, "test", start=13, batch_size=5), rows[83:])
    assert read(tmp_path, "test", start=30) == []


def test_an_epoch_has_every_training_row_once(tmp_path):
    rows = build(tmp_path)
    batches = read(tmp_path, "train", batch_size=7)
    assert [len(b.labels) for b in batches] == [7] * 8 + [4]
    got = np.concatenate([b.dense.numpy()[:, 0] for b in batches])
    assert sorted(got) == sorted(float(r[0][0]) for r in rows[:60])


def test_unseen_ids_become_zero_unless_kept(tmp_path):
    rows = build(tmp_path)
    clipped = [(d, [[i if i < 5 else 0 for i in a], b, [i if i < 3 else 0 for i in m]], y) for d, (a, b, m), y in rows]
    assert_same(read(tmp_path, "test", keep_unseen={"b"}), clipped[70:])
    assert_same(read(tmp_path, "test"), rows[70:])


@given(count=st.integers(0, 3000), block=st.integers(1, 4000), start=st.integers(0, 3000), chunk=st.integers(1, 50))
@settings(deadline=None)
def test_shuffled_is_a_permutation_and_start_skips(count, block, start, chunk):
    before, prepared.CHUNK_ROWS = prepared.CHUNK_ROWS, chunk
    try:
        order = np.concatenate(list(shuffled(count, seed=3, epoch=1, block=block, start=0)))
        rest = np.concatenate(list(shuffled(count, seed=3, epoch=1, block=block, start=start)))
    finally:
        prepared.CHUNK_ROWS = before
    assert sorted(order) == list(range(count))
    np.testing.assert_array_equal(rest, order[start:])


def test_order_is_a_function_of_seed_and_epoch():
    def order(seed, epoch):
        return np.concatenate(list(shuffled(50_000, seed=seed, epoch=epoch, block=8192, start=0))).tolist()

    assert order(0, 0) == order(0, 0)
    assert len({tuple(order(s, e)) for s in (0, 1) for e in (0, 1)}) == 4


@given(sizes=st.lists(st.integers(0, 30)), batch_size=st.integers(1, 20))
def test_in_batches_keeps_all_in_order(sizes, batch_size):
    ends = np.cumsum([0, *sizes])
    pieces = [np.arange(a, b) for a, b in zip(ends, ends[1:], strict=False)]
    batches = list(in_batches(iter(pieces), batch_size))
    assert [i for b in batches for i in b] == list(range(ends[-1]))
    assert all(len(b) == batch_size for b in batches[:-1])


ROOT = Path(prepared.__file__).parents[1]
KILLED = """
import os, sys
from pathlib import Path
from data.prepared import Writer, prepare_once
def build(folder):
    writer = Writer(folder, 0)
    (folder / "half").write_text("x")
    os._exit(9)
prepare_once(Path(sys.argv[1]), build)
"""


def test_a_killed_preparation_leaves_nothing_that_is_taken_for_finished(tmp_path):
    folder = tmp_path / "cache" / "x"
    code = subprocess.run([sys.executable, "-c", KILLED, os.fspath(folder)], cwd=ROOT).returncode
    assert code == 9 and not folder.exists()
    prepare_once(folder, build)
    assert is_complete(folder) and not (folder / "half").exists()
    assert {p.name for p in folder.parent.iterdir()} == {"x", ".x.lock"}


def test_a_failed_preparation_leaves_no_litter(tmp_path):
    def fail(folder):
        (folder / "half").write_text("x")
        raise ValueError("bad row")

    with pytest.raises(ValueError, match="bad row"):
        prepare_once(tmp_path / "x", fail)
    assert {p.name for p in tmp_path.iterdir()} == {".x.lock"}


def slow_build(folder):
    with open(folder.parent / "builds", "a") as file:
        file.write("x")
    build(folder, rows=20_000)


def prepare_slowly(folder):
    prepare_once(folder, slow_build)
    return is_complete(folder)


def test_two_processes_prepare_the_same_thing_once(tmp_path):
    with get_context("spawn").Pool(2) as pool:
        assert pool.map(prepare_slowly, [tmp_path / "x"] * 2) == [True, True]
    assert (tmp_path / "builds").read_text() == "x"


@pytest.mark.parametrize("damage", ["truncate", "remove", "manifest"])
def test_a_damaged_folder_is_made_again(tmp_path, damage, capsys):
    folder = tmp_path / "x"
    prepare_once(folder, build)
    name = {"truncate": "ids.bin", "remove": "labels.bin", "manifest": "manifest.json"}[damage]
    if damage == "remove":
        (folder / name).unlink()
    else:
        (folder / name).write_bytes((folder / name).read_bytes()[:-1])
    assert not is_complete(folder)
    prepare_once(folder, build)
    assert is_complete(folder) and "damaged" in capsys.readouterr().out


def test_every_flipped_bit_is_found_also_where_the_files_were_checked_before(tmp_path):
    folder, rng, num_flips = tmp_path / "x", np.random.default_rng(0), 0
    prepare_once(folder, build)
    assert is_complete(folder) and (folder / "checked.json").exists()
    for file in sorted(folder.iterdir()):
        whole = file.read_bytes()
        for place in rng.integers(8 * len(whole), size=20) if file.name != "checked.json" else ():
            damaged = bytearray(whole)
            damaged[place // 8] ^= 1 << place % 8
            file.write_bytes(damaged)
            assert not is_complete(folder), (file.name, place)
            num_flips += 1
        file.write_bytes(whole)
        assert is_complete(folder)
    assert num_flips == 20 * 7  # two arrays of one, two of bags, labels, the manifest and its hash


def test_files_that_look_as_they_did_are_not_read_again(tmp_path, monkeypatch):
    folder = tmp_path / "x"
    prepare_once(folder, build)
    assert is_complete(folder)
    monkeypatch.setattr("data.prepared.hashlib.file_digest", lambda *given: pytest.fail("read again"))
    assert is_complete(folder)


def test_manifest_states_rows_and_sizes(tmp_path):
    build(tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["rows"] == 100 and manifest["sizes"]["dense.bin"] == 100 * 3 * 4
    assert manifest["sizes"]["ids.bin"] == 100 * 2 * 4 and manifest["sizes"]["indptr.0.bin"] == 101 * 8


def test_fingerprint_of_a_small_file_is_its_content_and_the_options(tmp_path):
    path, body = tmp_path / "f", b"x" * 300_000

    def digest(content, options=(), mtime=1):
        path.write_bytes(content)
        os.utime(path, ns=(mtime, mtime))
        return fingerprint([path], options)

    middle = body[:150_000] + b"y" + body[150_001:]
    digests = [digest(body), digest(b"y" + body[1:]), digest(middle), digest(body + b"x"), digest(body, options=(1,))]
    assert len(set(digests)) == 5 and digest(body, mtime=2) == digests[0]


def test_fingerprint_of_a_large_file_sees_a_change_whose_size_and_time_are_restored(tmp_path, monkeypatch):
    monkeypatch.setattr(prepared, "WHOLE_BYTES", 200_000)
    path = tmp_path / "f"
    path.write_bytes(b"x" * 300_000)
    before, times = fingerprint([path], ()), path.stat()
    assert fingerprint([path], ()) == before
    time.sleep(0.02)  # file systems note the time in ticks of up to 10 ms
    with open(path, "r+b") as file:
        file.seek(150_000)
        file.write(b"y")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert path.stat().st_mtime_ns == times.st_mtime_ns and fingerprint([path], ()) != before


def test_an_epochs_order_is_numpys_permutation_of_all_rows_whatever_their_type():
    (order,) = shuffled(1000, seed=3, epoch=2, block=1000, start=10)
    assert np.array_equal(order, np.random.default_rng([3, 2, 0]).permutation(1000)[10:])
