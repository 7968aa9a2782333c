"""A small decoder-only transformer in Flax NNX.

    x_0 = E[tokens] + P
    x  <- x + Attention(RMSNorm(x)),   x <- x + W_2 gelu(W_1 RMSNorm(x))
    logits = W RMSNorm(x)

with learned positions P, causal softmax attention and no biases. Sources: A. Vaswani et al.,
Attention Is All You Need, 2017, arXiv:1706.03762; the normalization before each block as in
A. Radford et al., Language Models are Unsupervised Multitask Learners, 2019; RMSNorm from B. Zhang
and R. Sennrich, Root Mean Square Layer Normalization, 2019, arXiv:1910.07467.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx import initializers


class Block(nnx.Module):
    """Causal attention and an MLP of four times the width, each on a normalized input."""

    def __init__(self, width: int, heads: int, residual_std: float, types: dict, rngs: nnx.Rngs):
        def dense(inputs: int, outputs: int, std: float) -> nnx.Linear:
            init = initializers.normal(std)
            return nnx.Linear(inputs, outputs, use_bias=False, kernel_init=init, rngs=rngs, **types)

        self.heads = heads
        self.norm_1 = nnx.RMSNorm(width, rngs=rngs, **types)
        self.qkv = dense(width, 3 * width, width**-0.5)
        self.out = dense(width, width, residual_std)
        self.norm_2 = nnx.RMSNorm(width, rngs=rngs, **types)
        self.up = dense(width, 4 * width, width**-0.5)
        self.down = dense(4 * width, width, residual_std / 2)

    def __call__(self, x: jax.Array) -> jax.Array:
        """(B, L, width) to the same."""
        qkv = self.qkv(self.norm_1(x)).reshape(*x.shape[:2], 3, self.heads, -1)
        q, k, v = (qkv[:, :, i] for i in range(3))
        # 'xla' on every platform: the numbers must not depend on which kernels are installed.
        mixed = jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="xla")
        x = x + self.out(mixed.reshape(x.shape))
        return x + self.down(nnx.gelu(self.up(self.norm_2(x))))


class Transformer(nnx.Module):
    """A language model over `vocab_size` tokens and at most `seq_len` positions.

    Args:
      vocab_size: number of tokens.
      seq_len: longest input.
      num_layers: number of blocks.
      width: of the residual stream; divisible by `num_heads`.
      num_heads: attention heads of each block.
      tie: whether the output layer is the transposed embedding.
      dtype: of the computation; logits are float32.
      param_dtype: of the parameters.
      rngs: the random stream `params`.
    """

    def __init__(
        self, vocab_size, seq_len, num_layers, width, num_heads, tie, dtype, param_dtype, *, rngs
    ):
        types = {"dtype": dtype, "param_dtype": param_dtype}
        std = width**-0.5
        init = initializers.normal(std)
        # Tokens outweigh positions at first: that learns faster. An embedding that is the output
        # layer too must start smaller, or the first logits would be large.
        tokens = init if tie else initializers.normal(1.0)
        self.embed = nnx.Embed(vocab_size, width, embedding_init=tokens, rngs=rngs, **types)
        self.positions = nnx.Embed(seq_len, width, embedding_init=init, rngs=rngs, **types)
        residual_std = std * (2 * num_layers) ** -0.5  # keeps the variance of x over the depth
        self.blocks = nnx.Dict(
            {
                f"block_{i:02d}": Block(width, num_heads, residual_std, types, rngs)
                for i in range(num_layers)
            }
        )
        self.norm = nnx.RMSNorm(width, rngs=rngs, **types)
        self.tie = tie
        if not tie:
            self.head = nnx.Linear(
                width, vocab_size, use_bias=False, kernel_init=init, rngs=rngs, **types
            )

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Tokens (B, L) to float32 logits (B, L, vocab_size)."""
        x = self.embed(tokens) + self.positions(jnp.arange(tokens.shape[-1]))
        for block in self.blocks.values():
            x = block(x)
        x = self.norm(x)
        logits = self.embed.attend(x) if self.tie else self.head(x)
        return logits.astype(jnp.float32)
