"""Local AdamW under the Quadratic Synchronization Rule; a byte-level language model, 8 workers.

Source: Gu, Lyu, Arora, Zhang & Huang 2024, "A Quadratic Synchronization Rule for Distributed Deep
Learning" (ICLR, arXiv 2310.14423): rounds grow as 1 / learning rate squared.

    python -m experiments.train --config=configs/lm_qsr.py
"""

from configs import common


def get_config(argument=None):
    config = common.lm(argument)
    alpha = 0.009
    if argument == "smoke":
        alpha, config.learning_rate.peak = 0.04, 0.02
    config.tx = "optax.adamw(learning_rate)"
    rule = f"qsr(learning_rate, alpha={alpha}, h_base=4, warmup_steps=warmup_steps)"
    config.sync = f"local_sgd(axis_name, {rule}, total_steps=steps)"
    return config
