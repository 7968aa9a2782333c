"""DiLoCo with eager updates, one round of overlap; a byte-level language model, 8 workers.

Source: Kale, Douillard & Donchev 2025, "Eager Updates For Overlapped Communication and
Computation in DiLoCo" (arXiv 2502.12996).

    python -m experiments.train --config=configs/lm_eager_diloco.py
"""

from configs import common


def get_config(argument=None):
    config = common.lm(argument)
    config.tx = "optax.adamw(learning_rate)"
    config.sync = (
        "eager_diloco(axis_name, 30, outer_learning_rate=0.8, outer_momentum=0.0, "
        "total_steps=steps)"
    )
    if argument == "smoke":
        config.learning_rate.peak = 0.02
    return config
