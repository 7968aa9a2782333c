"""One bit a coordinate with error feedback, two-phase; a language model, 8 workers.

Source: Karimireddy, Rebjock, Stich & Jaggi 2019, "Error Feedback Fixes SignSGD and other Gradient
Compression Schemes" (arXiv 1901.09847), with the exchange of 1-bit Adam (arXiv 2102.02888).

    python -m experiments.train --config=configs/lm_sign_ef.py
"""

from configs import common


def get_config(argument=None):
    config = common.lm(argument)
    exchange = "error_feedback(sign(), axis_name, exchange='two_phase')"
    config.tx = f"optax.chain({exchange}, optax.adamw(learning_rate))"
    if argument == "smoke":
        config.learning_rate.peak = 0.01
    return config
