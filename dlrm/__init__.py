"""The recommender: model, training, metrics, logging, checkpoints. It is handed its embeddings and its data.

Shapes: B batch, F categorical features, D embedding dimension, N samples, V = F + 1 vectors
that interact.
Bytes are bytes; MiB is 1024^2; time is in seconds.
"""
