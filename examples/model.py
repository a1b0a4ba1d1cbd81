"""A Llama 3 decoder over a paged KV cache, in plain JAX: GQA, RoPE, RMSNorm, SwiGLU.

Its KV lives in a `DevicePool` of layout "stacked": arrays "k" and "v" of shape
`(num_layers, num_pages, page_size, kv_heads, head_dim)`. The layers are a `lax.scan` with the pool in the carry, where
XLA updates it in place (as `xs` and `ys` of the scan it would be copied), so 32 layers compile as fast as one.

Shapes: B sequences of T new tokens each, P pages in a sequence's page table, D the hidden size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jax_kvpool import DevicePool, PageSpec

Params = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    hidden: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    ffn: int
    vocab: int
    rope_theta: float
    dtype: str
    prefill_tokens: int  # the T of a prefill step
    # Attention reads so many past tokens at once: its scores take B * heads * T * so many floats, whatever the context.
    keys_at_a_time: int
    flash_prefill: bool = False  # by cuDNN: on NVIDIA GPUs, bfloat16; three times as fast on an H100
    rms_epsilon: float = 1e-5

    @property
    def head_dim(self) -> int:
        return self.hidden // self.num_heads

    def page_spec(self, page_size: int) -> PageSpec:
        token = ((self.num_kv_heads, self.head_dim), self.dtype)
        return PageSpec.uniform(page_size, self.num_layers, {"k": token, "v": token})


MODELS = {
    "tiny": ModelConfig(128, 4, 4, 2, 384, 512, 10_000.0, "float32", 128, keys_at_a_time=512),
    "8b": ModelConfig(4096, 32, 32, 8, 14_336, 128_256, 500_000.0, "bfloat16", 512, 2048, flash_prefill=True),
}


def weight_shapes(config: ModelConfig) -> Params:
    """The shape of every weight. Matrices are `(in, out)`; those of a layer have the layer in front."""
    d, q, kv = config.hidden, config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    layer = {
        "attention_norm": (d,),
        "q": (d, q),
        "k": (d, kv),
        "v": (d, kv),
        "o": (q, d),
        "ffn_norm": (d,),
        "gate": (d, config.ffn),
        "up": (d, config.ffn),
        "down": (config.ffn, d),
    }
    return {
        "embedding": (config.vocab, d),
        "layers": {name: (config.num_layers, *shape) for name, shape in layer.items()},
        "norm": (d,),
        "head": (d, config.vocab),
    }


def init_params(config: ModelConfig, seed: int) -> Params:
    """Normal weights, scaled so that activations keep a variance of about one; norms of ones."""

    def weight(path: Any, shape: tuple[int, ...], key: jax.Array) -> jax.Array:
        name = path[-1].key
        if name.endswith("norm"):
            return jnp.ones(shape, config.dtype)
        scale = 1.0 if name == "embedding" else shape[-2] ** -0.5
        return jax.random.normal(key, shape, config.dtype) * jnp.asarray(scale, config.dtype)

    @jax.jit  # one program: quick to compile, and no float32 copy of the weights on the way
    def init(key: jax.Array) -> Params:
        shapes, tree = jax.tree.flatten(weight_shapes(config), is_leaf=_is_shape)
        keys = jax.tree.unflatten(tree, list(jax.random.split(key, len(shapes))))
        return jax.tree_util.tree_map_with_path(weight, weight_shapes(config), keys, is_leaf=_is_shape)

    return init(jax.random.key(seed, impl="rbg"))


def _is_shape(node: Any) -> bool:
    return isinstance(node, tuple)


HUGGING_FACE_NAMES = {
    "embedding": "model.embed_tokens.weight",
    "norm": "model.norm.weight",
    "head": "lm_head.weight",
    "attention_norm": "model.layers.{}.input_layernorm.weight",
    "q": "model.layers.{}.self_attn.q_proj.weight",
    "k": "model.layers.{}.self_attn.k_proj.weight",
    "v": "model.layers.{}.self_attn.v_proj.weight",
    "o": "model.layers.{}.self_attn.o_proj.weight",
    "ffn_norm": "model.layers.{}.post_attention_layernorm.weight",
    "gate": "model.layers.{}.mlp.gate_proj.weight",
    "up": "model.layers.{}.mlp.up_proj.weight",
    "down": "model.layers.{}.mlp.down_proj.weight",
}
"""Hugging Face's names for Llama; its matrices are `(out, in)`."""


