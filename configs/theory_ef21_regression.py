"""Two thousand workers in one compiled scan: EF21's two step sizes on a non-convex regression.

Source: Richtarik, Gasanov & Burlachenko 2024, "Error Feedback Reloaded" (arXiv 2402.10774):
non-convex synthetic regression, n = 2,000, Top-1. Expect EF21 with L_AM, and EF21-W on the same
line, to need a quarter of the rounds of EF21 with L_QM: the ratio of the two constants is 4.

    python -m experiments.theory --config=configs/theory_ef21_regression.py
"""

from configs import theory, theory_ef21_logistic


def get_config(argument=None):
    config = theory.base("regression", argument, n=2000, d=10, examples=5, spread=1.0, penalty=0.01)
    config.title = "Non-convex regression, n = 2,000, Top-1 of 10"
    config.methods = theory_ef21_logistic.methods()
    config.rounds = config.rounds or 1500
    config.record_every = 15
    config.factor = 1000.0
    return config
