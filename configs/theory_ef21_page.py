"""EF21 with minibatches stalls; behind the PAGE estimator it goes on.

Source: Fatkhullin, Sokolov, Gorbunov, Li & Richtarik 2021, "EF21 with Bells & Whistles" (arXiv
2110.03294): non-convex logistic regression, Top-1, minibatches, and a full gradient with a small
probability. Expect EF21-SGD to end at the level of its noise, and EF21-PAGE, whose messages are as
small, to go on down beside EF21 with full gradients.

    python -m experiments.theory --config=configs/theory_ef21_page.py
"""

from configs import theory


def get_config(argument=None):
    config = theory.base("logistic", argument, n=20, d=20, examples=100, rows=5)
    config.title = "Non-convex logistic regression, n = 20, Top-1 of 20, minibatches of 5"
    end = "ef21(top_k(k=1), axis_name), optax.sgd(ef21_step_size(L, L_i, alpha=1 / d))"
    config.methods = (
        ("EF21-SGD", f"optax.chain({end})"),
        ("EF21-PAGE, p = 0.05", f"optax.chain(page(0.05), {end})"),
        ("EF21, full gradients", f"optax.chain(page(1.0), {end})"),
    )
    config.rounds = config.rounds or 750
    config.record_every = 15
    config.factor = 1e4
    return config