def load_params(config: ModelConfig, path: str | Path) -> Params:
    """Reads a safetensors file of Llama layout, or a directory of them. Raises `ValueError` if one does not fit."""
    from safetensors import safe_open

    path = Path(path)
    files = [
        safe_open(file, framework="flax")  # JAX arrays: NumPy alone has no bfloat16
        for file in (sorted(path.glob("*.safetensors")) if path.is_dir() else [path])
    ]
    file_of = {name: file for file in files for name in file.keys()}  # noqa: SIM118 (a safetensors file is no dict)

    def tensor(name: str, shape: tuple[int, ...]) -> jax.Array:
        if name not in file_of:
            raise ValueError(f"{path}: no tensor {name}")
        value = file_of[name].get_tensor(name)
        if name != HUGGING_FACE_NAMES["embedding"]:
            value = value.T
        if value.shape != shape:
            raise ValueError(f"{path}: {name} has shape {value.shape}, the model needs {shape}")
        return value.astype(config.dtype)

    def weight(tree_path: Any, shape: tuple[int, ...]) -> jax.Array:
        name = HUGGING_FACE_NAMES[tree_path[-1].key]
        if "{}" in name:
            return jnp.stack([tensor(name.format(layer), shape[1:]) for layer in range(config.num_layers)])
        if name == HUGGING_FACE_NAMES["head"] and name not in file_of:  # tied to the embedding
            return tensor(HUGGING_FACE_NAMES["embedding"], shape[::-1]).T
        return tensor(name, shape)

    return jax.tree_util.tree_map_with_path(weight, weight_shapes(config), is_leaf=_is_shape)


def forward(
    config: ModelConfig,
    params: Params,
    device: DevicePool,
    tokens: jax.Array,
    starts: jax.Array,
    lengths: jax.Array,
    page_tables: jax.Array,
) -> tuple[jax.Array, DevicePool]:
    """Computes new tokens: writes their keys and values into the pool and gives each sequence's last logits.

    Args:
      device: the pool; holds the KV of all tokens before `starts`.
      tokens: int32 (B, T), padded at the end.
      starts: int32 (B,), the position of the first new token.
      lengths: int32 (B,), how many of the T tokens are there; 0 for a row that is padding.
      page_tables: int32 (B, P), the device pages of each sequence in order, padded with -1.

    Returns:
      float32 logits (B, vocab) after the last token of each row (nothing of meaning for a row of padding), the pool.
    """
    page_size = device.spec.page_size
    batch, num_new = tokens.shape
    positions = starts[:, None] + jnp.arange(num_new, dtype=jnp.int32)  # (B, T)
    written = jnp.take_along_axis(page_tables, positions // page_size, axis=1, mode="clip")
    # Padding must write nowhere; a -1 would wrap round to the last page.
    written = jnp.where(jnp.arange(num_new) < lengths[:, None], written, device.num_pages)
    rotate = _rope(config, positions)
    if config.flash_prefill and num_new > 1:
        attend = _flash_attention(positions, lengths, page_tables, page_size)
    else:
        attend = _paged_attention(positions, lengths, page_tables, page_size, config.keys_at_a_time)

    def layer(carry: Any, weights: Params) -> tuple[Any, None]:
        x, k_pool, v_pool, index = carry
        h = _rms_norm(x, weights["attention_norm"], config.rms_epsilon)
        q = rotate((h @ weights["q"]).reshape(batch, num_new, config.num_heads, -1))
        k = rotate((h @ weights["k"]).reshape(batch, num_new, config.num_kv_heads, -1))
        v = (h @ weights["v"]).reshape(batch, num_new, config.num_kv_heads, -1)
        k_pool = k_pool.at[index, written, positions % page_size].set(k, mode="drop")
        v_pool = v_pool.at[index, written, positions % page_size].set(v, mode="drop")
        x = x + attend(q, k_pool, v_pool, index) @ weights["o"]
        h = _rms_norm(x, weights["ffn_norm"], config.rms_epsilon)
        x = x + (jax.nn.silu(h @ weights["gate"]) * (h @ weights["up"])) @ weights["down"]
        return (x, k_pool, v_pool, index + 1), None

    x = params["embedding"][tokens]  # (B, T, D)
    carry = (x, device.arrays["k"], device.arrays["v"], jnp.int32(0))
    (x, k_pool, v_pool, _), _ = lax.scan(layer, carry, params["layers"])
    last = jnp.take_along_axis(x, jnp.maximum(lengths - 1, 0)[:, None, None], axis=1)[:, 0]
    logits = jnp.matmul(
        _rms_norm(last, params["norm"], config.rms_epsilon), params["head"], preferred_element_type=jnp.float32
    )
    return logits, device.with_arrays({"k": k_pool, "v": v_pool})


def _rms_norm(x: jax.Array, weight: jax.Array, epsilon: float) -> jax.Array:
    x32 = x.astype(jnp.float32)
    return (x32 * lax.rsqrt(jnp.mean(x32 * x32, -1, keepdims=True) + epsilon)).astype(x.dtype) * weight


def _rope(config: ModelConfig, positions: jax.Array) -> Callable[[jax.Array], jax.Array]:
    """Rotates `(B, T, heads, head_dim)`; dimension i goes with i + head_dim / 2, as Hugging Face's weights want it."""
    half = config.head_dim // 2
    frequencies = config.rope_theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = positions[..., None, None].astype(jnp.float32) * frequencies
    cos, sin = jnp.cos(angles), jnp.sin(angles)  # (B, T, 1, head_dim / 2)

    def rotate(x: jax.Array) -> jax.Array:
        a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
        return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)

    return rotate


