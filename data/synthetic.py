"""Criteo-shaped samples from a seeded generator, with labels from a hidden teacher whose own AUC is known.

Sample i of a split is a pure function of (seed, split, i): every column is SplitMix64 (Steele, Lea, Flood, OOPSLA 2014)
of a counter, so there is no file, no state, and no work or memory that grows with the tables. It is made on any device,
the same on each but for the rounding of exp and log in float64."""

import bisect
import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch

from data.arrays import GAMMA, Array, cast, like, mix64, module_of, normals, shifted
from data.batch import Batch
from data.checks import check_between, check_exact_keys, check_int, check_keys, check_list, check_number
from data.teacher import Teacher, exact_auc, stream_keys

CALIBRATION_SAMPLES = 1 << 16  # the teacher's click rate and AUC are then within about 0.003 of what was asked
CHUNK = 8192  # samples generated at once when a whole split is walked: the scratch stays in cache


def zipf_ids(uniform: Array, cardinalities: np.ndarray, exponent: float) -> Array:
    """int64 ids by the inverse CDF of the density x^-exponent on [1, n+1), less one: id 0 is the most frequent.
    uniform [F, B] in [0, 1); cardinalities [F, 1]."""
    xp, power = module_of(uniform), (1.0 - exponent) or 1e-9  # exponent 1 is the limit
    edge = np.expm1(power * np.log(cardinalities + 1.0))  # [F, 1]; expm1 and log1p keep all digits at the limit
    x = xp.exp(xp.log1p(uniform * like(edge, uniform)) / power)
    return xp.minimum(cast(x, "int64"), like(cardinalities, uniform)) - 1  # rounding may reach n + 1


def num_expected(num_samples: int, min_count: int, cardinality: int, exponent: float) -> int:
    """How many ids of such a column are expected at least min_count times in num_samples: the first so many."""
    power = (1.0 - exponent) or 1e-9

    def expected(i: int) -> float:  # falls with i; the density's integral over [i + 1, i + 2)
        weight = math.exp(power * math.log(i + 1.0)) * math.expm1(power * math.log1p(1.0 / (i + 1.0)))
        return num_samples * weight / math.expm1(power * math.log(cardinality + 1.0))

    return bisect.bisect_left(range(cardinality), True, key=lambda i: expected(i) < min_count)


