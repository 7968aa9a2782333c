"""DiLoCo; handwritten digits, 8 workers.

Source: Douillard et al. 2023, "DiLoCo: Distributed Low-Communication Training of Language Models"
(arXiv 2311.08105).

    python -m experiments.train --config=configs/digits_diloco.py
"""

from configs import common


def get_config(argument=None):
    config = common.digits(argument)
    config.tx = "optax.adamw(learning_rate)"
    config.sync = "diloco(axis_name, 30, outer_momentum=0.5, total_steps=steps)"
    return config
