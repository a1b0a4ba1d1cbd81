"""The example server on a `KVCache` of three tiers: many conversations at once, aborts, a restart. Whatever it answers
is what a decoder without pages answers."""

import random

import jax
import numpy as np
import pytest
from test_examples import TINY, dense_logits, model, server

pytest.importorskip("xxhash", reason="page stores need xxhash")

from jax_kvpool.stores import FileStore, Namespace

PAGE, MOST_TOKENS = 8, 160
TOLERANCE = 1e-4  # of the largest logit, as in examples/trace_replay.py


class Server(server.Server):
    """One whose users go away: some while their prompt waits for the store, some in the midst of their answer."""

    def __init__(self, params, directory, seed):
        def open_stores(host):
            return [FileStore(Namespace(host.spec, host.layout, "m"), directory)]

        self.rng = random.Random(seed)
        self.requests, self.started = [], []
        self.num_aborted = 0
        pages = -(-MOST_TOKENS // PAGE)
        super().__init__(TINY, params, PAGE, pages, 45, 60, open_stores=open_stores, store_seconds=20, ahead=0.5)

    def serve(self, requests):
        self.requests, self.started = requests, []
        assert self.run(requests) == len(requests)

    def on_starting(self, request):
        request.keeps_logits = True
        self.started.append(request)

    def on_moved(self, moves):
        answering = [r for r in self.started if r.seq is not None and 0 < len(r.output) < r.num_output - 1]
        if answering and self.rng.random() < 0.1:
            request = self.rng.choice(answering)
            request.num_output = len(request.output) + 1  # of this step, behind which it ends
            self.num_aborted += 1
        waiting = [r for r in self.requests if r not in self.started and r.seq is not None]
        if waiting and self.rng.random() < 0.1:
            request = self.rng.choice(waiting)
            if request.seq._lease is not None:
                self.cache.release(request.seq)
                self.num_aborted += 1
            request.seq = None  # and comes again

    def on_finished(self, request):
        tokens = np.zeros(MOST_TOKENS, np.int32)
        tokens[: len(request.prompt) + len(request.output)] = [*request.prompt, *request.output]
        expected = np.asarray(reference(self.params, tokens))[len(request.prompt) - 1 :]
        for logits, token, of_reference in zip(request.logits, request.output, expected, strict=False):
            largest = np.abs(of_reference).max()
            assert np.abs(logits - of_reference).max() <= TOLERANCE * largest
            second, first = np.sort(of_reference)[-2:]
            if first - second > TOLERANCE * largest:
                assert token == of_reference.argmax()  # given the tokens before, which are the server's own

    def close(self):
        self.step([], 1)  # what is planned is stored
        self.cache.close(flush=20)
        for store in self.stores:
            store.close()
        self.host.close()


@jax.jit
def reference(params, tokens):
    return dense_logits(params, tokens)


def test_many_conversations_at_once(tmp_path):
    params = model.init_params(TINY, 1)
    rng = np.random.default_rng(0)
    system = rng.integers(0, TINY.vocab, 21)
    conversations = [[*system, *rng.integers(0, TINY.vocab, rng.integers(5, 30))] for _ in range(12)]
    hits, num_aborted = {"device": 0, "host": 0, "store": 0}, 0
    for process in range(2):
        running = Server(params, tmp_path, seed=process)
        for turn in range(2):
            requests = [server.Request(np.array(tokens, np.int32), num_output=8) for tokens in conversations]
            running.serve(requests)
            if process and not turn:
                assert running.cache.metrics.hits["store"] > 0
            for tokens, request in zip(conversations, requests, strict=True):
                tokens += [*request.output, *rng.integers(0, TINY.vocab, rng.integers(1, 15)).tolist()]
                assert len(tokens) + 8 < MOST_TOKENS
        running.close()
        for tier, num in running.cache.metrics.hits.items():
            hits[tier] += num
        num_aborted += running.num_aborted
        assert not running.cache.metrics.failures
    assert all(hits.values()) and num_aborted > 3, (hits, num_aborted)
