"""SlowMo; a byte-level language model, 8 workers.

Source: Wang, Tantia, Ballas & Rabbat 2020, "SlowMo: Improving Communication-Efficient Distributed
SGD with Slow Momentum" (ICLR, arXiv 1910.00643).

    python -m experiments.train --config=configs/lm_slowmo.py
"""

from configs import common


def get_config(argument=None):
    config = common.lm(argument)
    config.tx = "optax.adamw(learning_rate)"
    config.sync = "slowmo(axis_name, 12, total_steps=steps)"
    if argument == "smoke":
        config.learning_rate.peak = 0.01
    return config
