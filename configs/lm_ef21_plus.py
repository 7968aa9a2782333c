"""EF21+ with top-k 1 %; a language model, 8 workers.

Source: Richtarik, Sokolov & Fatkhullin 2021, "EF21: A New, Simpler, Theoretically Better, and
Practically Faster Error Feedback" (arXiv 2106.05203), its section on EF21+: a worker sends the
better of EF21's message and the compressed gradient.

    python -m experiments.train --config=configs/lm_ef21_plus.py
"""

from configs import common


def get_config(argument=None):
    config = common.lm(argument)
    config.tx = "optax.chain(ef21_plus(top_k(0.01), axis_name), optax.adamw(learning_rate))"
    return config
