"""Gossip with a single final merge; handwritten digits, 8 workers.

Source: Zhu et al. 2025, "On the Surprising Effectiveness of a Single Global Merging in
Decentralized Learning" (arXiv 2507.06542). Random pairs average with probability 0.2 after every 8
steps, everyone once at the end.

    python -m experiments.train --config=configs/digits_single_merge.py
"""

from configs import common


def get_config(argument=None):
    config = common.digits(argument)
    config.tx = "optax.adamw(learning_rate)"
    config.sync = "single_merge(axis_name, 8, total_steps=steps)"
    return config
