"""EF21 with the step sizes of the original and of "Error Feedback Reloaded", and EF21-W.

Source: Richtarik, Gasanov & Burlachenko 2024 (arXiv 2402.10774): the arithmetic mean of the local
smoothness constants replaces their quadratic mean in the step size. 50 quadratics in R^20, five of
them up to 1,600 times as smooth as the rest, Top-1. Expect some 3,660 rounds to 1e-6 of the first
squared gradient norm with L_QM, some 860 with L_AM, and EF21-W on top of the latter.

    python -m experiments.theory --config=configs/theory_ef21_reloaded.py
"""

from configs import theory


def get_config(argument=None):
    config = theory.base("quadratics", argument)
    config.title = "Error feedback reloaded: spiky quadratics, n = 50, Top-1"
    alpha = "alpha=1 / d"
    tx = "optax.chain({}, optax.sgd(ef21_step_size(L, L_i, {}, rule='{}')))"
    config.methods = (
        ("EF21, L_QM", tx.format("ef21(top_k(k=1), axis_name)", alpha, "qm")),
        ("EF21, L_AM", tx.format("ef21(top_k(k=1), axis_name)", alpha, "am")),
        (
            "EF21-W, L_AM",
            tx.format("ef21(top_k(k=1), axis_name, weight=ef21_weights(L_i))", alpha, "am"),
        ),
    )
    config.rounds = config.rounds or 4000
    return config
