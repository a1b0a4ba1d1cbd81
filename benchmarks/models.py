"""The models beside which the benchmarks move pages."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp

from jax_kvpool import PageSpec

KV_8B = {"k": ((8, 128), "bfloat16"), "v": ((8, 128), "bfloat16")}


@dataclasses.dataclass(frozen=True)
class Gemms:
    """Two GEMMs of 2048 x 8192 x 8192 a layer, which read one number of the layer's KV: 64 layers are 128 GEMMs."""

    num_layers: int = 64
    page_size: int = 64

    @property
    def spec(self):
        return PageSpec.uniform(self.page_size, self.num_layers, {"kv": ((8, 128), "bfloat16")})

    def input(self):
        return jax.random.normal(jax.random.key(0), (2048, 8192), jnp.bfloat16)

    def weights(self, _):
        keys = jax.random.split(jax.random.key(1))
        return [(jax.random.normal(key, (8192, 8192), jnp.bfloat16) * 0.01) for key in keys]

    def layer(self, weights, layer, x, kv, pages):
        array = kv["kv"] if layer is None else kv["kv"][layer]
        return (x @ weights[0]) @ weights[1] * 0.01 + array[pages[0], 0, 0, :1] * 1e-6, kv


@dataclasses.dataclass(frozen=True)
class Llama8B:
    """The layers of an 8B model (Llama 3): new tokens on a cached prefix, in pages."""

    num_cached: int = 8192
    num_new: int = 1024
    page_size: int = 64
    num_layers: int = 32

    @property
    def spec(self):
        return PageSpec.uniform(self.page_size, self.num_layers, KV_8B)

    @property
    def flops(self):
        """Of one step: GEMMs, and attention of the new tokens to all before them."""
        gemms = 2 * self.num_new * (4096 * (6144 + 4096) + 3 * 4096 * 14336)
        attention = 4 * 32 * 128 * self.num_new * (self.num_cached + self.num_new / 2)
        return self.num_layers * (gemms + attention)

    def input(self):
        return jax.random.normal(jax.random.key(0), (self.num_new, 4096), jnp.bfloat16)

    def weights(self, is_stacked):
        shapes = {"qkv": (4096, 6144), "out": (4096, 4096), "up": (4096, 28672), "down": (14336, 4096)}

        @functools.partial(jax.jit, static_argnums=0)
        def new(shape, key):
            return jax.random.normal(key, shape, jnp.bfloat16) * shape[-2] ** -0.5

        keys = iter(jax.random.split(jax.random.key(1), 4 * self.num_layers))
        if is_stacked:
            return {n: jnp.stack([new(s, next(keys)) for _ in range(self.num_layers)]) for n, s in shapes.items()}
        return [{n: new(s, next(keys)) for n, s in shapes.items()} for _ in range(self.num_layers)]

    def layer(self, weights, layer, x, kv, pages):
        """`pages`: those of the prefix, then those of the new tokens. `layer` is None if kv is one layer's."""
        num_prefix = self.num_cached // self.page_size
        queries = _normed(x) @ weights["qkv"]
        q, k, v = (a.reshape(self.num_new, -1, 128) for a in jnp.split(queries, [4096, 5120], axis=-1))
        new = {"k": _rotated(k, self.num_cached), "v": v}
        at = pages[num_prefix:] if layer is None else (layer, pages[num_prefix:])
        kv = {n: a.at[at].set(new[n].reshape(-1, self.page_size, 8, 128)) for n, a in kv.items()}
        at = pages[:num_prefix] if layer is None else (layer, pages[:num_prefix])
        past = {n: a[at].reshape(self.num_cached, 8, 128) for n, a in kv.items()}
        mixed = _attention(_rotated(q, self.num_cached), past, new)
        x = x + mixed.reshape(self.num_new, 4096) @ weights["out"]
        gate, up = jnp.split(_normed(x) @ weights["up"], 2, axis=-1)
        return x + (jax.nn.silu(gate) * up) @ weights["down"], kv


def _attention(q, past, new):
    """Of new tokens to the past and, causally, to themselves: two flash attentions, put together by their sums."""
    parts = []
    for kv, is_causal in ((past, False), (new, True)):
        if kv["k"].shape[0] == 0:
            continue
        mixed, logsumexp = jax.nn.dot_product_attention(
            q[None], kv["k"][None], kv["v"][None], is_causal=is_causal, implementation="cudnn", return_residual=True
        )
        parts.append((mixed[0].astype(jnp.float32), logsumexp[0]))
    if len(parts) == 1:
        return parts[0][0].astype(q.dtype)
    (a, a_sum), (b, b_sum) = parts
    share = jax.nn.sigmoid(a_sum - b_sum)[..., None]
    return (a * share + b * (1 - share)).astype(q.dtype)


def _normed(x):
    wide = x.astype(jnp.float32)
    return (wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + 1e-5)).astype(x.dtype)


def _rotated(x, start):
    """Rotary embedding, half by half, of tokens `start` and on."""
    angles = (start + jnp.arange(x.shape[0]))[:, None, None] * jnp.exp(jnp.arange(64) * (-math.log(5e5) / 64))
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = [a * jnp.cos(angles) - b * jnp.sin(angles), b * jnp.cos(angles) + a * jnp.sin(angles)]
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)
