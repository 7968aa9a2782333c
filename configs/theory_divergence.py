"""Top-1 without error feedback diverges; with it, it converges.

Source: Beznosikov, Horvath, Richtarik & Safaryan 2020 (arXiv 2002.12410), Example 1: three strongly
convex quadratics in R^3 on which gradient descent with naive Top-1 multiplies x by 1 + 11/6 of the
step size a round, from (1, 1, 1). Expect that line, and the others going down.

    python -m experiments.theory --config=configs/theory_divergence.py
"""

from configs import theory


def get_config(argument=None):
    config = theory.base("divergence", argument)
    config.title = "Three quadratics, Top-1: feedback or divergence"
    config.error = "distance"
    rate = "optax.sgd(ef21_step_size(L, L_i, alpha=1 / 3))"
    config.methods = (
        ("naive", f"optax.chain(compressed_average(top_k(k=1), axis_name), {rate})"),
        ("EC", f"optax.chain(error_feedback(top_k(k=1), axis_name), {rate})"),
        ("EF21", f"optax.chain(ef21(top_k(k=1), axis_name), {rate})"),
        ("dense", f"optax.chain(average(axis_name), {rate})"),
    )
    config.rounds = config.rounds or 4000
    config.record_every = 50
    return config
