"""lo-fi: workers train apart and are averaged once, at the end; a language model, 8 workers.

Source: Wortsman et al. 2022, "lo-fi: distributed fine-tuning without communication" (arXiv
2210.11948). The paper fine-tunes: from a random start the average of models trained apart can be
worthless.

    python -m experiments.train --config=configs/lm_lo_fi.py
"""

from configs import common


def get_config(argument=None):
    config = common.lm(argument)
    config.tx = "optax.adamw(learning_rate)"
    config.sync = "lo_fi(axis_name, steps)"
    return config
