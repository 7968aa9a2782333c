"""Signum with majority vote; handwritten digits, 8 workers.

Source: Bernstein, Zhao, Azizzadenesheli & Anandkumar 2019, "signSGD with Majority Vote is
Communication Efficient and Fault Tolerant" (arXiv 1810.05291).

    python -m experiments.train --config=configs/digits_signum.py
"""

from configs import common


def get_config(argument=None):
    config = common.digits(argument)
    config.learning_rate.peak = 0.0005
    config.tx = "signum(learning_rate, axis_name)"
    return config
