"""CO2: one-round-stale full overlap; a byte-level language model, 8 workers.

Source: Sun et al. 2024, "CO2: Efficient Distributed Training with Full Communication-Computation
Overlap" (ICLR, arXiv 2401.16265).

    python -m experiments.train --config=configs/lm_co2.py
"""

from configs import common


def get_config(argument=None):
    config = common.lm(argument)
    config.tx = "optax.adamw(learning_rate)"
    config.sync = "co2(axis_name, 12, alpha=0.5, beta=0.0, total_steps=steps)"
    if argument == "smoke":
        config.learning_rate.peak = 0.02
    return config
