"""Deep Gradient Compression beside momentum that does not know of the wait.

Source: Lin, Han, Mao, Wang & Dally 2018, "Deep Gradient Compression" (ICLR, arXiv 1712.01887).
Logistic regression with minibatches, eight workers, one percent of the coordinates sent, a step so
large that the wait matters. Expect Deep Gradient Compression to fall before momentum after plain
error feedback does, and the warm-up of the sparsity to follow dense SGD as long as it lasts. What
the paper's networks show and this convex problem does not: factor masking changes little here, and
after the warm-up what it gained is lost again.

    python -m experiments.theory --config=configs/theory_dgc.py
"""

from configs import theory


def get_config(argument=None):
    config = theory.base(
        "logistic",
        argument,
        n=8,
        d=500,
        examples=64,
        spread=0.5,
        penalty=0.0,
        convex=True,
        rows=8,
    )
    config.title = "Logistic regression, n = 8, 1 % of 500 coordinates"
    config.error = "loss"
    dgc = "optax.chain(deep_gradient_compression(0.01, axis_name, dense_ndim=0{}), optax.sgd({}))"
    after = "optax.chain(error_feedback(top_k(0.01), axis_name), optax.sgd({}, momentum=0.9))"
    config.methods = (
        ("dense momentum SGD", "optax.chain(average(axis_name), optax.sgd(100.0, momentum=0.9))"),
        ("momentum after error feedback", after.format("100.0")),
        ("DGC", dgc.format("", "100.0")),
        ("DGC, no factor masking", dgc.format(", factor_masking=False", "100.0")),
        ("DGC, warm-up of 50 rounds", dgc.format(", warmup_steps=50", "100.0")),
    )
    config.rounds = config.rounds or 250
    config.record_every = 5
    config.factor = 4.0
    config.seeds = 4
    return config
