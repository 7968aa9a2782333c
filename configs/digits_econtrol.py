"""EControl with top-k 1 %; handwritten digits, 8 workers.

Source: Gao, Islamov & Stich 2024, "EControl: Fast Distributed Optimization with Compression and
Error Control" (ICLR, arXiv 2311.05645).

    python -m experiments.train --config=configs/digits_econtrol.py
"""

from configs import common


def get_config(argument=None):
    config = common.digits(argument)
    config.tx = "optax.chain(econtrol(top_k(0.01), axis_name, eta=0.1), optax.adamw(learning_rate))"
    return config
