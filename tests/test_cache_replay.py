"""The planner on a real trace: what it hits is what LRU hits."""

import collections
import json
from pathlib import Path

import pytest

from jax_kvpool import replay

TRACE = Path(__file__).parents[1] / "examples" / "data" / "conversation_trace.jsonl.xz"
DISTINCT = 170_899


def requests_of(num=None):
    return replay.read_trace(TRACE)[:num]


def blocks_of(request):
    return request["hash_ids"][: request["input_length"] // replay.BLOCK_TOKENS]


def lru_hits(requests, num_pages):
    """Of a list of blocks in order of use: a request touches its last block first."""
    known = collections.OrderedDict()
    hits = 0
    for request in requests:
        blocks = blocks_of(request)
        hits += next((i for i, block in enumerate(blocks) if block not in known), len(blocks))
        for block in reversed(blocks):
            known[block] = None
            known.move_to_end(block)
        while len(known) > num_pages:
            known.popitem(last=False)
    return hits


@pytest.mark.parametrize(("share", "hit_rate"), [(0.05, 0.2022), (0.1, 0.2882), (0.3, 0.3728)])
def test_the_device_tier_alone_is_lru(share, hit_rate):
    requests = requests_of()
    found = replay.replay(requests, round(share * DISTINCT))
    assert found.device_hits == lru_hits(requests, round(share * DISTINCT))
    assert (found.distinct, found.refused) == (DISTINCT, 0)
    assert found.device_hits / found.blocks == pytest.approx(hit_rate, abs=1e-4)


@pytest.mark.parametrize(("share", "at_least"), [(0.1, 0.31), (0.3, 0.365)])
def test_a_host_pool_beside_five_per_cent(share, at_least):
    found = replay.replay(requests_of(), round(0.05 * DISTINCT), round(share * DISTINCT))
    assert (found.device_hits + found.host_hits) / found.blocks >= at_least
    assert found.loaded == found.host_hits


def test_libcachesim_hits_the_same():
    libcachesim = pytest.importorskip("libcachesim")
    requests = requests_of(3000)
    num_pages = 3000
    cache = libcachesim.LRU(num_pages)
    hits = 0
    one = libcachesim.Request()
    one.obj_size = 1

    def get(block):
        one.obj_id = block
        return cache.get(one)

    for request in requests:
        blocks = blocks_of(request)
        hits += sum([get(block) for block in blocks])  # what it has is pinned by that, as it were, before room is made
        for block in reversed(blocks):
            get(block)
    assert replay.replay(requests, num_pages).device_hits == hits


def test_the_command(tmp_path, capsys):
    path = tmp_path / "rows.json"
    options = ["--requests", "200", "--device", "10", "--host", "0", "20", "--json", str(path)]
    assert replay.main([str(TRACE), *options]) == 0
    output = capsys.readouterr().out
    assert "200 requests" in output and "device hits" in output
    alone, beside = json.loads(path.read_text())
    assert alone["hits"] <= beside["hits"] and beside["stored"] > 0 == alone["stored"]
