"""benchmarks/bloom_ranking.py: its ranks against scipy's, its two ways to score, and that it learns what is planted."""

import numpy as np
import pytest
import torch
from scipy.stats import rankdata

from benchmarks import bloom_ranking
from benchmarks.bloom_ranking import Factorisation, bloom, evaluate, read, split, train
from embeddings import ScaledEmbedding

pytestmark = pytest.mark.once


def test_reciprocal_ranks_are_scipys_with_ties_and_without_known_films():
    scores = torch.randint(0, 4, (9, 12), generator=torch.Generator().manual_seed(0)).float()  # many ties
    known = torch.tensor([[0, 1], [3, 3], [3, 4], [8, 0]])
    wanted = {3: [0, 11], 0: [2], 8: [5, 6, 7]}  # of the others nothing is wanted
    ranked = scores.clone()
    ranked[tuple(known.T)] = -9  # below all others
    brute = [np.mean(1 / rankdata(-ranked[user].double().numpy())[films]) for user, films in wanted.items()]
    pairs = torch.tensor([[user, film] for user, films in wanted.items() for film in films])
    before = scores.clone()
    assert evaluate(scores, known, pairs) == np.mean(brute)
    assert torch.equal(scores, before)


def test_all_scores_are_the_trained_scores_less_the_users_biases():
    torch.manual_seed(0)
    model = Factorisation(bloom(2, 0.5)(20, 4), bloom(4, 0.5)(30, 4))
    for bias in (model.user_biases, model.film_biases):
        torch.nn.init.normal_(bias.weight)
    users, films = torch.arange(20), torch.arange(30)
    one_by_one = torch.stack([model(users, film.expand(20)) for film in films], 1)
    torch.testing.assert_close(model.all_scores() + model.user_biases.weight, one_by_one, rtol=1e-5, atol=1e-6)


def test_films_of_ones_own_kind_are_ranked_first():
    users, films = torch.arange(40), torch.arange(60)
    pairs = torch.cartesian_prod(users, films)
    pairs = pairs[pairs[:, 0] % 2 == pairs[:, 1] % 2]  # even users like even films, odd ones odd ones
    is_test = pairs.sum(1) % 10 == 0
    torch.manual_seed(0)
    model = Factorisation(ScaledEmbedding(40, 8), ScaledEmbedding(60, 8))
    train(model, pairs[~is_test], epochs=60, rate=0.03)
    scores = model.all_scores().detach()
    of_own, of_others = scores[0::2, 0::2], scores[0::2, 1::2]
    assert of_own.min() > of_others.max()
    assert evaluate(scores, pairs[~is_test], pairs[is_test]) > 0.3  # 6 films to find: at best (1 + 1/2 + .. + 1/6) / 6


def test_names_are_numbered_by_appearance_and_every_rating_is_in_one_split(tmp_path):
    rows = [f"u{i % 7}\tFilm: {i % 10} (1999)\t5\t{i}\n" for i in range(70)]  # all pairs of 7 users and 10 films
    (tmp_path / bloom_ranking.FILE).write_text("user_id\titem_id\trating\ttimestamp\n" + "".join(rows))
    pairs, num_users, num_films = read(tmp_path)
    assert (num_users, num_films, pairs[:3].tolist()) == (7, 10, [[0, 0], [1, 1], [2, 2]])
    parts = split(pairs)
    assert [len(part) for part in parts] == [56, 7, 7]
    assert sorted(torch.cat(parts).tolist()) == sorted(pairs.tolist())
