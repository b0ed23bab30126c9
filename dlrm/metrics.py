"""Binary classification metrics: a stream in bounded memory, and the exact AUC where one number counts."""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

NUM_BINS = 2**18  # with 10 M samples of a CTR model the AUC's error bound is 2e-6; the counts take 4 MiB
NUM_THRESHOLDS = 65  # of a precision-recall curve: k / 64, edges of bins, so that its counts are exact
NUM_NAN, NUM_CORRECT = 0, 1
LOSS_SUM, PREDICTION_SUM = 0, 1


class Metrics:
    """AUC, log loss, normalized entropy, accuracy and calibration of a stream of logits, in memory that does not grow.

    The AUC comes from a histogram of sigmoid(logit) in NUM_BINS equal bins, each pair within a bin counted half.
    Sigmoid in float64 keeps the order of float32 logits, so only pairs inside one bin can be wrong, and by at most a
    half each: `auc_bound`. Counts are int64 and sums float64. Nothing is read back from the device before `compute`.
    """

    def __init__(self, device: torch.device | str):
        self.histogram = torch.zeros(2 * NUM_BINS, dtype=torch.int64, device=device)  # label 0's bins, then label 1's
        self.counts = torch.zeros(2, dtype=torch.int64, device=device)  # NUM_NAN, NUM_CORRECT
        self.sums = torch.zeros(2, dtype=torch.float64, device=device)  # LOSS_SUM, PREDICTION_SUM
        self.reasons: dict[str, str] = {}  # metric -> why it is not a number, as of the last compute()

    @torch.no_grad()
    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Adds a batch. logits: [B] float32 or narrower; labels: [B], 0 or 1, of any type."""
        logits, is_click = logits.double(), labels > 0.5
        probabilities = torch.sigmoid(logits)
        bins = (probabilities.nan_to_num() * NUM_BINS).long().clamp_(max=NUM_BINS - 1)
        bins += is_click * NUM_BINS
        self.histogram.index_add_(0, bins, torch.ones_like(bins))
        self.counts[NUM_NAN] += logits.isnan().sum()
        self.counts[NUM_CORRECT] += ((logits > 0) == is_click).sum()
        # -log(chance of the true class) as one softplus is right for logits of +-inf too, unlike x - x * y + ...
        self.sums[LOSS_SUM] += F.softplus(torch.where(is_click, -logits, logits), threshold=40).sum()
        self.sums[PREDICTION_SUM] += probabilities.sum()

    def compute(self) -> dict[str, float]:
        """auc, auc_bound, log_loss, normalized_entropy, accuracy, calibration. NaN has its reason in `reasons`.

        normalized_entropy: log loss over the entropy of the click rate; 1 is the constant predictor (He et al., 2014).
        accuracy: share on the right side of probability 0.5; a logit of 0 predicts no click.
        calibration: mean prediction over click rate.
        """
        histogram = self.histogram.cpu().view(2, NUM_BINS)
        num_nan, num_correct = self.counts.tolist()
        loss_sum, prediction_sum = self.sums.tolist()
        num_negative, num_positive = histogram.sum(dim=1).tolist()
        num_samples = num_negative + num_positive
        names = ("auc", "auc_bound", "log_loss", "normalized_entropy", "accuracy", "calibration")
        values = dict.fromkeys(names, math.nan)
        if num_samples == 0 or num_nan > 0:
            reason = f"{num_nan} of {num_samples} scores are NaN" if num_nan else "no samples"
            self.reasons = dict.fromkeys(names, reason)
            return values
        click_rate = num_positive / num_samples
        values["log_loss"] = loss_sum / num_samples
        values["accuracy"] = num_correct / num_samples
        self.reasons = {}
        if num_positive:
            values["calibration"] = prediction_sum / num_samples / click_rate
        if num_positive and num_negative:
            values["auc"], values["auc_bound"] = _histogram_auc(histogram)
            values["normalized_entropy"] = values["log_loss"] / entropy(click_rate)
        for name in names:
            if math.isnan(values[name]):
                self.reasons[name] = f"all {num_samples} labels are {int(num_positive > 0)}"
        return values

    def precision_recall(self) -> Tensor | None:
        """The curve [6, NUM_THRESHOLDS] float64 of predicting a click from probability 0, 1/64, ... 1 on.

        Rows: true and false positives, true and false negatives, precision (0 where nothing is predicted), recall.
        None where there is no curve: NaN scores, or labels of one class.
        """
        width = NUM_BINS // (NUM_THRESHOLDS - 1)
        counts = self.histogram.view(2, -1, width).sum(2).cpu()  # [2, 64]
        above = F.pad(counts.flip(1).cumsum(1).flip(1), (0, 1)).double()  # [2, 65]: from each threshold on
        (negative, positive), (false, true) = above[:, 0], above
        if int(self.counts[NUM_NAN]) or not negative or not positive:
            return None
        precision = true / (true + false).clamp(min=1)
        return torch.stack([true, false, negative - false, positive - true, precision, true / positive])


def _histogram_auc(histogram: Tensor) -> tuple[float, float]:
    """AUC and the most it can be off, from counts [2, bins] int64 (label 0's first), both classes present."""
    negative, positive = histogram
    num_pairs = int(negative.sum()) * int(positive.sum())
    num_negative_below = negative.cumsum(0) - negative
    num_inside = int((positive * negative).sum())  # pairs that the histogram cannot order
    return (int((positive * num_negative_below).sum()) + num_inside / 2) / num_pairs, num_inside / 2 / num_pairs


def exact_auc(scores: Tensor, labels: Tensor) -> float:
    """Area under the ROC curve: the chance that a click outranks a non-click, ties counted half.

    scores: [N], any monotone score such as the logit; labels: [N], 0 or 1. Fawcett, PRL 2006, by ranks.
    Raises ValueError, saying why, where it has no value: NaN scores, or labels of one class only.
    """
    scores, is_click = scores.detach().cpu().numpy(), labels.detach().cpu().numpy() > 0.5
    num_nan = int(np.isnan(scores).sum())
    if num_nan:
        raise ValueError(f"{num_nan} of {len(scores)} scores are NaN")
    positive, negative = scores[is_click], np.sort(scores[~is_click])
    if not len(positive) or not len(negative):
        raise ValueError(f"all {len(scores)} labels are {int(len(positive) > 0)}" if len(scores) else "no samples")
    positive.sort()  # sorted queries walk through memory in order: several times faster
    num_below = int(np.searchsorted(negative, positive, side="left").sum())
    num_not_above = int(np.searchsorted(negative, positive, side="right").sum())
    return (num_below + num_not_above) / 2 / (len(positive) * len(negative))


def entropy(rate: float) -> float:
    """Entropy of a coin that lands heads at rate (0 < rate < 1), in nats: the constant predictor's log loss."""
    return -rate * math.log(rate) - (1 - rate) * math.log1p(-rate)
