"""FLASC: dense local training, sparse uploads and downloads; a language model, 8 workers.

Source: Kuo, Raje, Rajesh & Smith 2024, "FLASC: Federated LoRA with Sparse Communication" (arXiv
2406.05233), here on all parameters. The validation loss is the server's.

    python -m experiments.train --config=configs/lm_flasc.py
"""

from configs import common


def get_config(argument=None):
    config = common.lm(argument)
    config.tx = "optax.adamw(learning_rate)"
    config.sync = (
        "flasc(top_k(0.25), axis_name, 10, download=top_k(0.5), "
        "outer=optax.sgd(1.0), total_steps=steps)"
    )
    return config
