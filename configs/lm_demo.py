"""DeMo: decoupled momentum, DCT top-k; a byte-level language model, 8 workers.

Source: Peng, Quesnelle & Kingma 2024, "DeMo: Decoupled Momentum Optimization" (arXiv 2411.19870).

    python -m experiments.train --config=configs/lm_demo.py
"""

from configs import common


def get_config(argument=None):
    config = common.lm(argument)
    config.learning_rate.peak = 0.001
    config.tx = "demo(learning_rate, axis_name)"
    if argument == "smoke":
        config.learning_rate.peak = 0.005
    return config
