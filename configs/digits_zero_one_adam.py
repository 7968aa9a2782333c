"""0/1 Adam; handwritten digits, 8 workers.

Source: Lu, Li, Zhang, De Sa & He 2022, "Maximizing Communication Efficiency for Large-scale
Training via 0/1 Adam" (arXiv 2202.06009).

    python -m experiments.train --config=configs/digits_zero_one_adam.py
"""

from configs import common


def get_config(argument=None):
    config = common.digits(argument)
    config.tx = "zero_one_adam(learning_rate, axis_name)"
    return config
