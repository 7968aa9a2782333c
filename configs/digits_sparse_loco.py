"""SparseLoCo: sparse two-bit displacements with error feedback; handwritten digits, 8 workers.

Source: Sarfi, Thérien, Lidin & Belilovsky 2025, "Communication Efficient LLM Pre-training with
SparseLoCo" (arXiv 2508.15706).

    python -m experiments.train --config=configs/digits_sparse_loco.py
"""

from configs import common


def get_config(argument=None):
    config = common.digits(argument)
    config.tx = "optax.adamw(learning_rate)"
    config.sync = "sparse_loco(axis_name, 5, k=32, total_steps=steps)"
    return config
