"""Measurements: one module per question, run as `python -m benchmarks.NAME`; results as JSON in benchmarks/results/."""

import os

# as train.py, before torch starts its threads: waiting ones sleep. Each library here brings an OpenMP of its own, and
# the threads of one that spin take the cores from the next one's turn (2 cores: up to 10 times as long)
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
