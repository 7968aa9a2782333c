"""1-bit LAMB; a byte-level language model, 8 workers.

Source: Li, Awan, Tang, Rajbhandari & He 2021, "1-bit LAMB: Communication Efficient Large-Scale
Large-Batch Training with LAMB's Convergence Speed" (arXiv 2104.06069).

    python -m experiments.train --config=configs/lm_one_bit_lamb.py
"""

from configs import common


def get_config(argument=None):
    config = common.lm(argument)
    config.tx = "one_bit_lamb(learning_rate, axis_name, freeze_step=15 * steps // 100)"
    if argument == "smoke":
        config.learning_rate.peak = 0.01
    return config
