"""The adapter for EasyDeL, in the real engine, where that is installed: `scripts/test-easydel` installs it."""

import concurrent.futures
import contextlib
import threading
import time

import easydel_engine  # first: it skips these tests where easydel is missing
import jax
import openai
import pytest
import uvicorn
from easydel.inference.esurge.core.manager import CacheManager
from easydel.inference.esurge.server import eSurgeApiServer
from easydel_engine import PAGE_SIZE, answers, prompt

from jax_kvpool import Mover
from jax_kvpool.integrations import easydel
from jax_kvpool.stores import FileStore

pytestmark = pytest.mark.filterwarnings("default")  # what their packages warn of is not ours

PAGE_BYTES = 102_400  # of a record: 16 tokens of 3 layers, keys and values of 2 heads of 128 float32, and padding
PROMPTS = [prompt(1, i, num=60) for i in range(2, 14)]
ROUNDS = [PROMPTS[:6], PROMPTS[6:], PROMPTS[2:8], PROMPTS[::-1]]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return easydel_engine.write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def expected(tokenizer):
    """The answers without a cache."""
    with easydel_engine.engine(tokenizer, num_pages=129, enable_prefix_caching=False) as made:
        return dict(zip(PROMPTS, answers(made, PROMPTS, 60), strict=True))


@pytest.fixture(scope="module")
def engine_of(tokenizer):
    """Makes engines, each once, to be left idle and without a tier. An idle one takes all of a CPU, so one runs."""
    with contextlib.ExitStack() as stack:
        made = {}

        def engine_of(num_pages=33, **options):
            for other in made.values():
                easydel_engine.stop(other)
            if (key := (num_pages, *options.items())) not in made:
                made[key] = stack.enter_context(easydel_engine.engine(tokenizer, num_pages=num_pages, **options))
            made[key].initiate()
            return made[key]

        yield engine_of


@contextlib.contextmanager
def attached(engine, host_pages=128, *args, flush=0, **options):
    tier = easydel.attach(engine, host_pages * PAGE_BYTES / 1e9, *args, **options)
    try:
        yield tier
    finally:
        tier.detach(flush)


def assert_rounds(engine, expected, rounds=ROUNDS, num_tokens=24):
    for texts in rounds:
        for text, found in zip(texts, answers(engine, texts, num_tokens), strict=True):
            assert found == expected[text][:num_tokens], text[-30:]


@pytest.mark.parametrize("host_pages", [24, 128])
@pytest.mark.parametrize("num_pages", [33, 41])
@pytest.mark.parametrize("overlap", [False, True])
def test_same_tokens(engine_of, expected, num_pages, host_pages, overlap):
    engine = engine_of(num_pages=num_pages, overlap_execution=overlap)
    with attached(engine, host_pages) as tier:
        assert_rounds(engine, expected)
        hits = tier.cache.metrics.hits
        assert hits["host"] >= (20 if host_pages > 24 else 1) * PAGE_SIZE and hits["device"] > 0 and not hits["store"]
        assert tier.cache.metrics.evicted["device"] > num_pages
        assert tier.cache.num_available == num_pages - 1  # nothing is left behind


def test_preempted(engine_of, expected, monkeypatch):
    """Four running requests are too many for the pages."""
    engine = engine_of(async_scheduling=False, overlap_execution=False, max_num_seqs=4)
    preempted = []
    schedule = engine.scheduler.schedule

    def watched():
        preempted.extend((output := schedule()).preempted_req_ids)
        return output

    with attached(engine) as tier:
        monkeypatch.setattr(engine.scheduler, "schedule", watched)
        assert_rounds(engine, expected, num_tokens=60)
        assert tier.cache.metrics.hits["host"] > 0 and preempted
        assert tier.cache.num_available == 32


def test_without_loads_tokens_differ(engine_of, expected, monkeypatch):
    """These tests would see it."""
    engine = engine_of()
    with attached(engine):
        transfer = Mover.load
        monkeypatch.setattr(Mover, "load", lambda self, arrays, *ids: (arrays, transfer(self, arrays, [], [])[1]))
        with pytest.raises(AssertionError):
            assert_rounds(engine, expected)


def test_restart(engine_of, expected, tmp_path):
    """A second process's engine finds what the first one has left, if it has the same weights."""

    def store(namespace):
        return FileStore(namespace, tmp_path)

    first = engine_of()
    with attached(first, 128, store, flush=10, weights="seed 0", ahead=1.0):
        assert_rounds(first, expected, ROUNDS[:2])
    second = engine_of(num_pages=41)
    with attached(second, 128, store, weights="seed 0", prefetch_seconds=10) as tier:
        assert_rounds(second, expected, ROUNDS[:2])
        assert tier.cache.metrics.hits["store"] >= (3 + 12 * 4) * PAGE_SIZE  # 3 are common
        assert not tier.cache.metrics.failures
    with attached(second, 128, store, weights="seed 1", prefetch_seconds=10) as tier:
        assert_rounds(second, expected, ROUNDS[:1])
        assert tier.cache.metrics.hits["store"] == 0


