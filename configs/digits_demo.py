"""DeMo: decoupled momentum, DCT top-k; handwritten digits, 8 workers.

Source: Peng, Quesnelle & Kingma 2024, "DeMo: Decoupled Momentum Optimization" (arXiv 2411.19870).

    python -m experiments.train --config=configs/digits_demo.py
"""

from configs import common


def get_config(argument=None):
    config = common.digits(argument)
    config.learning_rate.peak = 0.001
    config.tx = "demo(learning_rate, axis_name)"
    return config
