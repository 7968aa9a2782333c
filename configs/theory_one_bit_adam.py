"""1-bit Adam ends where Adam ends; one-bit gradients in an Adam that does not freeze do not.

Source: Tang et al. 2021, "1-bit Adam" (arXiv 2102.02888), its motivating figure: error-compensated
one-bit gradients spoil Adam's variance. Least squares on features whose sizes span two decades,
four workers, minibatches, a fifth of the steps dense. Expect Adam and 1-bit Adam on one line, and
one-bit gradients in Adam well above it.

    python -m experiments.theory --config=configs/theory_one_bit_adam.py
"""

from configs import theory


def get_config(argument=None):
    config = theory.base("regression", argument, n=4, d=100, examples=400, decades=2.0, rows=8)
    config.title = "Least squares, features of two decades, n = 4: freezing the variance"
    config.error = "loss"
    rate = "optax.cosine_decay_schedule(0.02, 2000)"
    naive = "error_feedback(sign('l2'), axis_name, exchange='two_phase')"
    config.methods = (
        ("Adam", f"optax.chain(average(axis_name), optax.adam({rate}))"),
        ("1-bit Adam", f"one_bit_adam({rate}, axis_name, freeze_step=400)"),
        ("1-bit gradients, Adam", f"optax.chain({naive}, optax.adam({rate}))"),
    )
    config.rounds = config.rounds or 2000
    config.record_every = 20
    config.factor = 1000.0
    config.seeds = 5
    return config
