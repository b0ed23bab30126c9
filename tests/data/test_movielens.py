"""The official folders, in their two formats, give the same samples; the real one has the counts that it states."""

import csv
import io
import os
from pathlib import Path

import pytest
from tables import samples_of

from data.movielens import MovieLens

OPTIONS = {
    "split": {"train": 0.5, "valid": 0, "test": 0.5},
    "last": "test",
    "vocabulary": "train",
    "min_count": 1,
    "id_order": "appearance",
    "max_rows": None,
    "on_error": "stop",
    "memory_limit": "500MB",
    "shuffle": True,
    "shuffle_block": 1 << 20,
    "shuffle_seed": 0,
}
RATINGS = [(1, 10, 4, 100), (2, 20, 3.5, 50), (1, 20, 5, 200), (3, 30, 0.5, 300), (2, 10, 4.5, 60), (3, 10, 3, 400)]
MOVIES = [
    (10, "Toy Story (1995)", "Animation|Comedy"),
    (20, 'Cité, "La" (The) (1995) ', "Drama"),
    (30, "Fawlty Towers (1975-1979)", "(no genres listed)"),
]
USERS = [(1, "F", 18, 4, "02138"), (2, "M", 56, 0, "9"), (3, "M", 18, 4, "9")]


@pytest.fixture
def movielens(tmp_path):
    def make(folder=None, **options):
        dataset = MovieLens(os.fspath(folder or tmp_path), os.fspath(tmp_path / "cache"), **(OPTIONS | options))
        dataset.prepare(set())
        return dataset

    return make


def write_csv(folder):
    ratings = "".join(f"{u},{m},{r},{t}\n" for u, m, r, t in RATINGS)
    movies = io.StringIO()
    csv.writer(movies, lineterminator="\n").writerows([("movieId", "title", "genres"), *MOVIES])
    (folder / "ratings.csv").write_text("userId,movieId,rating,timestamp\n" + ratings)
    (folder / "movies.csv").write_text(movies.getvalue())


def with_colons(rows):
    return "".join("::".join(map(str, row)) + "\n" for row in rows)


def write_dat(folder):
    (folder / "ratings.dat").write_text(with_colons(RATINGS))
    movies = with_colons(MOVIES)
    (folder / "movies.dat").write_bytes(movies.encode("latin-1"))
    (folder / "users.dat").write_text(with_colons(USERS))


WANT_TEST = [  # trained on (2, 20) (2, 10) (1, 10): user 2 1; movie 20 10; year 1995; genres Drama Animation Comedy
    ([], [[2], [1], [1], [1]], 1.0),
    ([], [[0], [0], [0], [0]], 0.0),
    ([], [[0], [2], [1], [2, 3]], 0.0),
]


def test_csv_folder(movielens, tmp_path):
    write_csv(tmp_path)
    dataset = movielens()
    assert dataset.feature_names == ["user", "movie", "year", "genres"] and dataset.dense_names == []
    assert dataset.cardinalities == {"user": 3, "movie": 3, "year": 2, "genres": 4}
    assert samples_of(dataset, "test") == WANT_TEST
    assert "movielens" in dataset.describe() and dataset.best_possible_auc("test") is None


def test_dat_folder_has_the_users_columns_and_latin_1(movielens, tmp_path):
    write_dat(tmp_path)
    dataset = movielens()
    assert dataset.feature_names == ["user", "movie", "year", "gender", "age", "occupation", "zip", "genres"]
    got = samples_of(dataset, "test")
    assert [(d, bags[:3] + bags[7:], y) for d, bags, y in got] == WANT_TEST
    assert [bags[3:7] for _, bags, _ in got] == [[[2], [2], [2], [2]], [[1], [2], [2], [1]], [[1], [2], [2], [1]]]


def test_a_bad_rating_is_named(movielens, tmp_path):
    write_csv(tmp_path)
    with open(tmp_path / "ratings.csv", "a") as file:
        file.write("1,10,good,5\n")
    with pytest.raises(ValueError, match=r"ratings\.csv:8:rating: cast"):
        movielens()
    assert movielens(on_error="skip").num_rejected == 1


def test_another_folder_is_refused_with_what_it_lacks(movielens, tmp_path):
    with pytest.raises(ValueError, match="must hold ratings.csv .* it holds nothing"):
        movielens()
    with pytest.raises(ValueError, match="no such folder; did you mean 'ml-1m'"):
        (tmp_path / "ml-1m").mkdir()
        movielens(tmp_path / "ml-lm")
    write_csv(tmp_path)
    (tmp_path / "movies.csv").unlink()
    with pytest.raises(ValueError, match="no file .*movies.csv"):
        movielens()


@pytest.mark.skipif("MOVIELENS" not in os.environ, reason="MOVIELENS names no folder of ml-latest-small")
def test_the_real_small_folder(movielens):
    dataset = movielens(Path(os.environ["MOVIELENS"]), split={"train": 0.8, "valid": 0.1, "test": 0.1})
    assert dataset.num_samples == {"train": 80003, "valid": 10001, "test": 10000}
    labels = [y for split in ("train", "valid", "test") for _, _, y in samples_of(dataset, split, 4096)]
    assert sum(labels) == 51568  # awk -F, '$3 >= 4' ratings.csv
