"""Signs alone never leave a line; with error feedback they reach the optimum.

Source: Karimireddy, Rebjock, Stich & Jaggi 2019, "Error Feedback Fixes SignSGD" (arXiv 1901.09847):
f = |x + y| / 2 + |x - y|, whose sign gradients are +-(1, -1), so that x + y = 1.53 for ever. Expect
signSGD to stay at loss 0.765 and the scaled sign with feedback to follow subgradient descent to
zero, with a step that falls to zero.

    python -m experiments.theory --config=configs/theory_sign_sgd.py
"""

from configs import theory


def get_config(argument=None):
    config = theory.base("valley", argument, n=1)
    config.title = "|x + y| / 2 + |x - y|: signs and error feedback"
    config.error = "loss"
    rate = "optax.linear_schedule(0.02, 0.0, 1000)"
    config.methods = (
        ("subgradient descent", f"optax.chain(average(axis_name), optax.sgd({rate}))"),
        ("signSGD", f"sign_sgd({rate}, axis_name)"),
        (
            "scaled sign with feedback",
            f"optax.chain(error_feedback(sign(), axis_name), optax.sgd({rate}))",
        ),
    )
    config.rounds = config.rounds or 1000
    config.record_every = 5
    config.factor = 20.0
    return config
