"""SparseLoCo: sparse two-bit displacements with error feedback; a language model, 8 workers.

Source: Sarfi, Thérien, Lidin & Belilovsky 2025, "Communication Efficient LLM Pre-training with
SparseLoCo" (arXiv 2508.15706).

    python -m experiments.train --config=configs/lm_sparse_loco.py
"""

from configs import common


def get_config(argument=None):
    config = common.lm(argument)
    config.tx = "optax.adamw(learning_rate)"
    config.sync = "sparse_loco(axis_name, 5, k=32, total_steps=steps)"
    if argument == "smoke":
        config.learning_rate.peak = 0.02
    return config
