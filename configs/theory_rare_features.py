"""Where nobody shares features, Top-1 costs no more rounds than its own contraction.

Source: Richtarik, Gasanov & Burlachenko 2023, "Error Feedback Shines when Features are Rare"
(arXiv 2305.15264). Twenty workers with two features each, owned by nobody else (c = 1, r = 2), so
that Top-1 acts on two coordinates: alpha = 1/2. Expect EF21 with the rare-features step to need
some 3.4 times the rounds of gradient descent, each with one number of forty, and EF21 with the
general step 15 times more than that.

    python -m experiments.theory --config=configs/theory_rare_features.py
"""

from configs import theory


def get_config(argument=None):
    config = theory.base("rare_features", argument, n=20, features=2)
    config.title = "Rare features: 20 workers with 2 features of their own, Top-1"
    ef21 = "optax.chain(ef21(top_k(k=1), axis_name), optax.sgd({}))"
    rare = "ef21_rare_features_step_size(L, L_i, features=2, owners=1)"
    config.methods = (
        ("gradient descent", "optax.chain(average(axis_name), optax.sgd(1 / L))"),
        ("EF21, rare features", ef21.format(rare)),
        ("EF21, general step", ef21.format("ef21_step_size(L, L_i, alpha=1 / 2)")),
    )
    config.rounds = config.rounds or 2000
    config.record_every = 2
    return config
