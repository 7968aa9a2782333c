"""Without noise, classic error feedback has a floor proportional to its step; EControl has none.

Source: Gao, Islamov & Stich 2024, "EControl: Fast Distributed Optimization with Compression and
Error Control" (ICLR, arXiv 2311.05645). Heterogeneous least squares, five workers, Top-5 of 50.
Expect EC to stay at 0.079 with step 0.02 and at 0.0215 with step 0.005, and EF21, EControl and
EC-Ideal to converge to the accuracy of float32.

    python -m experiments.theory --config=configs/theory_econtrol_noiseless.py
"""

from configs import theory, theory_econtrol


def get_config(argument=None):
    config = theory.base("least_squares", argument, n=5, d=50, zeta=50.0, seed=1)
    config.title = "Heterogeneous least squares without noise, Top-5 of 50"
    config.error = "distance"
    config.methods = tuple(
        (f"{label}, step {rate}", tx)
        for rate in ("0.02", "0.005")
        for label, tx in theory_econtrol.methods(rate)
    )
    config.rounds = config.rounds or 8000
    config.record_every = 40
    config.factor = 1000.0
    config.dense_start = True
    return config
