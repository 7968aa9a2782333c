"""Image classification: a small convolutional network or an MLP, and their task.

Neither has batch statistics (no BatchNorm): the loss of a worker depends on its parameters and its
batch alone, so that averaging gradients over workers is the gradient of the average loss.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from experiments.tasks.base import Data, Task, as_dtype, build_task


class ConvNet(nnx.Module):
    """3x3 convolutions (the first with stride 1, all others with stride 2), then an MLP.

    Args:
      shape: height, width and channels of an image.
      classes: number of classes.
      channels: output channels of each convolution.
      hidden: width of the hidden layer.
      dtype: of the computation.
      param_dtype: of the parameters.
      rngs: the random stream `params`.
    """

    def __init__(self, shape, classes, channels, hidden, dtype, param_dtype, *, rngs: nnx.Rngs):
        height, width, inputs = shape
        types = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.convs = nnx.Dict({})
        for i, outputs in enumerate(channels):
            stride = 1 if i == 0 else 2
            self.convs[f"conv_{i}"] = nnx.Conv(inputs, outputs, (3, 3), strides=stride, **types)
            height, width, inputs = -(-height // stride), -(-width // stride), outputs
        features = (height * width * inputs,)
        self.mlp = MLP(features, classes, (hidden,), dtype, param_dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Images (B, height, width, channels) to float32 logits (B, classes)."""
        for conv in self.convs.values():
            x = nnx.gelu(conv(x))
        return self.mlp(x)


class MLP(nnx.Module):
    """Dense layers with outputs `hidden` and then `classes`, GELU between them."""

    def __init__(self, shape, classes, hidden, dtype, param_dtype, *, rngs: nnx.Rngs):
        sizes = (int(np.prod(shape)), *hidden, classes)
        types = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.layers = nnx.Dict(
            {f"dense_{i}": nnx.Linear(*sizes[i : i + 2], **types) for i in range(len(sizes) - 1)}
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """Arrays (B, ...) to float32 logits (B, classes)."""
        x = x.reshape(len(x), -1)
        first, *others = self.layers.values()
        x = first(x)
        for layer in others:
            x = layer(nnx.gelu(x))
        return x.astype(jnp.float32)


def image_metrics(model: nnx.Module, batch) -> dict[str, jax.Array]:
    """Cross entropy in nats and correctness of each image of `batch` ('image', 'label')."""
    logits = model(batch["image"])  # type: ignore[operator]
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
    correct = jnp.argmax(logits, axis=-1) == batch["label"]
    return {"loss": loss, "accuracy": correct.astype(jnp.float32)}


def image_data(train, validation, split: str) -> Data:
    """Data of `(images, labels)` pairs: float32 images (N, H, W, C), int32 labels (N,)."""
    images, labels = train
    metadata = {"split": split, "classes": 10, "image_shape": list(images.shape[1:])}
    return Data(
        num_train=len(labels),
        fetch=lambda i: {"image": images[i], "label": labels[i]},
        validation={"image": validation[0], "label": validation[1]},
        metadata=metadata,
    )


def image_task(config, data: Data) -> Task:
    """The task of `data` with the model that `config.model` describes."""
    model = config.model
    shape, classes = data.metadata["image_shape"], data.metadata["classes"]
    types = (
        as_dtype("config.task.model.dtype", model.dtype),
        as_dtype("config.task.model.param_dtype", model.param_dtype),
    )

    def make_model(rngs: nnx.Rngs) -> nnx.Module:
        if model.kind == "conv":
            return ConvNet(shape, classes, model.channels, model.hidden, *types, rngs=rngs)
        return MLP(shape, classes, (model.hidden, model.hidden), *types, rngs=rngs)

    if model.kind not in ("conv", "mlp"):
        raise ValueError(f"config.task.model.kind must be 'conv' or 'mlp', got {model.kind!r}.")
    if min(model.hidden, *model.channels) < 1:
        raise ValueError(
            "config.task.model.hidden and channels must be at least 1, "
            f"got {model.hidden} and {model.channels}."
        )
    return build_task(config.name, make_model, image_metrics, data, eval_batch=500)
