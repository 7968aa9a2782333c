"""The dense baseline, float32 averages in every step; a byte-level language model, 8 workers.

Every later comparison is against this run: AdamW, no compression.

    python -m experiments.train --config=configs/lm_dense.py
"""

from configs import common


def get_config(argument=None):
    config = common.lm(argument)
    config.tx = "optax.chain(average(axis_name), optax.adamw(learning_rate))"
    if argument == "smoke":
        config.learning_rate.peak = 0.01
    return config
