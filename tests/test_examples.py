"""The examples run, and the replay's checks find what they are there to find."""

import collections
import dataclasses
import gzip
import json
import lzma
import runpy
import sys
import types
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
WHOLE_TRACE = EXAMPLES / "data" / "conversation_trace.jsonl.xz"
SMALL_RUN = ["--requests", "100", "--block-tokens", "4", "--max-output", "3", "--check-every", "8"]


def test_quickstart(capsys):
    runpy.run_path(str(EXAMPLES / "quickstart.py"))
    assert "host page 42" in capsys.readouterr().out


def test_the_shipped_trace():
    lines = [json.loads(line) for line in trace_replay.TRACE.read_text().splitlines()]
    assert len(lines) == 300
    assert all(len(line["hash_ids"]) == -(-line["input_length"] // 512) >= 2 for line in lines)


def test_the_whole_trace():
    """The shipped selection is what its README says, of the trace that is shipped compressed."""
    lines = lzma.decompress(WHOLE_TRACE.read_bytes()).decode().splitlines()
    assert len(lines) == 12_031
    blocks = [json.loads(line)["hash_ids"] for line in lines]
    seen = collections.Counter(ids[1] for ids in blocks if len(ids) > 1)
    selected = [line for line, ids in zip(lines, blocks, strict=True) if len(ids) > 1 and seen[ids[1]] > 1]
    assert selected[:300] == trace_replay.TRACE.read_text().splitlines()


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.xz"])
def test_a_compressed_trace_is_the_plain_one(tmp_path, suffix):
    text = trace_replay.TRACE.read_bytes()
    path = tmp_path / f"trace{suffix}"
    path.write_bytes({".jsonl": bytes, ".jsonl.gz": gzip.compress, ".jsonl.xz": lzma.compress}[suffix](text))
    assert trace_replay.read_trace(path) == [json.loads(line) for line in text.splitlines()]
    assert trace_replay.read_trace(path, limit=7) == trace_replay.read_trace(path)[:7]


@pytest.mark.parametrize("conversations", [60, 1156])
def test_a_part_of_the_trace_keeps_whole_conversations(conversations):
    def second_block(entry):
        return entry["hash_ids"][1] if len(entry["hash_ids"]) > 1 else entry["hash_ids"][0]

    every = trace_replay.read_trace(WHOLE_TRACE)
    kept = trace_replay.read_trace(WHOLE_TRACE, conversations)
    conversations_kept = {second_block(entry) for entry in kept}
    assert kept == [entry for entry in every if second_block(entry) in conversations_kept]
    assert len(kept) == {60: 222, 1156: 6}[conversations]  # the same in every process, on every machine
    expected = len({second_block(entry) for entry in every}) / conversations
    assert abs(len(conversations_kept) - expected) < 3 * expected**0.5


def test_nothing_is_scaled_at_512_tokens():
    entries = trace_replay.read_trace(WHOLE_TRACE, 60, 40)
    tokens_of = {}
    for entry, request in zip(entries, trace_replay.requests_of(entries, 512, 32, 1000, seed=0), strict=True):
        assert len(request.prompt) == entry["input_length"]
        assert request.num_output == min(entry["output_length"], 32)
        for block, begin in zip(entry["hash_ids"], range(0, len(request.prompt), 512), strict=True):
            tokens = request.prompt[begin : begin + 512]
            known = tokens_of.setdefault(block, tokens)
            np.testing.assert_array_equal(tokens, known[: len(tokens)])
    assert len({tokens[:8].tobytes() for tokens in tokens_of.values()}) == len(tokens_of)


def test_replay_at_real_size(tmp_path, capsys):
    """Device pages for one longest request, so that no two fit at once, and for no second one to be computed in."""
    options = ["--trace", str(WHOLE_TRACE), "--conversations", "1156", "--block-tokens", "512", "--max-output", "3"]
    pools, path = ["--device-pages", "6", "--host-pages", "4"], tmp_path / "results.json"
    assert trace_replay.main([*options, *pools, "--prefill-tokens", "512", "--json", str(path)]) == 0
    results = json.loads(path.read_text())
    assert results["page_bytes"] == 1 << 20
    assert results["requests"] == results["trace_requests"] == 6
    assert results["tokens_computed"] + results["tokens_saved"] == 11_072
    assert results["checked_requests"] + results["without_room"] == results["prefix_hits"] >= 4
    assert results["checked_requests"] >= 3
    assert results["pages_loaded_checked"] == results["pages_loaded"] > 0
    assert results["pages_stored_checked"] == results["pages_stored"] > results["pages_evicted"] > 0
    with pytest.raises(SystemExit, match="--device-pages: expected 6 or more"):
        trace_replay.main([*options, "--device-pages", "5"])


def test_replay(tmp_path, capsys):
    path = tmp_path / "results.json"
    assert trace_replay.main([*SMALL_RUN, "--json", str(path)]) == 0
    assert "prompt tokens saved" in capsys.readouterr().out
    results = json.loads(path.read_text())
    assert results["requests"] == 100
    assert results["prefix_hits"] > 0 < results["tokens_from_device"]
    assert results["tokens_saved"] == results["tokens_from_device"] + results["tokens_from_host"]
    assert results["tokens_from_host"] == 4 * results["pages_loaded"] > 0
    assert results["pages_evicted"] > 0
    assert results["checked_requests"] == results["prefix_hits"] // 8
    assert results["checked_logits"] > results["checked_requests"]
    assert results["largest_difference"] <= results["tolerance"]


def test_the_prefix_alone_needs_the_last_page_again():
    """A prompt that is known to its last token has all but its last page."""
    requests = [request_of(range(24)) for _ in range(2)]
    trace_replay.CheckedServer(TINY, model.init_params(TINY, 0), 8, 4, 4, 8, check_every=1).run(requests)
    assert [request.num_cached for request in requests] == [0, 16]
    assert requests[0].output == requests[1].output


def test_a_host_pool_that_is_too_small():
    requests = [request_of(np.random.default_rng(i // 2).integers(0, 512, 45)) for i in range(12)]
    checked = trace_replay.CheckedServer(TINY, model.init_params(TINY, 0), 8, 6, 30, 3, check_every=1)
    checked.run(requests)
    assert checked.cache.metrics.evicted["host"] > 0 < checked.cache.metrics.evicted["device"]


@pytest.mark.parametrize("where", ["files", "mooncake", "files instead"])
def test_two_servers_share_a_prefix(where, tmp_path, capsys, monkeypatch):
    """All pages come from the store, and all answers are equal: the program fails otherwise."""
    pytest.importorskip("xxhash")
    import shared_prefix

    if where == "mooncake" and (reason := mooncake_servers.missing()):
        pytest.skip(reason)
    if where == "files instead":
        monkeypatch.setitem(sys.modules, "mooncake.store", None)
    options = ["--directory", str(tmp_path / "pages")] if where == "files" else []
    path = tmp_path / "results.json"
    assert shared_prefix.main(["--prompt", "256", "--page-size", "16", "--json", str(path), *options]) == 0
    output = capsys.readouterr().out
    assert "all four answers are equal" in output
    assert ("pages go by way of master" if where == "mooncake" else "pages go by way of directory") in output
    results = json.loads(path.read_text())
    assert results["first"]["num_found"] == 0
    assert results["second"]["num_found"] == results["second"]["num_pages"] == 15  # the last token is computed


def test_a_run_of_so_many_seconds(monkeypatch):
    """It begins nothing afterwards, and finishes what it began."""
    ticks = iter(range(10**6))
    monkeypatch.setattr(server, "time", types.SimpleNamespace(perf_counter=lambda: next(ticks)))
    requests = [request_of(np.random.default_rng(i).integers(0, 512, 45)) for i in range(12)]
    plain = server.Server(TINY, model.init_params(TINY, 0), 8, 6, 12, 20)
    finished = []
    num_served = plain.run(requests, lambda: finished.append(None), seconds=20)
    assert 1 < num_served < 12
    assert len(finished) == num_served
    assert [len(r.output) for r in requests] == [2] * num_served + [0] * (12 - num_served)
    assert plain.cache.match(plain.cache.open(np.zeros(1, np.int32))) == (0, 0, 0)
    seq = plain.cache.open(np.zeros(96, np.int32))
    assert plain.cache.admit(seq, 96)  # all twelve pages


def test_progress_without_a_terminal(monkeypatch, capsys):
    """A line now and then: requests take a second each here."""
    seconds = iter(range(10**6))
    monkeypatch.setattr(trace_replay, "time", types.SimpleNamespace(monotonic=lambda: next(seconds) / 2))
    with trace_replay.progress_bar(100) as progress:
        for _ in range(100):
            progress()
    lines = capsys.readouterr().err.splitlines()
    assert 3 <= len(lines) <= 10
    assert all(line.endswith(" of 100 requests") for line in lines)


def request_of(tokens):
    return server.Request(np.array(tokens, np.int32), num_output=2)


def prefilled(plain, tokens, num_tokens=None):
    """The sequence, and the logits after its last token."""
    seq = plain.cache.open(tokens)
    assert plain.cache.admit(seq, num_tokens or len(tokens))
    return seq, plain.prefill(seq, tokens)[0]


class TestChecks:
    """One byte, or one page, changes in host memory between store and load."""

    def serve(self, corrupt, kind=trace_replay.CheckedServer, dtype="float32", **checks):
        """A prompt, whose pages are stored, then others, for which they leave the device, then the prompt again."""
        config = dataclasses.replace(TINY, dtype=dtype)
        prompts = np.random.default_rng(0).integers(0, config.vocab, (3, 45))
        checked = kind(config, model.init_params(config, 0), 8, 6, 12, 20, ahead=1, **checks)
        checked.run([request_of(prompts[0])])
        checked.step([], 1)  # what is planned is stored
        corrupt(checked.host, list(range(5)))
        checked.run([request_of(prompt) for prompt in prompts[1:]])
        checked.run([request_of(prompts[0])])
        assert checked.cache.metrics.hits["host"] == 40
        return checked

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_nothing_changes(self, dtype):
        checked = self.serve(lambda host, pages: None, dtype=dtype)
        assert checked.num_hits == 1
        assert checked.num_logits == 2
        assert checked.num_loaded_checked == 5 <= checked.num_stored_checked

    def test_a_byte_flips(self):
        def flip(host, pages):
            host.record(next(page for page in range(20) if host.record(page).any()), writable=True)[1000] ^= 1

        with pytest.raises(trace_replay.MismatchError, match=r"loaded from host page .* not those that were computed"):
            self.serve(flip)

    @pytest.mark.parametrize(("slab", "which"), [("k", 0), ("v", -1)])
    @pytest.mark.parametrize("is_checked", [True, False])
    def test_a_byte_flips_in_a_sample(self, is_checked, slab, which):
        """Of a checked page it is seen, whichever byte; of another it is not: nobody looks at that page."""

        def flip(host, _):
            pages = {page for page in range(20) if host.record(page).any()}
            checked_pages = pages & servers[-1].host_digests.keys()
            assert 1 < len(checked_pages) < len(pages)
            page = sorted(checked_pages if is_checked else pages - checked_pages)[which]
            host.slab(page, slab, 3, writable=True).reshape(-1).view(np.uint8)[-1] ^= 1

        def kind(*args, **checks):
            servers.append(trace_replay.CheckedServer(*args, **checks))
            return servers[-1]

        servers = []
        checks = {"check_pages": 0.5, "check_every": 10**9}
        if is_checked:
            with pytest.raises(trace_replay.MismatchError, match=f"{slab} of layer 3: .* those that were computed"):
                self.serve(flip, kind, **checks)
        else:
            checked = self.serve(flip, kind, **checks)
            assert 0 < checked.num_loaded_checked < 5
            assert checked.num_logits == 0

    def test_a_store_that_goes_wrong(self):
        """Seen when it is stored, whether the page is ever loaded or not."""

        class Wrong(trace_replay.CheckedServer):
            def on_moved(self, moves):
                for _, page in trace_replay.pairs_of(moves.stores):
                    self.host.record(page, writable=True)[0] ^= 1
                super().on_moved(moves)

        with pytest.raises(trace_replay.MismatchError, match=r"host page \d+, k of layer 0: its bytes are not those"):
            self.serve(lambda host, pages: None, Wrong)

    def test_without_checks_nothing_is_read(self):
        class Busy(trace_replay.CheckedServer):
            def digests_on_device(self, pages):
                assert not len(pages), "pages are read back"
                return iter(())

        checked = self.serve(lambda host, pages: None, Busy, check_pages=0.0, check_every=10**9)
        assert not checked.device_digests and not checked.host_digests
        assert checked.num_loaded_checked == checked.num_stored_checked == checked.num_logits == 0

    def test_a_page_that_is_no_longer_checked(self):
        """The digest goes with the page that it is of: the next one in its place may not be checked."""

        class Noting(trace_replay.CheckedServer):
            def on_committed(self, pages):
                committed.extend(pages.tolist())
                super().on_committed(pages)

        checked = Noting(TINY, model.init_params(TINY, 0), 8, 6, 6, 5, ahead=1)
        draws = [0.0] * 5 + [1.0] * 20  # the first prompt is checked; the second one takes its place
        checked.check_pages, checked.draw = 0.5, types.SimpleNamespace(random=iter(draws).__next__)
        prompts = np.random.default_rng(0).integers(0, 512, (2, 45))
        for prompt, num_checked in zip(prompts, (5, 0), strict=True):
            committed = list[int]()
            checked.run([request_of(prompt)])
            checked.step([], 1)
            assert len(committed) == 5 and len(checked.device_digests.keys() & committed) == num_checked
            assert len(checked.host_digests) == num_checked

    def test_logits_show_a_wrong_page(self):
        """Were the bytes not compared, recomputation would still find it. But not two pages swapped: keys carry their
        position, and attention does not mind the order."""

        class Blind(trace_replay.CheckedServer):
            def on_moved(self, moves):
                pass

        def mix_up(host, _):
            first, second = [page for page in range(20) if host.record(page).any()][:2]
            host.record(first, writable=True)[:] = host.record(second)

        with pytest.raises(trace_replay.MismatchError, match="recomputed logits"):
            self.serve(mix_up, Blind)

    def test_the_program_fails(self, monkeypatch, capsys):
        def flip_then_look(self, moves):
            for _, page in trace_replay.pairs_of(moves.stores):
                self.host.record(page, writable=True)[0] ^= 0x80
            return look(self, moves)

        look = trace_replay.CheckedServer.on_moved
        monkeypatch.setattr(trace_replay.CheckedServer, "on_moved", flip_then_look)
        assert trace_replay.main(SMALL_RUN) == 1
        assert "FAILED: host page" in capsys.readouterr().err


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
    np.random.default_rng(2).shuffle(plain.cache._tiers.free_device._stack)  # pages in no order
    other, _ = prefilled(plain, tokens[600:650])
    seq, first = prefilled(plain, tokens[:697], num_tokens=700)
    got = [first]
    got += [plain.step([([0], 50, other), ([tokens[at]], at, seq)], 1)[0][1] for at in range(697, 700)]
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
    logits = [prefilled(server.Server(TINY, p, 8, 5, 5, 1), prompt)[1] for p in (params, loaded)]
    np.testing.assert_array_equal(*logits)

    del tensors["model.layers.2.mlp.up_proj.weight"]
    safetensors.save_file(tensors, tmp_path / "broken.safetensors")
    with pytest.raises(ValueError, match=r"no tensor model\.layers\.2\.mlp\.up_proj\.weight"):
        model.load_params(TINY, tmp_path / "broken.safetensors")


def test_the_readme_shows_the_quickstart():
    root = Path(__file__).parent.parent
    assert (root / "examples" / "quickstart.py").read_text() in (root / "README.md").read_text()
