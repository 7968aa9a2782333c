"""The transformer of `experiments.tasks` in PyTorch, trained by DistributedDataParallel.

Parameters come from JAX and go back: one initialization, one evaluation. Hooks and the averager
are PyTorch's own, over gloo. PowerSGD has one bucket (its hook aborts on gloo with more), the
others have DDP's own buckets, whose exchange overlaps with the backward pass.
"""
# pyright: reportMissingImports=false

import contextlib
import functools
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import (
    default_hooks,
    post_localSGD_hook,
    powerSGD_hook,
)
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from experiments.bench_peers_cases import ADAMW, PERIOD

POWER_SGD_START = 2  # the least that DDP allows: its first two steps are dense
EPS = 1e-6  # of RMSNorm, as Flax has it


class Block(nn.Module):
    """Causal attention and an MLP of four times the width, each on a normalized input."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = (nn.RMSNorm(width, EPS) for _ in range(2))
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x):
        batch, length, width = x.shape
        qkv = self.qkv(self.norm_1(x)).view(batch, length, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(F.gelu(self.up(self.norm_2(x)), approximate="tanh"))


class Transformer(nn.Module):
    """The same names as the Flax model's."""

    def __init__(self, vocab_size: int, seq_len: int, num_layers: int, width: int, num_heads: int):
        super().__init__()
        self.embed = nn.Embedding(vocab_size, width)
        self.positions = nn.Embedding(seq_len, width)
        names = [f"block_{i:02d}" for i in range(num_layers)]
        self.blocks = nn.ModuleDict({name: Block(width, num_heads) for name in names})
        self.norm = nn.RMSNorm(width, EPS)
        self.head = nn.Linear(width, vocab_size, bias=False)

    def forward(self, tokens):
        """Tokens (B, L + 1) to the mean loss, nats a token."""
        x, targets = tokens[:, :-1], tokens[:, 1:]
        x = self.embed(x) + self.positions(torch.arange(x.shape[1]))
        for block in self.blocks.values():
            x = block(x)
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten().long())


def make_model(task) -> Transformer:
    """The model of a `config.task` section for bytes; its parameters are arbitrary."""
    m = task.model
    return Transformer(256, task.seq_len, m.num_layers, m.width, m.num_heads)


def _flax_name(name: str) -> tuple[str, bool]:
    """Flax's name of a parameter, and whether it is stored transposed."""
    path, _, kind = name.rpartition(".")
    leaf = path.rpartition(".")[2]
    if "norm" in leaf:
        return f"{path}.scale", False
    if leaf in ("embed", "positions"):
        return f"{path}.embedding", False
    assert kind == "weight", name
    return f"{path}.kernel", True


def load(model: nn.Module, arrays: dict[str, np.ndarray]) -> None:
    """Takes over parameters that `bench_peers_jax.export` gave; every one is used."""
    left = set(arrays)
    with torch.no_grad():
        for name, p in model.named_parameters():
            key, transposed = _flax_name(name)
            value = np.array(arrays[key].T if transposed else arrays[key])
            p.copy_(torch.from_numpy(value))
            left.remove(key)
    if left:
        raise ValueError(f"the model has no {', '.join(sorted(left))}")


