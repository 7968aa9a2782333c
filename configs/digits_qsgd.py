"""Eight-bit stochastic quantization, two-phase, no memory; handwritten digits, 8 workers.

Source: Alistarh, Grubic, Li, Tomioka & Vojnovic 2017, "QSGD: Communication-Efficient SGD via
Gradient Quantization and Encoding" (arXiv 1610.02132).

    python -m experiments.train --config=configs/digits_qsgd.py
"""

from configs import common


def get_config(argument=None):
    config = common.digits(argument)
    config.tx = (
        "optax.chain(compressed_average(quantize(8, rounding='stochastic'), axis_name, "
        "exchange='two_phase'), "
        "optax.adamw(learning_rate))"
    )
    return config
