"""EF21 with top-k 1 %; a byte-level language model, 8 workers.

Source: Richtarik, Sokolov & Fatkhullin 2021, "EF21: A New, Simpler, Theoretically Better, and
Practically Faster Error Feedback" (arXiv 2106.05203).

    python -m experiments.train --config=configs/lm_ef21.py
"""

from configs import common


def get_config(argument=None):
    config = common.lm(argument)
    config.tx = (
        "optax.chain(ef21(top_k(0.01), axis_name, momentum=0.1), optax.adamw(learning_rate))"
    )
    return config
