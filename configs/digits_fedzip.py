"""FedZip's top-k and k-means clustering of displacements; handwritten digits, 8 workers.

Source: Malekijoo et al. 2021, "FedZip: A Compression Framework for Communication-Efficient
Federated Learning" (arXiv 2102.01593). The clustered values travel in two bits, indices in packed
ones; the entropy coding of the paper has no static shape and stays in
`jaxcomm.compressors.entropy`.

    python -m experiments.train --config=configs/digits_fedzip.py
"""

from configs import common


def get_config(argument=None):
    config = common.digits(argument)
    config.tx = "optax.adamw(learning_rate)"
    config.sync = (
        "periodic(compressed_average(compose(top_k(0.2), kmeans(3)), axis_name), 10, "
        "total_steps=steps)"
    )
    return config
