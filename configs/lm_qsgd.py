"""Eight-bit stochastic quantization, two-phase, no memory; a byte-level language model, 8 workers.

Source: Alistarh, Grubic, Li, Tomioka & Vojnovic 2017, "QSGD: Communication-Efficient SGD via
Gradient Quantization and Encoding" (arXiv 1610.02132).

    python -m experiments.train --config=configs/lm_qsgd.py
"""

from configs import common


def get_config(argument=None):
    config = common.lm(argument)
    config.tx = (
        "optax.chain(compressed_average(quantize(8, rounding='stochastic'), axis_name, "
        "exchange='two_phase'), "
        "optax.adamw(learning_rate))"
    )
    return config