def test_store_without_weights(engine_of, tmp_path):
    with pytest.raises(ValueError, match="weights: expected"):
        easydel.attach(engine_of(), 0.1, lambda namespace: FileStore(namespace, tmp_path))
    assert isinstance(engine_of().scheduler.kv_cache_manager, CacheManager)


def test_slow_store(engine_of, expected, tmp_path):
    """Nobody waits longer for a store than `prefetch_seconds`."""

    class Slow(FileStore):
        def contains(self, keys):
            time.sleep(2)
            return super().contains(keys)

    engine = engine_of()
    with attached(engine, 128, lambda namespace: Slow(namespace, tmp_path), weights="seed 0", prefetch_seconds=0.05):
        begin = time.monotonic()
        assert_rounds(engine, expected, [PROMPTS[:1]])
        assert time.monotonic() - begin < 2


def test_aborted(engine_of, expected):
    """In the middle of the answer, and in the queue."""
    engine = engine_of()
    with attached(engine) as tier:
        for _ in range(3):
            with concurrent.futures.ThreadPoolExecutor(8) as threads:
                names = [f"aborted-{time.monotonic_ns()}-{i}" for i in range(8)]
                params = easydel_engine.ed.SamplingParams(max_tokens=200, temperature=0.0, ignore_eos=True)
                for name, text in zip(names, PROMPTS, strict=False):
                    threads.submit(engine.generate, text, params, request_id=name, use_tqdm=False)
                while len(engine.scheduler.requests) < 8 or not engine.scheduler.running:
                    time.sleep(0.001)
                for name in names:
                    engine.abort_request(name)
        assert_rounds(engine, expected)
        assert tier.cache.num_available == 32 and not engine.scheduler.requests


@pytest.mark.parametrize(("what", "after"), [("execute", 0), ("execute", 5), ("wait_for_execution", 0)])
def test_failed_step(engine_of, expected, monkeypatch, what, after):
    """Who waits gets the error, and of what the step was to write nothing is ever found; nor of a step behind it that
    was planned already, and never runs."""
    engine = engine_of()
    target, calls = (engine.runner.executor_manager if what == "execute" else engine.runner), []
    theirs = getattr(target, what)

    def fails_once(*args, **options):
        calls.append(0)
        if len(calls) == after + 1:
            raise RuntimeError("a step that fails")
        return theirs(*args, **options)

    with attached(engine) as tier:
        monkeypatch.setattr(target, what, fails_once)
        with pytest.raises(RuntimeError, match="a step that fails"):
            answers(engine, PROMPTS[:6])
        for name in [*engine.scheduler.requests]:
            engine.abort_request(name)
        assert tier.cache.num_available == 32
        easydel_engine.stop(engine)
        engine.initiate()
        assert_rounds(engine, expected)


def test_pages_made_anew(engine_of, expected):
    """`pause` frees the device pages, `resume` makes new ones: the host pool's are still good."""
    engine = engine_of()
    with attached(engine, ahead=1.0) as tier:
        assert_rounds(engine, expected, [PROMPTS[:2]])
        engine.pause()
        assert engine.runner.executor_manager.kv_pages is None
        engine.resume()
        before = dict(tier.cache.metrics.hits)
        assert_rounds(engine, expected, [PROMPTS[:1]])
        assert tier.cache.metrics.hits["device"] == before["device"]
        assert tier.cache.metrics.hits["host"] >= before["host"] + 7 * PAGE_SIZE


def test_new_weights(engine_of, tokenizer, expected):
    """Nothing of the old ones is found, in no tier."""
    other, first = easydel_engine.model(33, seed=1), easydel_engine.model(33, seed=0)
    with easydel_engine.engine(tokenizer, num_pages=129, seed=1, enable_prefix_caching=False) as reference:
        of_other = dict(zip(PROMPTS[:6], answers(reference, PROMPTS[:6]), strict=True))
    assert all(of_other[text] != expected[text][:24] for text in of_other)
    engine = engine_of()
    with attached(engine) as tier:
        assert_rounds(engine, expected)
        engine.update_model_weights(other)
        assert engine.scheduler.kv_cache_manager is tier
        before = sum(tier.cache.metrics.hits.values())
        assert_rounds(engine, of_other, [PROMPTS[:1]])
        assert sum(tier.cache.metrics.hits.values()) == before
        assert_rounds(engine, of_other, [PROMPTS[:6], PROMPTS[:6]])
        engine.update_model_weights(first)
        assert_rounds(engine, expected)
    assert isinstance(engine.scheduler.kv_cache_manager, CacheManager)
    assert_rounds(engine, expected, ROUNDS[:1])


