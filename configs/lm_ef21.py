"""EF21-SGDM with top-k 1 %; a byte-level language model, 8 workers.

Source: Richtarik, Sokolov & Fatkhullin 2021, "EF21: A New, Simpler, Theoretically Better, and
Practically Faster Error Feedback" (arXiv 2106.05203), with the momentum of Fatkhullin, Tyurin &
Richtarik 2023 (arXiv 2305.15155). A message holds one coordinate in a hundred, so that estimates
are some hundred steps old: the smoke run is longer than others, and averages less.

    python -m experiments.train --config=configs/lm_ef21.py
"""

from configs import common


def get_config(argument=None):
    config = common.lm(argument)
    momentum = 0.1
    if argument == "smoke":
        momentum, config.steps, config.learning_rate.peak = 0.5, 200, 4e-3
    ef21 = f"ef21(top_k(0.01), axis_name, momentum={momentum})"
    config.tx = f"optax.chain({ef21}, optax.adamw(learning_rate))"
    return config
