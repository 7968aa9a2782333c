"""DiLoCo with eager updates, one round of overlap; handwritten digits, 8 workers.

Source: Kale, Douillard & Donchev 2025, "Eager Updates For Overlapped Communication and
Computation in DiLoCo" (arXiv 2502.12996).

    python -m experiments.train --config=configs/digits_eager_diloco.py
"""

from configs import common


def get_config(argument=None):
    config = common.digits(argument)
    config.tx = "optax.adamw(learning_rate)"
    config.sync = "eager_diloco(axis_name, 30, outer_learning_rate=0.2, total_steps=steps)"
    return config
