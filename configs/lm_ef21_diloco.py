"""EF21 DiLoCo: top-k 10 % of the displacements; a language model, 8 workers.

Source: Douillard et al. 2023, "DiLoCo: Distributed Low-Communication Training of Language Models"
(arXiv 2311.08105) with the error feedback of Richtarik, Sokolov & Fatkhullin 2021 (arXiv
2106.05203) in its outer chain; the combination is ours.

    python -m experiments.train --config=configs/lm_ef21_diloco.py
"""

from configs import common


def get_config(argument=None):
    config = common.lm(argument)
    config.tx = "optax.adamw(learning_rate)"
    config.sync = (
        "periodic(optax.chain(ef21(top_k(0.1), axis_name), "
        "optax.sgd(0.7, momentum=0.5, nesterov=True)), 15, total_steps=steps)"
    )
    return config
