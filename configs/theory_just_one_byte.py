"""One byte a sample learns as fast as float32 scalars, and as one machine with all the samples.

Source: Zelikman et al. 2023, "Just One Byte (per gradient)" (arXiv 2306.10015). Linear regression
in R^20, four machines of eight samples, forward passes only. Expect the byte near the line of the
unrounded scalars (MeZO with 32 samples; their mean gradient travels dense here) at 64 bits a round
and machine, down to a floor that the width of its levels sets, clip / 127: a clip of 5 is slower at
first, when scalars are larger than that, and gets lower.

    python -m experiments.theory --config=configs/theory_just_one_byte.py
"""

from configs import theory


def get_config(argument=None):
    config = theory.base("regression", argument, n=4, d=20, examples=16, label_noise=0.0)
    config.title = "Forward passes, d = 20, 4 machines of 8 samples"
    config.error = "distance"
    byte = "just_one_byte(loss, axis_name, learning_rate=0.1, clip={}, samples=8, seed=seed)"
    floats = "optax.chain(forward_gradient(samples=8), average(axis_name), optax.sgd(0.1))"
    config.methods = (
        ("float32 scalars", floats),
        ("one byte", byte.format("60.0")),
        ("one byte, clipped at 5", byte.format("5.0")),
    )
    config.rounds = config.rounds or 300
    config.record_every = 3
    config.factor = 50.0
    config.seeds = 16
    return config