def test_reset(engine_of, expected):
    engine = engine_of()
    with attached(engine) as tier:
        assert_rounds(engine, expected, ROUNDS[:1])
        assert engine.scheduler.reset_prefix_cache()
        before = sum(tier.cache.metrics.hits.values())
        assert_rounds(engine, expected, [PROMPTS[:1]])
        assert sum(tier.cache.metrics.hits.values()) == before


def test_prompt_logprobs(engine_of, expected):
    """Who wants those of all tokens has all computed."""
    engine = engine_of()
    params = easydel_engine.ed.SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True, prompt_logprobs=1)
    with attached(engine) as tier:
        assert_rounds(engine, expected, [PROMPTS[:1]])
        (out,) = engine.generate(PROMPTS[0], params, use_tqdm=False)
        assert list(out.outputs[0].token_ids) == expected[PROMPTS[0]][:24]
        assert sum(tier.cache.metrics.hits.values()) == 0


def test_server(engine_of, expected):
    """Their OpenAI server, with the real client: conversations at once, each turn on those before."""
    engine = engine_of(num_pages=41)
    with attached(engine) as tier, served(engine) as address:

        def converse(first):
            with openai.OpenAI(base_url=f"{address}/v1", api_key="none") as client:
                messages = []
                for text in [first, "w1 w2 w3", "w4 w5 w6"]:
                    messages.append({"role": "user", "content": text})
                    answer = client.chat.completions.create(
                        model=engine.esurge_name, messages=messages, max_tokens=24, temperature=0.0
                    )
                    messages.append({"role": "assistant", "content": answer.choices[0].message.content})
                return [message["content"] for message in messages[1::2]]

        with concurrent.futures.ThreadPoolExecutor(3) as threads:  # more it refuses
            found = [*threads.map(converse, PROMPTS[:6])]
            again = [*threads.map(converse, PROMPTS[:6])]
        assert tier.cache.metrics.hits["host"] > 0
    assert again == found
    easydel_engine.stop(engine)
    with easydel_engine.engine(engine.tokenizer.name_or_path, num_pages=129, enable_prefix_caching=False) as reference:
        for first, turns in zip(PROMPTS[:6], found, strict=True):
            messages = []
            for text, turn in zip([first, "w1 w2 w3", "w4 w5 w6"], turns, strict=True):
                messages.append({"role": "user", "content": text})
                params = easydel_engine.ed.SamplingParams(max_tokens=24, temperature=0.0)
                answer = reference.chat(messages, sampling_params=params)
                assert answer.outputs[0].text == turn
                messages.append({"role": "assistant", "content": turn})


@contextlib.contextmanager
def served(engine):
    app = eSurgeApiServer(engine, enable_persistence=False, enable_response_store=False).app
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join()


def test_refused(engine_of, monkeypatch):
    """By name, and nothing of the engine is changed."""
    engine = engine_of()
    scheduler, manager = engine.scheduler, engine.scheduler.kv_cache_manager

    def assert_refused(match):
        with pytest.raises(RuntimeError, match=match):
            easydel.attach(engine, 0.1)
        assert scheduler.kv_cache_manager is manager and "execute_model" not in vars(engine.runner)

    for target, name, value, match in [
        (scheduler, "data_parallel_size", 2, "data_parallel_size 1, got 2"),
        (scheduler, "num_lookahead_tokens", 3, "no speculation"),
        (scheduler, "requests", {"a": None}, "idle one, got 1 requests"),
        (manager, "enable_caching", False, "enable_prefix_caching"),
        (engine, "distributed_mode", True, "one host"),
        (scheduler.kv_cache_config, "kv_cache_groups", [], "full attention alone"),
        (scheduler, "page_size", 8, r"arrays \(pages, page_size, ...\), got \{\(33, 16\)\}"),
        (manager, "reset_prefix_cache", lambda: False, "no page in use"),
        (engine.runner.executor_manager, "kv_pages", None, "layers of plain pages"),
        (CacheManager, "allocate_slots", lambda self, request: None, "easydel 0.3.0"),
        (jax, "process_count", lambda: 2, "one host"),
    ]:
        with monkeypatch.context() as patch:
            patch.setattr(target, name, value)
            assert_refused(match)
    with attached(engine), pytest.raises(RuntimeError, match="its own manager of pages, got HostTier"):
        easydel.attach(engine, 0.1)
    with pytest.raises(ValueError, match="host_bytes: expected room for a page, 102400, got 1000"):
        easydel.attach(engine, 1e-6)
    assert engine.scheduler.kv_cache_manager is manager
