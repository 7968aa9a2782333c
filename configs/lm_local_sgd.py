"""Local AdamW: the parameters are averaged every 8 steps; a language model, 8 workers.

Source: Stich 2019, "Local SGD Converges Fast and Communicates Little" (arXiv 1805.09767).

    python -m experiments.train --config=configs/lm_local_sgd.py
"""

from configs import common


def get_config(argument=None):
    config = common.lm(argument)
    config.tx = "optax.adamw(learning_rate)"
    config.sync = "local_sgd(axis_name, every(8), total_steps=steps)"
    if argument == "smoke":
        config.learning_rate.peak = 0.02
    return config
