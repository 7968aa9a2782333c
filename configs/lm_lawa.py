"""LAWA: local AdamW, and the average of its last five meetings; a language model, 8 workers.

Source: Kaddour 2022, "Stop Wasting My Time! Saving Days of ImageNet and BERT Training with Latest
Weight Averaging" (arXiv 2209.14981). The average stands beside the training; the validation loss
is the average's.

    python -m experiments.train --config=configs/lm_lawa.py
"""

from configs import common


def get_config(argument=None):
    config = common.lm(argument)
    config.tx = "optax.adamw(learning_rate)"
    config.sync = "weight_average(local_sgd(axis_name, 8, total_steps=steps), last=5)"
    return config
