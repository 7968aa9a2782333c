"""EF21-BC: both directions compressed; a byte-level language model, 8 workers.

Source: Fatkhullin, Sokolov, Gorbunov, Li & Richtarik 2021, "EF21 with Bells & Whistles: Practical
Algorithmic Extensions of Modern Error Feedback" (arXiv 2110.03294).

    python -m experiments.train --config=configs/lm_ef21_bc.py
"""

from configs import common


def get_config(argument=None):
    config = common.lm(argument)
    config.tx = (
        "optax.chain(ef21(top_k(0.01), axis_name, momentum=0.1, downlink=top_k(0.05)), "
        "optax.adamw(learning_rate))"
    )
    return config
