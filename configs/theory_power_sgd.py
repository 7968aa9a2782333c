"""PowerSGD is exact where the mean gradient has low rank, and needs rounds where it has not.

Source: Vogels, Karimireddy & Jaggi 2019, "PowerSGD" (arXiv 1905.13727). Eight workers pull a
24 x 24 matrix to targets of full rank whose mean has rank 2. Expect rank 2 on the line of dense
gradient descent at a sixth of the bits, rank 1 beside it (the error feedback brings one direction
after the other), and Top-k with the bits of rank 1 at a floor.

    python -m experiments.theory --config=configs/theory_power_sgd.py
"""

from configs import theory


def get_config(argument=None):
    config = theory.base("low_rank", argument, n=8, side=24, rank=2)
    config.title = "Full-rank workers, a mean of rank 2: PowerSGD"
    config.error = "distance"
    tx = "optax.chain({}, optax.sgd(0.2))"
    config.methods = (
        ("dense", tx.format("average(axis_name)")),
        ("PowerSGD, rank 2", tx.format("power_sgd(2, axis_name)")),
        ("PowerSGD, rank 1", tx.format("power_sgd(1, axis_name)")),
        ("Top-k, as many bits as rank 1", tx.format("error_feedback(top_k(k=36), axis_name)")),
    )
    config.rounds = config.rounds or 100
    config.factor = 1e4
    return config
