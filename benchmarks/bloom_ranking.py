"""How much ranking do Bloom embeddings lose at a share of the rows?  python -m benchmarks.bloom_ranking FOLDER

Implicit factorisation of MovieLens-1M (FOLDER holds ml-1m.inter) as Spotlight's (Kula, 2017): the score of a user and
a film is the product of their vectors plus a bias each, trained on every rating by BPR's pairwise loss against a random
film. Ratings are split 80/10/10 at random, once. MRR is Spotlight's: the mean reciprocal rank of a user's test films
among those not in its training, then the mean over users. Tables are `ScaledEmbedding`, then `BloomEmbedding` for the
films (what Spotlight published) or for films and users. A seed draws weights, hashes, order and negatives.

--validation: instead, the MRR of the validation split by rate and epochs. More EPOCHS rank better still, but the share
that Bloom keeps of films moves little with them (docs/experiments.md).
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.measure import record
from dlrm.report import markdown_table
from dlrm.statistics import interval
from embeddings import BloomEmbedding, ScaledEmbedding, ZeroEmbedding

FILE = "ml-1m.inter"  # user, film, ...: tab-separated, with a header
RATIOS, SEEDS = (0.1, 0.2, 0.5, 1.0), (0, 1, 2)
WIDTH, EPOCHS, RATE, BATCH_SIZE = 32, 6, 0.01, 4096
Table = Callable[[int, int], nn.Module]  # of num_embeddings, embedding_dim


class Factorisation(nn.Module):
    """score(user, film) = <user's vector, film's vector> + user's bias + film's bias. Biases have a number per id."""

    def __init__(self, users: nn.Module, films: nn.Module) -> None:
        super().__init__()
        self.users, self.films = users, films
        self.user_biases, self.film_biases = (ZeroEmbedding(table.num_embeddings, 1) for table in (users, films))

    def forward(self, users: Tensor, films: Tensor) -> Tensor:
        """Scores [..., B] of users [B] and films [..., B]."""
        products = (self.users(users) * self.films(films)).sum(-1)
        return products + self.user_biases(users).squeeze(-1) + self.film_biases(films).squeeze(-1)

    def all_scores(self) -> Tensor:
        """Scores [U, I] of all users and films, less the users' biases, which rank nothing."""
        users, films = (torch.arange(table.num_embeddings) for table in (self.users, self.films))
        return self.users(users) @ self.films(films).T + self.film_biases(films).squeeze(-1)

    def num_bytes(self) -> int:
        """All parameters and buffers."""
        return sum(x.numel() * x.element_size() for x in (*self.parameters(), *self.buffers()))


def read(folder: Path) -> tuple[Tensor, int, int]:
    """Pairs of a user's and a film's number [N, 2], how many users, how many films."""
    numbers: tuple[dict[str, int], dict[str, int]] = {}, {}  # of users, of films: by first appearance
    with (folder / FILE).open(encoding="utf-8") as lines:
        next(lines)
        rows = [
            [known.setdefault(name, len(known)) for known, name in zip(numbers, line.split("\t"), strict=False)]
            for line in lines
        ]
    return torch.tensor(rows), *map(len, numbers)