def _flash_attention(
    positions: jax.Array, lengths: jax.Array, page_tables: jax.Array, page_size: int
) -> Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]:
    """As `_paged_attention`, by cuDNN, over a copy of all the pages of the table. It computes no further than the
    sequences go, so what a short one costs in a wide table is the copy."""
    tables = jnp.maximum(page_tables, 0)
    at = jnp.arange(page_tables.shape[1] * page_size, dtype=jnp.int32)
    # One for all layers. Its own causal mask would have the first query see the first key alone.
    bias = jnp.where(at <= positions[:, :, None], 0.0, -1e30).astype(jnp.bfloat16)[:, None]

    def attend(q: jax.Array, k_pool: jax.Array, v_pool: jax.Array, layer: jax.Array) -> jax.Array:
        k, v = (pool[layer, tables].reshape(q.shape[0], -1, *pool.shape[-2:]) for pool in (k_pool, v_pool))
        last = positions[:, 0] + lengths
        mixed = jax.nn.dot_product_attention(
            q, k, v, bias, key_value_seq_lengths=jnp.maximum(last, 1), implementation="cudnn"
        )
        return mixed.reshape(*q.shape[:2], -1)

    return attend


def _paged_attention(
    positions: jax.Array, lengths: jax.Array, page_tables: jax.Array, page_size: int, keys_at_a_time: int
) -> Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]:
    """Causal attention of new tokens to all tokens before them, over the page table a few pages at a time.

    An online softmax (Milakov and Gimelshein 2018; FlashAttention) keeps the running maximum, sum and weighted values,
    so the memory does not grow with the context. The loop ends with the longest sequence of the batch.
    """
    pages = min(max(keys_at_a_time // page_size, 1), page_tables.shape[1])
    missing = -page_tables.shape[1] % pages
    tables = jnp.maximum(jnp.pad(page_tables, ((0, 0), (0, missing))), 0)  # whatever padding reads is masked
    num_groups = (jnp.max(positions[:, 0] + lengths) + pages * page_size - 1) // (pages * page_size)

    def attend(q: jax.Array, k_pool: jax.Array, v_pool: jax.Array, layer: jax.Array) -> jax.Array:
        batch, num_new, num_heads, dim = q.shape
        kv_heads = k_pool.shape[-2]
        q = (q * dim**-0.5).astype(q.dtype).reshape(batch, num_new, kv_heads, num_heads // kv_heads, dim)
        q = q.transpose(0, 2, 3, 1, 4)  # (B, kv_heads, G, T, dim), so that the scores come out with S last

        def group(index: jax.Array, carry: Any) -> Any:
            maximum, total, values = carry  # (B, kv_heads, G, T), the same, (B, kv_heads, G, T, dim)
            ids = lax.dynamic_slice_in_dim(tables, index * pages, pages, axis=1)
            k = k_pool[layer, ids].reshape(batch, -1, kv_heads, dim)  # (B, S, kv_heads, dim)
            v = v_pool[layer, ids].reshape(batch, -1, kv_heads, dim)
            scores = jnp.einsum("bkgtd,bskd->bkgts", q, k, preferred_element_type=jnp.float32)
            at = index * pages * page_size + jnp.arange(pages * page_size, dtype=jnp.int32)
            visible = (at <= positions[:, :, None])[:, None, None]  # (B, 1, 1, T, S)
            scores = jnp.where(visible, scores, -1e30)  # not -inf: a group may hold nothing for a row
            new_maximum = jnp.maximum(maximum, scores.max(-1))
            weights = jnp.exp(scores - new_maximum[..., None])
            shrink = jnp.exp(maximum - new_maximum)
            summed = jnp.einsum("bkgts,bskd->bkgtd", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
            return new_maximum, total * shrink + weights.sum(-1), values * shrink[..., None] + summed

        shape = (batch, kv_heads, num_heads // kv_heads, num_new)
        start = jnp.full(shape, -1e30), jnp.zeros(shape), jnp.zeros((*shape, dim))
        _, total, values = lax.fori_loop(0, num_groups, group, start)
        mixed = (values / total[..., None]).astype(q.dtype)
        return mixed.transpose(0, 3, 1, 2, 4).reshape(batch, num_new, num_heads * dim)

    return attend
