"""EF21-PP: half of the workers take part in a step; a language model, 8 workers.

Source: Fatkhullin, Sokolov, Gorbunov, Li & Richtarik 2021, "EF21 with Bells & Whistles: Practical
Algorithmic Extensions of Modern Error Feedback" (arXiv 2110.03294).

    python -m experiments.train --config=configs/lm_ef21_pp.py
"""

from configs import common


def get_config(argument=None):
    config = common.lm(argument)
    config.tx = (
        "optax.chain(ef21(top_k(0.01), axis_name, momentum=0.1, participation=0.5), "
        "optax.adamw(learning_rate))"
    )
    return config
