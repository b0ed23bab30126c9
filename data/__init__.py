"""Files, or a generator, to batches. Nothing here knows about embeddings or models.

Shapes: B batch, F features (categorical columns), N ids of the batch, rows of the file.
Every dataset has: feature_names, dense_names, prepare, cardinalities, num_samples, batches, describe,
best_possible_auc, fingerprint (see docs/data.md)."""
