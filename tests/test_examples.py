"""The examples run, and the replay's checks find what they are there to find."""

import dataclasses
import json
import random
import runpy
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import mooncake_servers
import numpy as np
import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))

import model  # noqa: E402
import server  # noqa: E402
import trace_replay  # noqa: E402

TINY = model.MODELS["tiny"]
SMALL_RUN = ["--requests", "100", "--block-tokens", "4", "--max-output", "3", "--check-every", "8"]


def test_quickstart(capsys):
    runpy.run_path(str(EXAMPLES / "quickstart.py"))
    assert "host page 42" in capsys.readouterr().out


def test_the_shipped_trace():
    lines = [json.loads(line) for line in trace_replay.TRACE.read_text().splitlines()]
    assert len(lines) == 300
    assert all(len(line["hash_ids"]) == -(-line["input_length"] // 512) >= 2 for line in lines)


def test_replay(tmp_path, capsys):
    path = tmp_path / "results.json"
    assert trace_replay.main([*SMALL_RUN, "--json", str(path)]) == 0
    assert "prompt tokens saved" in capsys.readouterr().out
    results = json.loads(path.read_text())
    assert results["requests"] == 100
    assert results["pages_loaded"] > results["prefix_hits"] > 0
    assert results["tokens_saved"] == 4 * results["pages_loaded"]
    assert results["pages_evicted"] > 0
    assert results["checked_requests"] == results["prefix_hits"] // 8
    assert results["checked_logits"] > results["checked_requests"]
    assert results["largest_difference"] <= results["tolerance"]


def test_the_prefix_alone_needs_the_last_page_again():
    """A prompt that is known to its last token loads all but its last page."""
    requests = [request_of(range(24)) for _ in range(2)]
    trace_replay.CheckedServer(TINY, model.init_params(TINY, 0), 8, 4, 8, 8, check_every=1).run(requests)
    assert [(r.num_loaded, r.num_stored) for r in requests] == [(0, 3), (2, 0)]
    assert requests[0].output == requests[1].output


def test_a_host_pool_that_is_too_small():
    requests = [request_of(np.random.default_rng(i // 2).integers(0, 512, 45)) for i in range(12)]
    checked = trace_replay.CheckedServer(TINY, model.init_params(TINY, 0), 8, 6, 30, 3, check_every=1)
    checked.run(requests)
    assert all(r.num_loaded + r.num_stored <= 3 for r in requests)
    assert checked.cache.num_evicted > 0


@pytest.mark.parametrize("where", ["files", "mooncake"])
def test_two_servers_share_a_prefix(where, tmp_path, capsys):
    """All pages come from the store, and all answers are equal: the program fails otherwise."""
    pytest.importorskip("xxhash")
    import shared_prefix

    if where == "mooncake" and (reason := mooncake_servers.missing()):
        pytest.skip(reason)
    options = ["--directory", str(tmp_path / "pages")] if where == "files" else []
    path = tmp_path / "results.json"
    assert shared_prefix.main(["--prompt", "256", "--page-size", "16", "--json", str(path), *options]) == 0
    assert "all four answers are equal" in capsys.readouterr().out
    results = json.loads(path.read_text())
    assert results["first"]["num_found"] == 0
    assert results["second"]["num_found"] == results["second"]["num_pages"] == 16


def request_of(tokens):
    tokens = np.array(tokens, np.int32)
    prefixes = [tokens[: end + 8].tobytes() for end in range(0, len(tokens) - 7, 8)]
    return server.Request(tokens, prefixes, num_output=2)


class TestChecks:
    """One byte, or one page, changes in host memory between store and load."""

    def serve(self, corrupt, kind=trace_replay.CheckedServer, dtype="float32"):
        config = dataclasses.replace(TINY, dtype=dtype)
        prompt = np.random.default_rng(0).integers(0, config.vocab, 45)
        checked = kind(config, model.init_params(config, 0), 8, 6, 12, 20, check_every=1)
        checked.run([request_of(prompt)])
        corrupt(checked.host, list(checked.cache.pages.values()))
        checked.run([request_of(prompt)])
        return checked

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_nothing_changes(self, dtype):
        checked = self.serve(lambda host, pages: None, dtype=dtype)
        assert checked.num_hits == 1
        assert checked.num_logits == 2

    def test_a_byte_flips(self):
        def flip(host, pages):
            host.record(pages[0], writable=True)[1000] ^= 1

        with pytest.raises(trace_replay.MismatchError, match="not those that were stored"):
            self.serve(flip)

    def test_logits_show_a_wrong_page(self):
        """Were the bytes not compared, recomputation would still find it. But not two pages swapped: keys carry their
        position, and attention does not mind the order."""

        class Blind(trace_replay.CheckedServer):
            def on_loaded(self, device_pages, host_pages):
                pass

        def mix_up(host, pages):
            host.record(pages[0], writable=True)[:] = host.record(pages[1])

        with pytest.raises(trace_replay.MismatchError, match="recomputed logits"):
            self.serve(mix_up, Blind)

    def test_the_program_fails(self, monkeypatch, capsys):
        def flip_then_look(self, device_pages, host_pages):
            for page in host_pages:
                self.host.record(page, writable=True)[0] ^= 0x80
            return look(self, device_pages, host_pages)

        look = trace_replay.CheckedServer.on_loaded
        monkeypatch.setattr(trace_replay.CheckedServer, "on_loaded", flip_then_look)
        assert trace_replay.main(SMALL_RUN) == 1
        assert "FAILED: host page" in capsys.readouterr().err


def test_prefix_cache():
    """A prefix is known only if all shorter ones are, no page has two owners, pinned ones stay."""
    rng = random.Random(0)
    cache = server.PrefixCache(12)
    for _ in range(2000):
        path = [rng.randrange(2) for _ in range(rng.randrange(8))]
        prefixes = [bytes(path[: i + 1]) for i in range(len(path))]
        if rng.random() < 0.5:
            known = cache.match(prefixes)
            assert cache.pages.keys() >= set(prefixes[: len(known)])
        else:
            before = dict(cache.pages)
            new = cache.insert(prefixes)
            assert not {prefixes[i] for i in new} & before.keys()
        pinned = set(cache._pinned)
        if rng.random() < 0.5:
            cache.unpin()
        else:
            cache.insert([b"\xff" + bytes([rng.randrange(2)])])  # has no shorter prefix here
            assert pinned <= cache.pages.keys()
        assert len(set(cache.pages.values())) == len(cache.pages) <= 12
        assert all(key[:-1] in cache.pages for key in cache.pages if len(key) > 1 and key[0] != 0xFF)


def dense_logits(params, tokens):
    """The same decoder without pages, chunks or batches: float32 (tokens, vocab)."""

    def norm(x, weight):
        return x / jnp.sqrt((x * x).mean(-1, keepdims=True) + TINY.rms_epsilon) * weight

    def rope(x):
        half = TINY.head_dim // 2
        angles = jnp.outer(jnp.arange(len(tokens)), TINY.rope_theta ** (-jnp.arange(half) / half))[:, None]
        turned = jax.lax.complex(x[..., :half], x[..., half:]) * jnp.exp(1j * angles)
        return jnp.concatenate([turned.real, turned.imag], -1)

    x = params["embedding"][tokens]
    for layer in range(TINY.num_layers):
        w = {name: value[layer] for name, value in params["layers"].items()}
        h = norm(x, w["attention_norm"])
        q, k, v = ((h @ w[name]).reshape(len(tokens), -1, TINY.head_dim) for name in "qkv")
        k, v = (jnp.repeat(a, TINY.num_heads // TINY.num_kv_heads, axis=1) for a in (rope(k), v))
        scores = jnp.einsum("thd,shd->hts", rope(q), k) / TINY.head_dim**0.5
        scores = jnp.where(jnp.tri(len(tokens), dtype=bool), scores, -jnp.inf)
        x = x + jnp.einsum("hts,shd->thd", jax.nn.softmax(scores), v).reshape(len(tokens), -1) @ w["o"]
        h = norm(x, w["ffn_norm"])
        x = x + (jax.nn.silu(h @ w["gate"]) * (h @ w["up"])) @ w["down"]
    return norm(x, params["norm"]) @ params["head"]


def test_the_decoder_against_a_dense_one():
    """More than one prefill step and more than one turn of the attention's loop, then decoding."""
    params = model.init_params(TINY, 1)
    tokens = np.random.default_rng(1).integers(0, TINY.vocab, 700).astype(np.int32)
    expected = np.asarray(dense_logits(params, tokens))
    plain = server.Server(TINY, params, 16, 44, 60, 4)
    pages, others = np.split(np.random.default_rng(2).permutation(60), [44])
    got = [plain.prefill(tokens[:697], pages)[0]]
    got += [plain.step([([0], 0, others), ([tokens[at]], at, pages)], 1)[0][1] for at in range(697, 700)]
    np.testing.assert_allclose(np.stack(got), expected[696:], atol=1e-4 * np.abs(expected).max())


def test_weights_from_a_file(tmp_path):
    safetensors = pytest.importorskip("safetensors.numpy")
    params = model.init_params(TINY, 3)
    tensors = {}
    for name, weight in {**params, **params["layers"]}.items():
        if name == "layers":
            continue
        target = model.HUGGING_FACE_NAMES[name]
        layers = enumerate(weight) if "{}" in target else [(0, weight)]
        for layer, value in layers:
            value = np.asarray(value if name == "embedding" else value.T)
            tensors[target.format(layer)] = np.ascontiguousarray(value)
    names = sorted(tensors)
    safetensors.save_file({n: tensors[n] for n in names[:9]}, tmp_path / "model-00001-of-00002.safetensors")
    safetensors.save_file({n: tensors[n] for n in names[9:]}, tmp_path / "model-00002-of-00002.safetensors")
    loaded = model.load_params(TINY, tmp_path)
    jax.tree.map(np.testing.assert_array_equal, loaded, params)

    prompt = np.arange(40, dtype=np.int32)
    logits = [server.Server(TINY, p, 8, 5, 5, 1).prefill(prompt, np.arange(5))[0] for p in (params, loaded)]
    np.testing.assert_array_equal(*logits)

    del tensors["model.layers.2.mlp.up_proj.weight"]
    safetensors.save_file(tensors, tmp_path / "broken.safetensors")
    with pytest.raises(ValueError, match=r"no tensor model\.layers\.2\.mlp\.up_proj\.weight"):
        model.load_params(TINY, tmp_path / "broken.safetensors")


def test_the_readme_shows_the_quickstart():
    root = Path(__file__).parent.parent
    assert (root / "examples" / "quickstart.py").read_text() in (root / "README.md").read_text()
