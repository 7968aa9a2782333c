"""PowerSGD, rank 2; a byte-level language model, 8 workers.

Source: Vogels, Karimireddy & Jaggi 2019, "PowerSGD: Practical Low-Rank Gradient Compression for
Distributed Optimization" (arXiv 1905.13727).

    python -m experiments.train --config=configs/lm_power_sgd.py
"""

from configs import common


def get_config(argument=None):
    config = common.lm(argument)
    config.tx = "optax.chain(power_sgd(2, axis_name), optax.adamw(learning_rate))"
    if argument == "smoke":
        config.learning_rate.peak = 0.01
    return config
