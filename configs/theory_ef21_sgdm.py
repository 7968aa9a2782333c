"""EF21 with stochastic gradients stalls; with momentum it goes on.

Source: Fatkhullin, Tyurin & Richtarik 2023, "Momentum Provably Improves Error Feedback!" (arXiv
2305.15155): f = ||x||^2 / 2 in R^2 with three-point noise, Top-1, one worker. Expect EF21-SGD to
end at 0.0117, which a ten times smaller step only halves, and EF21-SGDM (eta = 7 step) at 0.0052
and a tenth of it.

    python -m experiments.theory --config=configs/theory_ef21_sgdm.py
"""

from configs import theory


def get_config(argument=None):
    config = theory.base("noisy_quadratic", argument, n=1, sigma=1.0)
    config.title = "Three-point noise in R^2, Top-1: momentum repairs EF21"
    config.error = "gradient"
    ef21 = "optax.chain(ef21(top_k(k=1), axis_name{}), optax.sgd({}))"
    config.methods = (
        ("EF21-SGD, step 0.01", ef21.format("", "0.01")),
        ("EF21-SGD, step 0.001", ef21.format("", "0.001")),
        ("EF21-SGDM, step 0.01", ef21.format(", momentum=0.07", "0.01")),
        ("EF21-SGDM, step 0.001", ef21.format(", momentum=0.007", "0.001")),
    )
    config.rounds = config.rounds or 8000
    config.record_every = 100
    config.factor = 100.0
    config.seeds = 200
    return config
