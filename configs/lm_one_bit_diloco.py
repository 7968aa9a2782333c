"""1-bit DiLoCo: displacements in one bit, with error feedback; a language model, 8 workers.

Source: Douillard et al. 2023, "DiLoCo: Distributed Low-Communication Training of Language Models"
(arXiv 2311.08105) with the two-phase exchange of Tang et al. 2021 (1-bit Adam, arXiv 2102.02888) in
its outer chain; the combination is ours.

    python -m experiments.train --config=configs/lm_one_bit_diloco.py
"""

from configs import common


def get_config(argument=None):
    config = common.lm(argument)
    config.tx = "optax.adamw(learning_rate)"
    config.sync = (
        "periodic(optax.chain(error_feedback(sign(), axis_name, exchange='two_phase'), "
        "optax.sgd(0.7, momentum=0.5, nesterov=True)), 15, total_steps=steps)"
    )
    return config
