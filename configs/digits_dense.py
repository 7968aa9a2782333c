"""The dense baseline: float32 gradients averaged in every step; handwritten digits, 8 workers.

Every later comparison is against this run: AdamW, no compression.
Expect a validation accuracy of about 0.97.

    python -m experiments.train --config=configs/digits_dense.py
"""

from configs import common


def get_config(argument=None):
    config = common.digits(argument)
    config.tx = "optax.chain(average(axis_name), optax.adamw(learning_rate))"
    return config
