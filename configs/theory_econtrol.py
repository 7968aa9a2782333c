"""EControl on heterogeneous least squares with gradient noise.

Source: Gao, Islamov & Stich 2024, "EControl: Fast Distributed Optimization with Compression and
Error Control" (ICLR, arXiv 2311.05645). Five workers, Top-5 of 50, sigma = 10. Expect EF21 to
amplify the noise, EControl to end below it; without noise (config.problem.sigma=0) EC has a floor
proportional to the step size where the others converge.

    python -m experiments.theory --config=configs/theory_econtrol.py
"""

from configs import theory


def get_config(argument=None):
    config = theory.base("least_squares", argument, n=5, d=50, zeta=50.0, sigma=10.0)
    config.title = "Heterogeneous least squares, Top-5 of 50, gradient noise 10"
    config.error = "distance"
    config.methods = (
        ("EC", "optax.chain(error_feedback(top_k(k=5), axis_name), optax.sgd(0.005))"),
        ("EF21", "optax.chain(ef21(top_k(k=5), axis_name), optax.sgd(0.005))"),
        ("EControl", "optax.chain(econtrol(top_k(k=5), axis_name, eta=0.05), optax.sgd(0.005))"),
        ("dense", "optax.chain(average(axis_name), optax.sgd(0.005))"),
    )
    config.rounds = config.rounds or 8000
    config.record_every = 40
    config.factor = 20.0
    config.seeds = 3
    return config