def split(pairs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """80 % to train, 10 % to validate, 10 % to test: at random, the same in every run."""
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(0))
    learned, validation, test = pairs[order].tensor_split([len(pairs) * 8 // 10, len(pairs) * 9 // 10])
    return learned, validation, test


def train(model: Factorisation, pairs: Tensor, *, epochs: int, rate: float) -> None:
    """BPR as Spotlight has it: the mean of 1 - sigmoid(score of the pair - score of a random film), by Adam."""
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    for _ in range(epochs):
        for users, films in (batch.T for batch in pairs[torch.randperm(len(pairs))].split(BATCH_SIZE)):
            better, worse = model(users, torch.stack([films, torch.randint(model.films.num_embeddings, films.shape)]))
            optimizer.zero_grad()
            (1 - torch.sigmoid(better - worse)).mean().backward()
            optimizer.step()


def mean_reciprocal_rank(scores: Tensor, pairs: Tensor) -> float:
    """The mean over users of the mean of 1 / rank of a user's films; 1 is the best, equal scores share their mean rank.

    scores: [U, I], -inf for what is not to be ranked. pairs: users and films [M, 2]; users without one do not count.
    """
    scores, (users, films) = scores.numpy(), pairs[pairs[:, 0].argsort()].numpy().T
    ordered, firsts = np.sort(scores, axis=1), np.flatnonzero(np.diff(users, prepend=-1))
    means = []
    for user, own in zip(users[firsts], np.split(scores[users, films], firsts[1:]), strict=True):
        below, up_to = (ordered[user].searchsorted(own, side) for side in ("left", "right"))
        means.append(np.mean(1 / (scores.shape[1] - (below + up_to - 1) / 2)))
    return float(np.mean(means))


def evaluate(scores: Tensor, known: Tensor, wanted: Tensor) -> float:
    """MRR of the wanted pairs [M, 2], each ranked among the films that its user has not in the known pairs [N, 2]."""
    return mean_reciprocal_rank(scores.index_put(tuple(known.T), torch.tensor(-torch.inf)), wanted)


def choices(num_hashes: list[int]) -> dict[tuple[str, int | None, float | None], tuple[Table, Table]]:
    """(what is compressed, hashes, ratio) -> the tables of users and of films; first nothing is."""
    chosen = {("nothing", None, None): (ScaledEmbedding, ScaledEmbedding)}
    for hashes in num_hashes:
        for ratio in RATIOS:
            table = bloom(hashes, ratio)
            chosen["films", hashes, ratio] = (ScaledEmbedding, table)
            chosen["films and users", hashes, ratio] = (table, table)
    return chosen


def bloom(hashes: int, ratio: float) -> Table:
    """Spotlight's layer, without an id for padding: films and users are numbered from 0."""
    return lambda n, width: BloomEmbedding(n, width, ratio, hashes, padding_idx=None)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bloom_ranking", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help=f"of {FILE}")
    parser.add_argument("--hashes", type=int, nargs="+", default=[4], help="rows that an id reads; Spotlight's: 4")
    parser.add_argument("--validation", action="store_true", help="try epochs and rates")
    options = parser.parse_args()
    pairs, num_users, num_films = read(options.folder)
    learned, validation, test = split(pairs)
    print(
        f"{len(pairs):,} ratings, {num_users:,} users, {num_films:,} films; {len(learned):,} train, {len(test):,} test"
    )

    def make(users: Table, films: Table, seed: int) -> Factorisation:
        torch.manual_seed(seed)
        return Factorisation(users(num_users, WIDTH), films(num_films, WIDTH))

    if options.validation:
        for (what, hashes, ratio), tables in choices(options.hashes).items():
            for rate in (0.003, RATE, 0.03) if ratio in (None, 0.2) else ():
                model = make(*tables, seed=100)
                for epochs in range(3, 13, 3):
                    train(model, learned, epochs=3, rate=rate)
                    mrr = evaluate(model.all_scores().detach(), learned, validation)
                    print(f"{what} hashes={hashes} ratio={ratio} rate={rate} epochs={epochs}: {mrr:.4f}", flush=True)
        return

    popularity = torch.bincount(learned[:, 1], minlength=num_films).float().expand(num_users, -1)
    rows = [{"compressed": "all users alike: by popularity", "MRR": evaluate(popularity, learned, test)}]
    print(rows[0], flush=True)
    plain: dict[int, float] = {}  # seed -> MRR of nothing compressed, which comes first
    for (what, hashes, ratio), tables in choices(options.hashes).items():
        mrr = {}
        for seed in SEEDS:
            model = make(*tables, seed)
            train(model, learned, epochs=EPOCHS, rate=RATE)
            mrr[seed] = evaluate(model.all_scores().detach(), learned, test)
        plain = plain or mrr
        mean, share = interval(list(mrr.values())), interval([mrr[seed] / plain[seed] for seed in SEEDS])
        row = {"compressed": what, "hashes": hashes, "ratio": ratio, "bytes": model.num_bytes()}
        row |= {"MRR": mean.mean, "MRR_half": mean.half, "share": share.mean, "share_half": share.half}
        rows.append(row | {"by_seed": mrr})
        print(rows[-1], flush=True)
        record("bloom-ranking", "cpu", rows)  # after each, so that an end before the last loses none
    print(markdown_table([_shown(row) for row in rows]))


def _shown(row: dict) -> dict:
    """A row for people: mean and 95 % interval over seeds."""

    def spread(name: str, digits: int) -> str:
        half = row.get(f"{name}_half")
        return "" if half is None else f"{row[name]:.{digits}f} ± {half:.{digits}f}"

    return {
        "compressed": row["compressed"],
        "hashes": row.get("hashes") or "",
        "ratio": row.get("ratio") or "",
        "test MRR": spread("MRR", 4) or f"{row['MRR']:.4f}",
        "of uncompressed": spread("share", 2),
        "bytes": row.get("bytes", ""),
    }


if __name__ == "__main__":
    main()
