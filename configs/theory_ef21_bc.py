"""EF21 with a compressed downlink, and what each direction costs.

Source: Fatkhullin, Sokolov, Gorbunov, Li & Richtarik 2021, "EF21 with Bells & Whistles" (arXiv
2110.03294): non-convex logistic regression, n = 20, Top-k both ways. Expect all to converge with
the step of plain EF21, with a downlink of one coordinate in some twice the rounds. (All replicas
know the mean message here, so the downlink moves no further bits: that axis is the uplink's.)

    python -m experiments.theory --config=configs/theory_ef21_bc.py
"""

from configs import theory


def get_config(argument=None):
    config = theory.base("logistic", argument, n=20, d=50, examples=100)
    config.title = "Bidirectional compression: Top-5 of 50 up, Top-k down"
    tx = "optax.chain(ef21(top_k(k=5), axis_name{}), optax.sgd({}))"
    rate = "ef21_step_size(L, L_i, alpha=0.1)"
    config.methods = (
        ("EF21", tx.format("", rate)),
        ("BC, Top-10 down", tx.format(", downlink=top_k(k=10)", rate)),
        ("BC, Top-5 down", tx.format(", downlink=top_k(k=5)", rate)),
        ("BC, Top-1 down", tx.format(", downlink=top_k(k=1)", rate)),
        ("dense", f"optax.chain(average(axis_name), optax.sgd({rate}))"),
    )
    config.rounds = config.rounds or 800
    config.record_every = 8
    config.factor = 100.0
    return config
