"""SAVIC with Adam's scaling, refreshed where replicas have met; a language model, 8 workers.

Source: Chezhegov et al. 2024, "Local Methods with Adaptivity via Scaling" (arXiv 2406.00846).

    python -m experiments.train --config=configs/lm_savic.py
"""

from configs import common


def get_config(argument=None):
    config = common.lm(argument)
    config.tx = "optax.sgd(learning_rate, momentum=0.9)"
    config.sync = "savic(axis_name, 8, rule='adam', total_steps=steps)"
    return config