class Synthetic:
    """Endless samples in Criteo's shape: dense columns I1.. as log1p of log-normal counts, one Zipf id per C1.. column.

    num_samples: {train, valid, test}. Train, valid and test are disjoint streams. An epoch repeats the same train
    samples in another order: position i holds sample (a*i + b) mod n, with a and b from (shuffle_seed, epoch); since
    the samples are independent this mixes as well as a stored permutation, at no memory.
    signal: shares of the teacher's logit variance, {dense, ids, pairs}, and tail_decay (see Teacher).
    min_count: ids expected fewer times in the training samples become one, the last; the teacher knows them all."""

    def __init__(
        self,
        cardinalities: Sequence[int],
        num_samples: Mapping[str, int],
        *,
        seed: int,
        shuffle_seed: int,
        num_dense: int,
        zipf_exponent: float,
        click_rate: float,
        teacher_auc: float,
        signal: Mapping[str, float],
        min_count: int,
    ):
        check_int("data.seed", seed, 0)
        check_int("data.shuffle_seed", shuffle_seed, 0)
        check_int("data.num_dense", num_dense, 0)
        check_int("data.min_count", min_count, 1)
        check_between("data.zipf_exponent", zipf_exponent, 0.0, 4.0)
        check_between("data.click_rate", click_rate, 0.0, 1.0)
        check_between("data.teacher_auc", teacher_auc, 0.5, 1.0)
        check_exact_keys("data.num_samples", num_samples, ("train", "valid", "test"))
        for split, count in num_samples.items():
            check_int(f"data.num_samples.{split}", count, 0 if split == "valid" else 1)
        check_list("data.cardinalities", cardinalities, "[1000, 50]")
        if not cardinalities:
            raise ValueError("data.cardinalities is empty: name the number of ids of at least one feature")
        for i, count in enumerate(cardinalities):
            check_int(f"data.cardinalities[{i}]", count, 1)
            check_between(f"data.cardinalities[{i}]", count, 0, 2**31)  # ids are int32
        check_exact_keys("data.signal", signal, ("dense", "ids", "pairs", "tail_decay"))
        for name, share in signal.items():
            check_number(f"data.signal.{name}", share, 0.0, 100.0)
        if not signal["dense"] * bool(num_dense) + signal["ids"] > 0:
            raise ValueError(
                "data.signal: dense (if there are dense columns) and ids are both 0; nothing could be learnt"
            )
        self.feature_names = [f"C{i + 1}" for i in range(len(cardinalities))]
        self.dense_names = [f"I{i + 1}" for i in range(num_dense)]
        kept = [num_expected(num_samples["train"], min_count, int(n), zipf_exponent) for n in cardinalities]
        kept = [n if min_count == 1 else min(k + 1, n) for k, n in zip(kept, map(int, cardinalities), strict=True)]
        self.cardinalities = dict(zip(self.feature_names, kept, strict=True))
        self._kept = np.array(kept, dtype=np.int64)[:, None]  # [F, 1]
        self.num_samples = {split: int(num_samples[split]) for split in ("train", "valid", "test")}
        self.seed, self.shuffle_seed, self.zipf_exponent = seed, shuffle_seed, float(zipf_exponent)
        self.click_rate, self.teacher_auc = float(click_rate), float(teacher_auc)
        self._rows = np.array(cardinalities, dtype=np.int64)[:, None]  # [F, 1]
        self._teacher = Teacher(seed, len(cardinalities), num_dense=num_dense, signal=signal)
        self._calibrated = False
        self._auc: dict[str, float] = {}
        options = (seed, self.zipf_exponent, self.click_rate, self.teacher_auc, list(map(int, cardinalities)))
        options += (num_dense, sorted(self.num_samples.items()), sorted((k, float(v)) for k, v in signal.items()))
        options += () if min_count == 1 else (min_count,)
        self.fingerprint = hashlib.sha256(repr(("synthetic 1", options)).encode()).hexdigest()

    def prepare(self, keep_unseen: set[str]) -> None:
        """Scales the teacher (a fraction of a second). All ids can occur: keep_unseen is moot."""
        check_keys("keep_unseen", keep_unseen, self.feature_names)
        if not self._calibrated:
            indices = np.arange(CALIBRATION_SAMPLES)
            chunks = [self._columns("calibration", c) for c in np.split(indices, CALIBRATION_SAMPLES // CHUNK)]
            parts = np.concatenate([self._teacher.parts(normal, ids) for normal, ids, _ in chunks], axis=1)
            self._teacher.calibrate(parts, click_rate=self.click_rate, auc=self.teacher_auc)
            self._calibrated = True

    def batches(self, split: str, batch_size: int, *, epoch: int = 0, start: int = 0) -> Iterator[Batch]:
        """Batches of a split from sample `start` on; the last may be smaller. Valid and test ignore the epoch."""
        picks = self.picks(split, batch_size, epoch=epoch, start=start)
        return (self.take(split, index) for index in picks)

    def picks(self, split: str, batch_size: int, *, epoch: int = 0, start: int = 0) -> Iterator[np.ndarray]:
        """The samples of each of these batches, by their numbers in the split."""
        check_keys("split", [split], self.num_samples)
        count = self.num_samples[split]
        step, shift = self._order(epoch, count) if split == "train" else (1, 0)
        for first in range(start, count, batch_size):
            position = np.arange(first, min(first + batch_size, count), dtype=np.uint64)
            yield (position * np.uint64(step) + np.uint64(shift)) % np.uint64(count)

    def take(self, split: str, index: np.ndarray, device: torch.device | str = "cpu") -> Batch:
        """Samples of a split as a batch, made on a device."""
        assert self._calibrated, "prepare() comes first"
        index = index.astype(np.int64)
        on_cpu = torch.device(device).type == "cpu"
        normal, ids, labels, _ = self._samples(split, index if on_cpu else torch.from_numpy(index).to(device))
        xp = module_of(ids)
        dense = xp.log1p(xp.exp(normal)).T  # log1p of a log-normal count, as Criteo's after its transform
        ids = xp.minimum(ids, like(self._kept - 1, ids))
        dense, ids, labels = cast(dense, "float32"), cast(ids, "int32"), cast(labels, "float32")
        dense, ids, labels = map(torch.as_tensor, (dense, ids, labels))
        return Batch(dense.contiguous(), ids.view(-1), None, labels)

    def best_possible_auc(self, split: str) -> float:
        """AUC of the teacher's own probabilities on the samples of this split; no model does better but by luck.
        NaN for a split without samples."""
        check_keys("split", [split], self.num_samples)
        assert self._calibrated, "prepare() comes first"
        if not self.num_samples[split]:
            return math.nan
        if split not in self._auc:
            starts = range(0, self.num_samples[split], CHUNK)
            ends = [min(s + CHUNK, self.num_samples[split]) for s in starts]
            pairs = [np.arange(s, e) for s, e in zip(starts, ends, strict=True)]
            walked = [self._samples(split, indices)[2:] for indices in pairs]
            labels, logits = (np.concatenate(column) for column in zip(*walked, strict=True))
            self._auc[split] = exact_auc(logits, labels)
        return self._auc[split]

    def describe(self) -> str:
        """One line: shape, number of ids, number of training samples, seed."""
        return (
            f"synthetic (Criteo shape: {len(self.dense_names)} dense, {len(self.feature_names)} categorical, "
            f"{sum(self.cardinalities.values()):,} ids, {self.num_samples['train']:,} training samples, "
            f"seed {self.seed})"
        )

    def _order(self, epoch: int, count: int) -> tuple[int, int]:
        """Multiplier (prime to count) and shift of an epoch's order; both below 2^31, so no product overflows."""
        rng = np.random.default_rng([self.shuffle_seed, epoch])
        step = int(rng.integers(1, 2**31))
        while np.gcd(step, count) != 1:
            step += 1
        return step, int(rng.integers(0, 2**31))

    def _columns(self, split: str, indices: Array) -> tuple[Array, Array, Array]:
        """Normals [num_dense, B] float64, ids [F, B] int64 and one uniform [B] for the label. indices: int64 [B]."""
        num_dense, num_features = len(self.dense_names), len(self.feature_names)
        keys = stream_keys(num_dense + num_features + 1, self.seed, split)[:, None]
        bits = mix64(indices * GAMMA + like(keys, indices))  # [num_dense + F + 1, B]
        uniform = cast(shifted(bits, 11), "float64")
        uniform *= 2.0**-53  # [0, 1), all 53 bits of a float64
        at_zero = uniform[:num_dense] == 0
        normal = normals(uniform[:num_dense] + at_zero * 2.0**-54)
        return normal, zipf_ids(uniform[num_dense:-1], self._rows, self.zipf_exponent), uniform[-1]

    def _samples(self, split: str, indices: Array) -> tuple[Array, Array, Array, Array]:
        """Normals, ids, labels [B] (bool) and the teacher's logits [B]."""
        normal, ids, uniform = self._columns(split, indices)
        logits = self._teacher.logit(self._teacher.parts(normal, ids))
        return normal, ids, uniform < 1.0 / (1.0 + module_of(logits).exp(-logits)), logits
