"""FedAdam: Adam on the averaged displacement every 10 steps; handwritten digits, 8 workers.

Source: Reddi et al. 2021, "Adaptive Federated Optimization" (ICLR, arXiv 2003.00295).

    python -m experiments.train --config=configs/digits_fed_opt.py
"""

from configs import common


def get_config(argument=None):
    config = common.digits(argument)
    config.tx = "optax.adamw(learning_rate)"
    config.sync = "fed_opt(axis_name, 10, optax.adam(0.01, eps=1e-3), total_steps=steps)"
    return config
