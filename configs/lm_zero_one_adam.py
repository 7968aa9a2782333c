"""0/1 Adam; a byte-level language model, 8 workers.

Source: Lu, Li, Zhang, De Sa & He 2022, "Maximizing Communication Efficiency for Large-scale
Training via 0/1 Adam" (arXiv 2202.06009).

    python -m experiments.train --config=configs/lm_zero_one_adam.py
"""

from configs import common


def get_config(argument=None):
    config = common.lm(argument)
    config.tx = "zero_one_adam(learning_rate, axis_name, variance_stop=15 * steps // 100)"
    if argument == "smoke":
        config.learning_rate.peak = 0.01
    return config
