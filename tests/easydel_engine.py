"""A tiny real engine of EasyDeL (eSurge 0.3.0) on a CPU. Tests are skipped where that is not installed."""

import contextlib
import importlib.util
import os
import sys
import types
import warnings

import pytest

if importlib.util.find_spec("easydel") is None:
    pytest.skip("needs easydel 0.3.0: scripts/test-easydel installs it", allow_module_level=True)

os.environ["EASYDEL_AUTO"] = "0"
os.environ["HF_HUB_OFFLINE"] = "1"

# Without torch, `transformers` has not these five modules, of which EasyDeL takes names while it is imported.
for _name in ("glm4v_moe", "phimoe", "qwen3_next", "qwen3_5_moe", "llama4"):
    _module = types.ModuleType(f"transformers.models.{_name}.modeling_{_name}")
    sys.modules[_module.__name__] = _module
    setattr(importlib.import_module(f"transformers.models.{_name}"), f"modeling_{_name}", _module)

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import easydel as ed
    import flax.nnx as nnx
    import jax
    import jax.numpy as jnp
    import tokenizers
    import transformers

PAGE_SIZE, MAX_MODEL_LEN, WORDS = 16, 512, 400


def model(num_pages, seed=0):
    """With so many pages, where its own would take 4 GiB on a CPU."""

    class Model(ed.LlamaForCausalLM):
        def create_ragged_page_cache_config(self, *args, **options):
            config = super().create_ragged_page_cache_config(*args, **options)
            config.num_pages = num_pages
            return config

    config = ed.LlamaConfig(
        vocab_size=WORDS + 8,
        hidden_size=256,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=128,
        max_position_embeddings=MAX_MODEL_LEN,
        initializer_range=0.3,
        attn_mechanism="ragged_page_attention_v3",
        attn_dtype=jnp.float32,
        kvdtype=jnp.float32,
    )
    return Model(config, dtype=jnp.float32, param_dtype=jnp.float32, rngs=nnx.Rngs(seed))


def write_tokenizer(folder):
    """A word is a token: `w0` to `w399`."""
    words = ["<unk>", "<eos>", "<pad>", *(f"w{i}" for i in range(WORDS))]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, "<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<eos>", pad_token="<pad>"
    )
    fast.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    fast.save_pretrained(folder)
    return str(folder)


@contextlib.contextmanager
def engine(tokenizer, num_pages=33, seed=0, max_num_seqs=3, **options):
    """Three sequences at once, so that none is preempted: behind that, with `async_scheduling`, their tokens are wrong,
    also without a cache."""
    made = ed.eSurge(
        model(num_pages, seed),
        tokenizer=tokenizer,
        dtype=jnp.float32,
        max_model_len=MAX_MODEL_LEN,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=64,
        min_token_pad=64,
        page_size=PAGE_SIZE,
        silent_mode=True,
        **options,
    )
    try:
        yield made
    finally:
        stop(made)
        made._worker_manager.shutdown()


def stop(made):
    """`terminate`, which would wait for 5 seconds for a thread that waits for a lock it has."""
    made._scheduler_running = False
    if made._scheduler_thread is not None:
        made._scheduler_thread.join()
    made.terminate()


def answers(made, prompts, num_tokens=24):
    """Greedy, in the order of the prompts: `generate` has them in that of their ends."""
    params = ed.SamplingParams(max_tokens=num_tokens, temperature=0.0, ignore_eos=True)
    names = [f"request-{id(prompts)}-{i}" for i in range(len(prompts))]
    done = {out.request_id: out for out in made.generate(prompts, params, request_id=names, use_tqdm=False)}
    return [list(done[name].outputs[0].token_ids) for name in names]


def prompt(*seeds, num=40):
    """Words; of equal first seeds, equal ones at the beginning."""
    rng = jax.random.randint
    return " ".join(f"w{int(i)}" for seed in seeds for i in rng(jax.random.PRNGKey(seed), (num,), 0, WORDS))
