"""1-bit Adam, 15 % warm-up; a byte-level language model, 8 workers.

Source: Tang et al. 2021, "1-bit Adam: Communication Efficient Large-Scale Training with Adam's
Convergence Speed" (arXiv 2102.02888).

    python -m experiments.train --config=configs/lm_one_bit_adam.py
"""

from configs import common


def get_config(argument=None):
    config = common.lm(argument)
    config.tx = (
        "one_bit_adam(learning_rate, axis_name, freeze_step=15 * steps // 100, weight_decay=1e-4)"
    )
    if argument == "smoke":
        config.learning_rate.peak = 0.01
    return config
