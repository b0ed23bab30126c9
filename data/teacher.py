"""The hidden teacher of the synthetic data: a logit that a factorisation model can learn, with a known AUC."""

import hashlib
import math
from collections.abc import Callable, Mapping

import numpy as np

from data.arrays import GAMMA, Array, cast, like, mix64, module_of, shifted

SQRT3 = math.sqrt(3.0)  # uniform on [-SQRT3, SQRT3] has variance 1


def stream_keys(count: int, *words: object) -> np.ndarray:
    """int64 [count]: independent 64-bit keys named by the words (sha256 in counter mode)."""
    name = "/".join(map(str, words))
    digests = (hashlib.sha256(f"{name}/{i}".encode()).digest()[:8] for i in range(count))
    return np.array([int.from_bytes(d, "little", signed=True) for d in digests], dtype=np.int64)


def expected_auc(logits: np.ndarray) -> float:
    """AUC that the scores have on average when each label is drawn with probability sigmoid(logit). logits: [N]."""
    p = 1.0 / (1.0 + np.exp(-np.sort(logits)))
    below = np.cumsum(1.0 - p) - (1.0 - p)
    return float((p * below).sum() / (p.sum() * (1.0 - p).sum()))


def exact_auc(scores: np.ndarray, labels: np.ndarray) -> float:
    """Area under the ROC curve, ties counted half; NaN if one class is missing. scores, labels: [N]."""
    negatives = np.sort(scores[labels == 0])
    positives = scores[labels == 1]
    if not len(negatives) or not len(positives):
        return math.nan
    twice = np.searchsorted(negatives, positives, "left") + np.searchsorted(negatives, positives, "right")
    return float(twice.sum() / (2.0 * len(negatives) * len(positives)))


def bisect(function: Callable[[float], float], target: float, low: float, high: float) -> float:
    """x in [low, high] with function(x) = target, for a function that grows."""
    for _ in range(30):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if function(middle) < target else (low, middle)
    return 0.5 * (low + high)


class Teacher:
    """logit = bias + scale * (dense part + an effect of every id + products of the ids of two features).

    The weights of an id are a hash of (seed, feature, id), times (id + 1)^-tail_decay: ids are numbered by frequency,
    so tail_decay > 0 moves signal from rare ids, which nobody can learn, to frequent ones. The three parts are scaled
    to their shares of the variance, then bias and scale are set so that click rate and AUC are as asked."""

    def __init__(self, seed: int, num_features: int, *, num_dense: int, signal: Mapping[str, float]):
        rng = np.random.default_rng(int(stream_keys(1, seed, "teacher")[0]) % 2**64)
        self.keys = stream_keys(num_features, seed, "effects")[:, None]  # [F, 1]
        self.dense_weights = rng.normal(size=num_dense)
        self.dense_pairs = rng.permutation(num_dense)[: num_dense // 2 * 2].reshape(-1, 2)
        self.feature_weights = 0.6 + 0.8 * rng.random(num_features)  # no feature is mute, none rules
        self.pairs = rng.permutation(num_features)[: num_features // 2 * 2].reshape(-1, 2)
        self.tail_decay = float(signal["tail_decay"])
        self.part_scales = np.sqrt([signal["dense"], signal["ids"], signal["pairs"]])
        self.bias, self.scale = 0.0, 1.0

    def parts(self, normal: Array, ids: Array) -> Array:
        """The three parts [3, B] of the logit, unscaled. normal: float64 [num_dense, B]; ids: int64 [F, B]."""
        xp, one, other = module_of(ids), *like(self.dense_pairs.T, ids)
        dense = like(self.dense_weights, ids) @ normal + 0.5 * xp.tanh(normal[one] * normal[other]).sum(0)
        bits = mix64((ids + 1) * GAMMA + like(self.keys, ids))  # [F, B]
        fade = (cast(ids, "float64") + 1.0) ** -self.tail_decay
        unit = 2 * SQRT3 * 2.0**-53
        effect = (cast(shifted(bits, 11), "float64") * unit - SQRT3) * fade
        one, other = like(self.pairs.T, ids)
        products = (effect[one] * effect[other]).sum(0)
        return xp.stack([dense, like(self.feature_weights, ids) @ effect, products])

    def calibrate(self, parts: np.ndarray, *, click_rate: float, auc: float) -> None:
        """Sets the scale of each part, the bias and the overall scale from the parts [3, N] of a sample."""
        self.part_scales = self.part_scales / np.maximum(parts.std(1), 1e-12)  # a part without columns stays 0
        score = self.part_scales @ parts

        def bias_at(scale: float) -> float:
            return bisect(lambda bias: float((1 / (1 + np.exp(-scale * score - bias))).mean()), click_rate, -50.0, 50.0)

        self.scale = bisect(lambda scale: expected_auc(scale * score + bias_at(scale)), auc, 0.0, 20.0)
        self.bias = bias_at(self.scale)

    def logit(self, parts: Array) -> Array:
        """Logits [B] of parts [3, B]."""
        return self.bias + self.scale * (like(self.part_scales, parts) @ parts)