def unload(named: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """Parameters (or gradients) by Flax's names and in its layout."""
    pairs = {_flax_name(name): value.detach().numpy() for name, value in named.items()}
    return {name: value.T if transposed else value for (name, transposed), value in pairs.items()}


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """AdamW with the hyperparameters of all rows; the learning rate is set in every step."""
    betas = (ADAMW["b1"], ADAMW["b2"])
    decay = ADAMW["weight_decay"]
    return torch.optim.AdamW(
        model.parameters(), 0.0, betas, ADAMW["eps"], weight_decay=decay, fused=True
    )


def connect(rank: int, hosts: int, address: str, interface: str) -> None:
    """Joins the gloo group, with one thread a process."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = interface
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=hosts)


@functools.cache
def alone_group():
    """This process's own group."""
    groups = [dist.new_group([rank]) for rank in range(dist.get_world_size())]
    return groups[dist.get_rank()]


class Peer:
    """A method of PyTorch on this host: `step`, and the same step `alone` and `local`.

    Args:
      hook: of the method.
      task: the `config.task` section.
      arrays: initial parameters.
      rate: the learning rate of each step.
      start: dense steps at first, of post-local SGD.
    """

    def __init__(self, hook: str, task, arrays: dict, rate: Callable[[int], float], start: int):
        make = lambda group: _Replica(hook, make_model(task), arrays, group, start)
        self._together, self._alone = make(None), None
        self._make_alone = lambda: make(alone_group())
        self._rate, self._steps = rate, 0

    def step(self, tokens: np.ndarray) -> str:
        """One step; returns what kind of step it was."""
        self._steps += 1
        return self._together.step(tokens, self._rate(self._steps - 1))

    def alone(self, tokens: np.ndarray) -> None:
        """The same step in a group of one: the hook's work without communication."""
        if self._alone is None:
            self._alone = self._make_alone()
        self._alone.step(tokens, 1e-4)

    def local(self, tokens: np.ndarray) -> None:
        """A step without an exchange, by DDP's `no_sync`."""
        self._together.step(tokens, 0.0, sync=False)

    def params(self) -> dict[str, np.ndarray]:
        """The mean of all hosts' parameters; all of them call it."""
        named = {k: p.detach().clone() for k, p in self._together.model.named_parameters()}
        for p in named.values():
            dist.all_reduce(p)
            p /= dist.get_world_size()
        return unload(named)


class _Replica:
    """Model, optimizer and hook in a process group."""

    def __init__(self, hook: str, model: nn.Module, arrays: dict, group, start: int):
        load(model, arrays)
        self.model, self._optimizer = model, make_optimizer(model)
        one_bucket = 1000 if hook.startswith("rank ") else None  # else DDP's own, which overlap
        self._ddp = DistributedDataParallel(model, process_group=group, bucket_cap_mb=one_bucket)
        self._averager: Any = None
        self._start = {"post_local": start, "float32": 0, "fp16": 0}.get(hook, POWER_SGD_START)
        self._done, self._hook = 0, hook
        self._register(hook, group)

    def _register(self, hook: str, group) -> None:
        if hook == "fp16":
            self._ddp.register_comm_hook(group, default_hooks.fp16_compress_hook)
        elif hook == "post_local":
            state = post_localSGD_hook.PostLocalSGDState(
                group, None, self._start, post_local_gradient_allreduce=False
            )
            self._ddp.register_comm_hook(state, post_localSGD_hook.post_localSGD_hook)
            self._averager = PeriodicModelAverager(PERIOD, self._start, group)
        elif hook.startswith("rank "):
            state = powerSGD_hook.PowerSGDState(
                group, int(hook.removeprefix("rank ")), start_powerSGD_iter=POWER_SGD_START
            )
            self._ddp.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
        elif hook != "float32":
            raise ValueError(f"hook must be float32, fp16, post_local or 'rank R', got {hook!r}")

    def step(self, tokens: np.ndarray, rate: float, sync: bool = True) -> str:
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.zero_grad()
        with contextlib.nullcontext() if sync else self._ddp.no_sync():
            loss = self._ddp(torch.from_numpy(tokens))
            loss.backward()
        self._optimizer.step()
        return self._meet() if sync else ""

    def _meet(self) -> str:
        """Averages the parameters where that is due; the kind of the step."""
        before, self._done = self._done, self._done + 1
        if self._averager is not None:
            self._averager.average_parameters(self.model.parameters())
            if before >= self._start:
                return "meeting" if (before - self._start) % PERIOD == 0 else "local"
        return "dense" if before < self._start else ""
