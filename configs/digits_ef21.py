"""EF21-SGDM with top-k 1 %; handwritten digits, 8 workers.

Source: Richtarik, Sokolov & Fatkhullin 2021, "EF21: A New, Simpler, Theoretically Better, and
Practically Faster Error Feedback" (arXiv 2106.05203), with the momentum that batches of 16 need
(Fatkhullin, Tyurin & Richtarik 2023, arXiv 2305.15155): without it EF21 amplifies their noise.
Expect the dense accuracy at a sixteenth of the bytes: an all-gather sends each message to 7 others.

    python -m experiments.train --config=configs/digits_ef21.py
"""

from configs import common


def get_config(argument=None):
    config = common.digits(argument)
    config.tx = (
        "optax.chain(ef21(top_k(0.01), axis_name, momentum=0.1), optax.adamw(learning_rate))"
    )
    return config
