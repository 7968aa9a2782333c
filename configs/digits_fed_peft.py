"""FedPEFT: only some leaves are trained, and only they travel; handwritten digits, 8 workers.

Source: Sun et al. 2022, "Conquering the Communication Constraints to Enable Large Pre-Trained
Models in Federated Learning" (arXiv 2210.01708). From a random start, so that the convolutions'
kernels are random features.

    python -m experiments.train --config=configs/digits_fed_peft.py
"""

from configs import common


def get_config(argument=None):
    config = common.digits(argument)
    config.tx = (
        "trainable(optax.chain(average(axis_name), optax.adamw(learning_rate)), "
        "leaves_named('dense|bias'))"
    )
    return config
