"""EF21 with partial participation and with heavy ball, 100 workers.

Source: Fatkhullin, Sokolov, Gorbunov, Li & Richtarik 2021, "EF21 with Bells & Whistles" (arXiv
2110.03294): non-convex logistic regression, Top-1, n = 100. Expect participation p to need some 1/p
times the rounds. (All payload slots travel in this all-gather: the bits axis charges everyone.)

    python -m experiments.theory --config=configs/theory_ef21_pp.py
"""

from configs import theory


def get_config(argument=None):
    config = theory.base("logistic", argument, n=100, d=50, examples=50)
    config.title = "Non-convex logistic regression, n = 100, Top-1"
    rate = "2 * ef21_step_size(L, L_i, alpha=1 / d)"
    tx = "optax.chain(ef21(top_k(k=1), axis_name{}), optax.sgd({}))"
    config.methods = (
        ("EF21", tx.format("", rate)),
        ("PP, p = 1/2", tx.format(", participation=0.5", rate)),
        ("PP, p = 1/8", tx.format(", participation=0.125", rate)),
        (
            "HB 0.9",
            f"optax.chain(ef21(top_k(k=1), axis_name), optax.sgd(0.3 * {rate}, momentum=0.9))",
        ),
    )
    config.rounds = config.rounds or 3000
    config.record_every = 20
    config.factor = 100.0
    return config
