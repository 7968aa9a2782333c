"""SCAFCOM: SCAFFOLD with top-k 5 % up and client momentum; handwritten digits, 8 workers.

Source: Huang, Li & Li 2024, "Stochastic Controlled Averaging for Federated Learning with
Communication Compression" (ICLR, arXiv 2308.08165).

    python -m experiments.train --config=configs/digits_scafcom.py
"""

from configs import common


def get_config(argument=None):
    config = common.digits(argument)
    config.learning_rate.peak = 0.1
    config.tx = "optax.sgd(learning_rate)"
    config.sync = "scafcom(top_k(0.05), axis_name, 8, learning_rate, total_steps=steps)"
    return config
