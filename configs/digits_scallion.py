"""SCALLION: SCAFFOLD with four stochastic bits a coordinate up; handwritten digits, 8 workers.

Source: Huang, Li & Li 2024, "Stochastic Controlled Averaging for Federated Learning with
Communication Compression" (ICLR, arXiv 2308.08165).

    python -m experiments.train --config=configs/digits_scallion.py
"""

from configs import common


def get_config(argument=None):
    config = common.digits(argument)
    config.learning_rate.peak = 0.1
    config.tx = "optax.sgd(learning_rate)"
    config.sync = (
        "scallion(quantize(4, rounding='stochastic'), axis_name, 8, learning_rate, "
        "total_steps=steps)"
    )
    return config
