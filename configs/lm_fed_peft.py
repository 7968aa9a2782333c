"""FedPEFT: only some leaves are trained, and only they travel; a language model, 8 workers.

Source: Sun et al. 2022, "Conquering the Communication Constraints to Enable Large Pre-Trained
Models in Federated Learning" (arXiv 2210.01708). From a random start, so that the blocks are random
features.

    python -m experiments.train --config=configs/lm_fed_peft.py
"""

from configs import common


def get_config(argument=None):
    config = common.lm(argument)
    config.tx = (
        "trainable(optax.chain(average(axis_name), optax.adamw(learning_rate)), "
        "leaves_named('norm|head'))"
    )
    return config
