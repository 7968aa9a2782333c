"""MuLoCo: DiLoCo around Muon; a language model, 8 workers.

Source: Thérien, Huang, Rish & Belilovsky 2025, "MuLoCo: Muon is a practical inner optimizer for
DiLoCo" (arXiv 2505.23725). Optax's Muon steps matrices, its AdamW everything else.

    python -m experiments.train --config=configs/lm_muloco.py
"""

from configs import common


def get_config(argument=None):
    config = common.lm(argument)
    config.tx = "optax.contrib.muon(learning_rate)"
    config.sync = "diloco(axis_name, 30, total_steps=steps)"
    return config
