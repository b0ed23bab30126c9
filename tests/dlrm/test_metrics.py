"""Metrics against scikit-learn, on ordinary and on hostile scores."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sklearn_metrics

from dlrm.metrics import Metrics, entropy, exact_auc

LOGITS = st.one_of(
    st.floats(-30, 30, width=32),
    st.sampled_from([0.0, -0.0, 1e-30, 88.0, -104.0, 3e38, -3e38, math.inf, -math.inf]),  # many ties, and the edges
)
SAMPLES = st.lists(st.tuples(LOGITS, st.booleans()), min_size=2, max_size=60).filter(
    lambda samples: len({label for _, label in samples}) == 2
)


def tensors(samples):
    logits, labels = zip(*samples, strict=True)
    return torch.tensor(logits, dtype=torch.float32), torch.tensor(labels, dtype=torch.float32)


def streamed(logits, labels, batch_size=7):
    metrics = Metrics("cpu")
    for part in range(0, len(logits), batch_size):
        metrics.update(logits[part : part + batch_size], labels[part : part + batch_size])
    return metrics


def sklearn_auc(logits, labels):
    finite = np.clip(logits.double().numpy(), -1e300, 1e300)  # scikit-learn refuses infinity; its rank stays
    return sklearn_metrics.roc_auc_score(labels.numpy(), finite)


def click_samples(num_samples, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(num_samples, generator=generator) * 1.2 - 1.3
    labels = torch.rand(num_samples, generator=generator) < torch.sigmoid(logits * 0.9 + 0.1)
    return logits, labels.float()


@given(SAMPLES)
@settings(deadline=None, max_examples=300)
def test_exact_auc_equals_sklearn(samples):
    logits, labels = tensors(samples)
    assert exact_auc(logits, labels) == pytest.approx(sklearn_auc(logits, labels), abs=1e-9)


@given(SAMPLES)
@settings(deadline=None, max_examples=300)
def test_streaming_auc_is_within_its_own_bound(samples):
    logits, labels = tensors(samples)
    values = streamed(logits, labels).compute()
    assert abs(values["auc"] - sklearn_auc(logits, labels)) <= values["auc_bound"] + 1e-12


@given(SAMPLES)
@settings(deadline=None, max_examples=300)
def test_the_other_metrics_equal_their_definitions(samples):
    logits, labels = tensors(samples)
    values = streamed(logits, labels).compute()
    x, y = logits.double().numpy(), labels.double().numpy()
    loss = np.logaddexp(0, np.where(y > 0, -x, x)).mean()  # right for +-inf too
    probability = torch.sigmoid(logits.double()).numpy()
    expected = {
        "log_loss": loss,
        "normalized_entropy": loss / (-y.mean() * np.log(y.mean()) - (1 - y.mean()) * np.log(1 - y.mean())),
        "accuracy": sklearn_metrics.accuracy_score(y, x > 0),
        "calibration": probability.mean() / y.mean(),
    }
    for name, value in expected.items():
        assert values[name] == pytest.approx(value, rel=1e-8), name


def test_log_loss_and_normalized_entropy_equal_sklearn_on_ordinary_scores():
    logits, labels = click_samples(20_000)
    values = streamed(logits, labels, batch_size=999).compute()
    probability, y = torch.sigmoid(logits.double()).numpy(), labels.numpy()
    loss = sklearn_metrics.log_loss(y, probability)
    prior = sklearn_metrics.log_loss(y, np.full(len(y), y.mean(dtype=np.float64)))
    assert values["log_loss"] == pytest.approx(loss, rel=1e-9)
    assert values["normalized_entropy"] == pytest.approx(loss / prior, rel=1e-8)
    assert abs(values["auc"] - sklearn_metrics.roc_auc_score(y, probability)) <= values["auc_bound"] < 1e-4


def test_constant_predictor_has_normalized_entropy_one_and_auc_one_half():
    labels = torch.tensor([1.0, 0.0, 0.0, 0.0] * 50)
    values = streamed(torch.full((200,), math.log(0.25 / 0.75)), labels).compute()
    assert values["normalized_entropy"] == pytest.approx(1, abs=1e-7)
    assert values["calibration"] == pytest.approx(1, abs=1e-7)
    assert (values["auc"], values["accuracy"]) == (0.5, 0.75)


@pytest.mark.parametrize("label", [0, 1])
def test_one_class_gives_nan_with_the_reason(label):
    logits, labels = torch.tensor([0.1, 0.2, -3.0]), torch.full((3,), float(label))
    metrics = streamed(logits, labels)
    values = metrics.compute()
    missing = {"auc", "auc_bound", "normalized_entropy"} | ({"calibration"} if label == 0 else set())
    assert {name for name, value in values.items() if math.isnan(value)} == missing == set(metrics.reasons)
    assert metrics.reasons["auc"] == f"all 3 labels are {label}"
    with pytest.raises(ValueError, match=f"all 3 labels are {label}"):
        exact_auc(logits, labels)


def test_one_nan_score_makes_every_metric_nan_with_the_reason():
    logits, labels = torch.tensor([0.1, math.nan, -3.0]), torch.tensor([1.0, 0.0, 0.0])
    metrics = streamed(logits, labels)
    assert all(math.isnan(value) for value in metrics.compute().values())
    assert set(metrics.reasons.values()) == {"1 of 3 scores are NaN"}
    with pytest.raises(ValueError, match="1 of 3 scores are NaN"):
        exact_auc(logits, labels)


def test_no_samples_give_nan_with_the_reason():
    metrics = Metrics("cpu")
    metrics.update(torch.empty(0), torch.empty(0))
    assert all(math.isnan(value) for value in metrics.compute().values())
    assert set(metrics.reasons.values()) == {"no samples"}
    with pytest.raises(ValueError, match="no samples"):
        exact_auc(torch.empty(0), torch.empty(0))


def test_auc_of_planted_ranks():
    labels = torch.tensor([0.0, 0.0, 1.0, 1.0])
    assert exact_auc(torch.tensor([1.0, 2.0, 3.0, 4.0]), labels) == 1
    assert exact_auc(torch.tensor([4.0, 3.0, 2.0, 1.0]), labels) == 0
    assert exact_auc(torch.tensor([1.0, 3.0, 3.0, 2.0]), labels) == 0.625  # 2.5 of 4 pairs: one tie
    assert exact_auc(torch.ones(4), labels) == 0.5


def test_entropy_of_a_fair_coin_is_log_two():
    assert entropy(0.5) == pytest.approx(math.log(2))
    assert entropy(1e-12) == pytest.approx(1e-12 * (math.log(1e12) + 1))


def test_precision_recall_counts_what_each_threshold_separates():
    logits, labels = click_samples(3000)
    curve = streamed(logits, labels, 700).precision_recall()
    probabilities, is_click = torch.sigmoid(logits.double()).numpy(), labels.numpy() > 0.5
    for k, (true, false, true_not, false_not, precision, recall) in enumerate(curve.T.tolist()):
        chosen = probabilities >= k / 64
        assert (true, false) == ((chosen & is_click).sum(), (chosen & ~is_click).sum())
        assert (true_not, false_not) == ((~chosen & ~is_click).sum(), (~chosen & is_click).sum())
        assert precision == (true / chosen.sum() if chosen.any() else 0) and recall == true / is_click.sum()
    assert curve.shape == (6, 65) and curve[0, -1] == 0


@pytest.mark.parametrize(("logits", "labels"), [([], []), ([0.1, 2.0], [1, 1]), ([0.1], [0]), ([math.nan, 1], [0, 1])])
def test_precision_recall_of_nan_or_of_one_class_is_none(logits, labels):
    assert streamed(torch.tensor(logits), torch.tensor(labels)).precision_recall() is None
