"""Local AdamW under the Quadratic Synchronization Rule; handwritten digits, 8 workers.

Source: Gu, Lyu, Arora, Zhang & Huang 2024, "A Quadratic Synchronization Rule for Distributed Deep
Learning" (ICLR, arXiv 2310.14423): rounds grow as 1 / learning rate squared.
Expect the dense accuracy at a twentieth of the bytes.

    python -m experiments.train --config=configs/digits_qsr.py
"""

from configs import common


def get_config(argument=None):
    config = common.digits(argument)
    config.tx = "optax.adamw(learning_rate)"
    rule = "qsr(learning_rate, alpha=0.006, h_base=4, warmup_steps=warmup_steps)"
    config.sync = f"local_sgd(axis_name, {rule}, total_steps=steps)"
    return config
