"""The official MovieLens folders: ratings.csv + movies.csv (ml-latest-small, ml-25m, ml-32m, ...), or ratings.dat +
movies.dat + users.dat (ml-1m) or the same without users (ml-10M100K)."""

from dataclasses import dataclass, replace
from pathlib import Path

from data.checks import nearest
from data.dataset import FileDataset
from data.encode import Schema
from data.source import Source, open_source

RATINGS = ("user", "movie", "rating", "timestamp")
MOVIES = ("movie", "title", "genres")
USERS = ("user", "gender", "age", "occupation", "zip")
YEAR = (
    r"nullif(regexp_extract(title, '\((\d{4})[^()]*\)\s*$', 1), '')"  # "Toy Story (1995)", "Fawlty Towers (1975-1979)"
)
LIKED = 4.0  # stars from which the label is 1


@dataclass(eq=False)
class MovieLens(FileDataset):
    """Label: rating >= 4. Features: user, movie, year (of the title; unknown is a value), genres (multi-hot), and
    gender, age, occupation and zip where the folder has users.dat. Split by time: the past trains, the future tests."""

    def open(self) -> tuple[str, Schema]:
        """See FileDataset."""
        folder = Path(self.path)
        suffix = next((s for s in (".csv", ".dat") if (folder / f"ratings{s}").is_file()), None)
        if suffix is None:
            raise ValueError(f"data.path={self.path}: {what_is_wrong(folder)}")
        users = (folder / "users.dat").is_file()
        movies = replace(open_part(folder / f"movies{suffix}", MOVIES), expressions={"year": YEAR})
        sides = [(movies, "movie")] + ([(open_part(folder / "users.dat", USERS), "user")] if users else [])
        return f"movielens {folder.resolve().name}", Schema(
            main=open_part(folder / f"ratings{suffix}", RATINGS),
            sides=tuple(sides),
            label="rating",
            threshold=LIKED,
            dense={},
            categorical=("user", "movie", "year", *(USERS[1:] if users else ())),
            multi_valued={"genres": "|"},
            time="timestamp",
        )


def open_part(path: Path, columns: tuple[str, ...]) -> Source:
    """A file of the folder, its columns under our names. ml-1m's files are ISO 8859-1, of which titles are not used but
    for the year, so bytes that are not UTF-8 must not make a row bad."""
    is_csv = path.suffix == ".csv"
    delimiter, quote = (",", '"') if is_csv else ("::", "")
    source = open_source(path, delimiter=delimiter, quote=quote, header=is_csv, columns=columns)
    return source if is_csv else replace(source, encoding="latin-1")


def what_is_wrong(folder: Path) -> str:
    """Why a path is no MovieLens folder."""
    if not folder.is_dir():
        siblings = [p.name for p in folder.parent.iterdir()] if folder.parent.is_dir() else []
        return f"no such folder{nearest(folder.name, siblings)}; it must hold ratings.csv or ratings.dat"
    names = ", ".join(sorted(p.name for p in folder.iterdir())[:10]) or "nothing"
    return f"must hold ratings.csv (ml-latest-small, ml-25m, ml-32m) or ratings.dat (ml-1m); it holds {names}"
