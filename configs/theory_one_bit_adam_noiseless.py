"""Textbook 1-bit Adam explodes on a noiseless quadratic; jaxcomm's stays below where it froze.

Source: Tang et al. 2021, "1-bit Adam" (arXiv 2102.02888). f = ||x||^2 / 2 in R^200, targets around
zero, no noise, frozen at step 100 of 1,000: coordinates that started near their target have a
frozen variance of almost zero, and a sign gives them full-sized updates. Expect the textbook
(max_update = inf) to swing up to some two times the starting loss, and the safe one to fall all the
way to where a step of one bit turns in circles. With noise (--config.problem.sigma=1) all three end
together.

    python -m experiments.theory --config=configs/theory_one_bit_adam_noiseless.py
"""

from configs import theory


def get_config(argument=None):
    config = theory.base("diagonal", argument, n=4, d=200)
    config.title = "Noiseless quadratic, one bit a coordinate after step 100"
    config.error = "loss"
    one_bit = "one_bit_adam(0.01, axis_name, freeze_step=100{})"
    config.methods = (
        ("Adam", "optax.chain(average(axis_name), optax.adam(0.01))"),
        ("1-bit Adam, textbook", one_bit.format(", max_update=jnp.inf")),
        ("1-bit Adam, safe", one_bit.format("")),
    )
    config.rounds = config.rounds or 1000
    config.record_every = 5
    config.factor = 100.0
    return config
