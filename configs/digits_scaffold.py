"""SCAFFOLD: local steps corrected by control variates; handwritten digits, 8 workers.

Source: Karimireddy et al. 2020, "SCAFFOLD: Stochastic Controlled Averaging for Federated Learning"
(ICML, arXiv 1910.06378).

    python -m experiments.train --config=configs/digits_scaffold.py
"""

from configs import common


def get_config(argument=None):
    config = common.digits(argument)
    config.learning_rate.peak = 0.1
    config.tx = "optax.sgd(learning_rate)"
    config.sync = "scaffold(axis_name, 8, learning_rate, total_steps=steps)"
    return config
