"""Streaming DiLoCo, four fragments, fp4, overlap of two steps; handwritten digits, 8 workers.

Source: Douillard et al. 2025, "Streaming DiLoCo with overlapping communication" (arXiv
2501.18512).

    python -m experiments.train --config=configs/digits_streaming_diloco.py
"""

from configs import common


def get_config(argument=None):
    config = common.digits(argument)
    config.tx = "optax.adamw(learning_rate)"
    config.sync = (
        "streaming_diloco(axis_name, 30, 4, delay=2, exchange='two_phase', "
        "outer_learning_rate=0.7, outer_momentum=0.5, total_steps=steps)"
    )
    return config
