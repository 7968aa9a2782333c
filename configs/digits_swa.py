"""SWA: local AdamW, and the average of its later meetings; handwritten digits, 8 workers.

Source: Izmailov et al. 2018, "Averaging Weights Leads to Wider Optima and Better Generalization"
(arXiv 1803.05407). The average stands beside the training; from the first meeting in it on, the
validation loss is the average's.

    python -m experiments.train --config=configs/digits_swa.py
"""

from configs import common


def get_config(argument=None):
    config = common.digits(argument)
    config.tx = "optax.adamw(learning_rate)"
    config.sync = "weight_average(local_sgd(axis_name, 8, total_steps=steps), start=steps // 2)"
    return config
