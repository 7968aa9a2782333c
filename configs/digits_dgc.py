"""Deep Gradient Compression at 0.1 % density; handwritten digits, 8 workers.

Source: Lin, Han, Mao, Wang & Dally 2018, "Deep Gradient Compression: Reducing the Communication
Bandwidth for Distributed Training" (ICLR, arXiv 1712.01887). Biases would be most of what a model
this small sends: they are compressed, too (dense_ndim=0). With the usual momentum of 0.9 what a
coordinate has gathered when its turn comes, after hundreds of steps, is too large a step here.

    python -m experiments.train --config=configs/digits_dgc.py
"""

from configs import common


def get_config(argument=None):
    config = common.digits(argument)
    config.learning_rate.peak = 0.1
    config.tx = (
        "optax.chain(deep_gradient_compression(0.001, axis_name, warmup_steps=warmup_steps, "
        "momentum=0.5, dense_ndim=0), optax.sgd(learning_rate))"
    )
    return config
