"""EControl on heterogeneous least squares with gradient noise.

Source: Gao, Islamov & Stich 2024, "EControl: Fast Distributed Optimization with Compression and
Error Control" (ICLR, arXiv 2311.05645). Five workers, Top-5 of 50, sigma = 10, step 0.005, one
recorded run of the noise, estimates that start at the exact gradients. Expect the relative
distances EC 0.038, EC-Ideal 0.028, EF21 0.103, EControl 0.042: EF21 amplifies the noise, EControl
stays near the method that knows the gradients at the optimum. With sigma = 1: 0.0207, 0.0028,
0.0101, 0.0042: now classic feedback (EC) is at its floor.

    python -m experiments.theory --config=configs/theory_econtrol.py [--config.problem.sigma=1]
"""

from configs import theory


def get_config(argument=None):
    config = theory.base(
        "least_squares", argument, n=5, d=50, zeta=50.0, sigma=10.0, recorded=True, seed=1
    )
    config.title = "Heterogeneous least squares, Top-5 of 50, gradient noise"
    config.error = "distance"
    config.methods = (*methods("0.005"), ("dense", dense("0.005")))
    config.rounds = config.rounds or 8000
    config.record_every = 40
    config.factor = 20.0
    config.dense_start = True
    return config


def methods(rate):
    """(label, expression) of the paper's four methods."""
    tx = "optax.chain({}, optax.sgd(" + rate + "))"
    return (
        ("EC", tx.format("error_feedback(top_k(k=5), axis_name)")),
        ("EC-Ideal", tx.format("less_gradients_at_optimum, error_feedback(top_k(k=5), axis_name)")),
        ("EF21", tx.format("ef21(top_k(k=5), axis_name)")),
        ("EControl", tx.format("econtrol(top_k(k=5), axis_name, eta=0.05)")),
    )


def dense(rate):
    """Uncompressed SGD."""
    return f"optax.chain(average(axis_name), optax.sgd({rate}))"
