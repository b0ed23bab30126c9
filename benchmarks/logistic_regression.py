"""How far does a linear model get on the same features and split?

    python -m benchmarks.logistic_regression data=movielens data.path=FOLDER

Takes train.py's data keys. scikit-learn's LogisticRegression on the one-hot (multi-hot: count) ids and dense columns,
trained on the training split; C is the best of a grid ON THE TEST SPLIT, which favours this baseline. Ids that training
never had have no weight.
"""

import sys

import numpy as np
import scipy.sparse as sp
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import OmegaConf
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss, roc_auc_score

from benchmarks.measure import record
from train import CONF

INVERSE_PENALTIES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)


def matrix(dataset, split: str) -> tuple[sp.csr_matrix, np.ndarray]:
    """The samples of a split as [rows, dense columns + all ids] and their labels."""
    sizes = list(dataset.cardinalities.values())
    first = np.cumsum([0, *sizes[:-1]]) + len(dataset.dense_names)
    blocks, labels = [], []
    for batch in dataset.batches(split, 1 << 16):
        num_rows, num_features = len(batch.labels), len(sizes)
        counts = np.ones(num_rows * num_features, dtype=np.int64) if batch.offsets is None else np.diff(batch.offsets)
        bags = np.repeat(np.arange(num_rows * num_features), counts)  # feature-major
        rows, features = bags % num_rows, bags // num_rows
        columns = batch.ids.numpy().astype(np.int64) + first[features]
        ids = sp.coo_matrix((np.ones(len(rows)), (rows, columns)), shape=(num_rows, first[-1] + sizes[-1]))
        dense = sp.coo_matrix(batch.dense.numpy())
        dense.resize(num_rows, first[-1] + sizes[-1])
        blocks.append((ids + dense).tocsr())
        labels.append(batch.labels.numpy())
    return sp.vstack(blocks).tocsr(), np.concatenate(labels)


def main() -> None:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = OmegaConf.to_container(compose("config", sys.argv[1:]).data, resolve=True)
    dataset = instantiate(config)
    dataset.prepare(set())
    (train_x, train_y), (test_x, test_y) = matrix(dataset, "train"), matrix(dataset, "test")
    print(f"data: {dataset.describe()}; {train_x.shape[1]:,} columns")
    rows = []
    for penalty in INVERSE_PENALTIES:
        model = LogisticRegression(C=penalty, max_iter=300).fit(train_x, train_y)
        scores = model.predict_proba(test_x)[:, 1]
        rows.append(
            {"C": penalty, "test_auc": roc_auc_score(test_y, scores), "test_log_loss": log_loss(test_y, scores)}
        )
        print(
            f"C={penalty:<5g} test AUC {rows[-1]['test_auc']:.5f}  test log loss {rows[-1]['test_log_loss']:.5f}",
            flush=True,
        )
    best = max(rows, key=lambda row: row["test_auc"])
    print(f"best test AUC {best['test_auc']:.5f} at C={best['C']:g}, chosen on the test split")
    record(f"logistic-regression-{type(dataset).__name__.lower()}", "cpu", [{"data": dataset.describe()}, *rows])


if __name__ == "__main__":
    main()
