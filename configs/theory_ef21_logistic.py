"""A thousand workers of unequal data: EF21's step from the mean of the smoothness constants.

Source: Richtarik, Gasanov & Burlachenko 2024, "Error Feedback Reloaded" (arXiv 2402.10774):
non-convex logistic regression, n = 1,000, Top-1. The workers' features are scaled by exp(2 z), z
normal, so that a few smoothness constants are large. Expect EF21 with L_AM, and EF21-W on the same
line, well below EF21 with L_QM; with --config.problem.spread=0 all three agree.

    python -m experiments.theory --config=configs/theory_ef21_logistic.py
"""

from configs import theory


def get_config(argument=None):
    config = theory.base("logistic", argument, n=1000, d=20, examples=10, spread=2.0, penalty=1e-3)
    config.title = "Non-convex logistic regression, n = 1,000, Top-1 of 20"
    config.methods = methods()
    config.rounds = config.rounds or 1500
    config.record_every = 15
    config.factor = 100.0
    return config


def methods():
    """(label, expression): the original step, the reloaded one, and the weighted method."""
    tx = "optax.chain({}, optax.sgd(ef21_step_size(L, L_i, alpha=1 / d, rule='{}')))"
    weighted = "ef21(top_k(k=1), axis_name, weight=ef21_weights(L_i))"
    return (
        ("EF21, L_QM", tx.format("ef21(top_k(k=1), axis_name)", "qm")),
        ("EF21, L_AM", tx.format("ef21(top_k(k=1), axis_name)", "am")),
        ("EF21-W, L_AM", tx.format(weighted, "am")),
    )
