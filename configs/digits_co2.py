"""CO2: one-round-stale full overlap; handwritten digits, 8 workers.

Source: Sun et al. 2024, "CO2: Efficient Distributed Training with Full Communication-Computation
Overlap" (ICLR, arXiv 2401.16265).

    python -m experiments.train --config=configs/digits_co2.py
"""

from configs import common


def get_config(argument=None):
    config = common.digits(argument)
    config.tx = "optax.adamw(learning_rate)"
    config.sync = "co2(axis_name, 12, total_steps=steps)"
    return config
