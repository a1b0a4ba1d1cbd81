"""An engine of a `KVCache` without a device: it executes plans on pools whose pages hold, for each token, all tokens up
to it. So a page that is not what it should be is seen."""

import collections
import concurrent.futures
import itertools
import time
import types

import jax
import numpy as np

from jax_kvpool import DevicePool, HostPool, PageSpec
from jax_kvpool.cache import KVCache, index, page_keys

PAGE = 4
SPEC = PageSpec.uniform(PAGE, 1, {"k": ((8,), "float32")})


def eventually(condition):
    deadline = time.monotonic() + 20
    while not (is_true := condition()) and time.monotonic() < deadline:
        time.sleep(1e-3)
    return is_true


class Output:
    """Of a step, on the device: a leaf of a pytree with `is_ready`."""

    def __init__(self):
        self.ready, self.error = False, None

    def is_deleted(self):
        return False

    def is_ready(self):
        return self.ready

    def block_until_ready(self):
        self.ready = True
        if self.error is not None:
            raise self.error


def result(outcome):
    return types.SimpleNamespace(
        is_hit=outcome in ("found", "stored", "exists"), outcome=types.SimpleNamespace(value=outcome), reason="why not"
    )


def stored_pages(tokens):
    """The key and the content of each full page of tokens, without salt and version."""
    prefix = [(b"", b""), *tokens]
    keys = page_keys(np.array(tokens, np.int32), PAGE)
    for page, key in enumerate(keys):
        yield key, [tuple(prefix[: at + 2]) for at in range(page * PAGE, (page + 1) * PAGE)]


class ShortKeys(dict):
    """Of an index that knows no more of a key than which of a few it is: pages collide all day."""

    def get(self, key, default):
        return super().get(b"", default)

    def __contains__(self, key):
        return super().__contains__(b"")

    def __setitem__(self, key, entry):
        super().__setitem__(b"", entry)

    def __delitem__(self, key):
        super().__delitem__(b"")


class FewKeys(list):
    """Of so many dictionaries, by a key's first byte."""

    def __init__(self, num):
        super().__init__(ShortKeys() for _ in range(num))

    def __getitem__(self, byte):
        return super().__getitem__(byte % len(self))


def forget_keys(of_index, num):
    """Makes an `Index` that knows no more of a key than which of so many it is: pages collide all day."""

    def same(entries, keys, tokens, begin):
        entries = index._leading(entries, of_index.tokens[entries], tokens[begin : begin + len(entries)])
        asked = [[key[0] % num] for key in keys(begin + len(entries))[begin : begin + len(entries)]]
        return index._leading(entries, of_index._keys[entries, :1].astype(int) % num, np.array(asked).reshape(-1, 1))

    of_index._by_key = FewKeys(num)
    of_index._same = same


class VirtualStore:
    """A store whose calls happen when `go_on` says so, or never. Its records are pages of the engine's host pool."""

    def __init__(self, pages=None):
        self.pages = {} if pages is None else pages  # what lies behind
        self.under_way = []
        self.engine = None

    def put(self, keys, pages):
        for key, page in zip(keys, pages, strict=True):
            content = self.engine.host[page]
            assert page not in self.engine.written_in_flight()
            assert self.engine.key_of(content) == key
            self.pages.setdefault(key, list(content))
        return [result("stored")] * len(keys)

    def get(self, keys, pages):
        for key, page in zip(keys, pages, strict=True):
            assert page not in self.engine.touched_in_flight()
            self.engine.host[page] = list(self.pages.get(key, ["garbage"] * PAGE))
        return [result("found" if key in self.pages else "missing") for key in keys]

    def contains(self, keys):
        return [result("exists" if key in self.pages else "missing") for key in keys]

    def submit(self, method, keys, *pages):
        future = concurrent.futures.Future()
        self.under_way.append((method, keys, pages, future))
        return future

    def go_on(self, at=0, fate="works", which=0):
        """A call happens; or one key of it fails, or all of it does."""
        if not self.under_way:
            return
        method, keys, pages, future = self.under_way.pop(at % len(self.under_way))
        if fate == "raises":
            if pages and method == self.get:
                for page in pages[0]:
                    self.engine.host[page] = ["garbage"] * PAGE
            future.set_exception(OSError("no"))
            return
        results = method(keys, *pages)
        if fate == "fails":
            results[which % len(keys)] = result("failed")
            if method == self.get:
                self.engine.host[pages[0][which % len(keys)]] = ["garbage"] * PAGE
        future.set_result(results)


class Running:
    """A sequence of the engine: what it computes is its tokens, then what `answers` says."""

    def __init__(self, seq, tokens):
        self.seq, self.tokens = seq, [int(t) for t in tokens]
        self.num_computed = 0


class Engine:
    def __init__(self, num_device=6, num_host=8, stores=(), num_keys=None, lag=0, **options):
        self.device, self.host = [[None] * PAGE for _ in range(num_device)], [[None] * PAGE for _ in range(num_host)]
        host = HostPool.create(SPEC, num_host)
        host.memories *= max(len(stores), 1)  # as if it had so many shards
        options.setdefault("min_pages", 1)
        self.told = collections.Counter()
        options["on_event"] = self.note
        self.cache = KVCache(DevicePool.create(SPEC, num_device), host, stores=stores, **options)
        if num_keys is not None:
            forget_keys(self.cache._tiers.index, num_keys)
        self.stores, self.version = stores, b""
        self.now = 0.0  # virtual seconds, which pass when somebody says so
        for store in stores:
            store.engine = self
        if stores:
            self.cache._saving._host = types.SimpleNamespace(unchecked_record=lambda page, shard: page)
            self.cache._saving._now = lambda: self.now
        self.waiting = []  # sequences that have asked the stores, and their tokens and salts
        self.deadlines = {}
        self.running = []
        self.copies_of_moves = {}
        self.in_flight = []  # (moves, output, host pages that it wrote)
        self.num_loaded = 0
        self.lag, self.computed = lag, []  # it commits what a step computed so many steps later

    def note(self, what, tier, key):
        if tier != "store":
            self.told[tier, key] += 1 if what == "stored" else -1
            assert self.told[tier, key] >= 0

    # ---- what an engine does ----

    def wait(self, tokens, seconds, **options):
        seq = self.cache.open(np.array(tokens, np.int32), **options)
        self.cache.prefetch(seq, seconds)
        self.waiting.append((seq, tokens, options))
        self.deadlines[seq] = self.now + seconds

    def poll(self):
        self.cache.poll()
        for seq, _, _ in self.waiting:  # nobody waits longer than he says
            assert not self.cache.is_fetching(seq) or self.now < self.deadlines[seq]

    def start(self, tokens, num_more=0, seq=None, **options):
        seq = self.cache.open(np.array(tokens, np.int32), **options) if seq is None else seq
        self.check_match(seq, tokens, self.cache.match(seq))
        if not self.cache.admit(seq, len(tokens) + num_more):
            assert not seq.is_admitted
            return None
        running = Running(seq, tokens)
        running.root = options.get("salt", b""), self.version
        running.num_computed = seq.num_cached
        assert seq.num_cached < len(tokens)
        self.running.append(running)
        return running

    def check_match(self, seq, tokens, matched):
        assert sum(matched) < len(tokens) and not any(n % PAGE for n in matched)

    def step(self, portions=None, fate="dispatched", meanwhile=lambda: None):
        """Computes the next tokens of some sequences: `portions`, so many of each. `meanwhile`: is called between the
        plan's end and its fate."""
        moves = self.cache.step()
        self.check_moves(moves)
        meanwhile()
        if fate == "cancelled":
            self.cache.cancelled(moves)
            return
        self.execute(moves)
        computed = []
        for running, num in (portions or {}).items():
            if not self.cache.is_loaded(running.seq):
                continue
            num = min(num, len(running.tokens) - running.num_computed)
            pages = running.seq.pages
            end = running.num_computed + num
            assert end <= len(pages) * PAGE
            prefix = [running.root, *running.tokens]
            for at in range(running.num_computed):  # attention reads all before
                assert self.device[pages[at // PAGE]][at % PAGE] == tuple(prefix[: at + 2]), (running.seq, at)
            for at in range(running.num_computed, end):
                self.device[pages[at // PAGE]][at % PAGE] = tuple(prefix[: at + 2])
            computed.append((running, running.num_computed, end))
            running.num_computed = end
        output = Output()
        self.cache.dispatched(moves, output)
        self.in_flight.append((moves, output))
        self.copies_of_moves[moves.step] = [array.copy() for array in jax.tree.leaves(moves)]
        self.computed.append(computed)
        while len(self.computed) > self.lag:
            for running, begin, end in self.computed.pop(0):
                if running in self.running:
                    self.cache.commit(running.seq, running.tokens[begin:end])

    def check_moves(self, moves):
        for name in ("copies", "stores", "loads"):
            first, second = getattr(moves, name)
            assert first.dtype == second.dtype == np.int32 and len(first) == len(second)
            num = getattr(moves, f"num_{name}")
            assert (first[:num] >= 0).all() and (first[num:] == -1).all() and (second[num:] == -1).all()
            targets = first[:num] if name == "loads" else second[:num]
            assert len(set(targets.tolist())) == num, name  # each destination once
        stored_to, loaded_from = set(moves.stores[1].tolist()) - {-1}, set(moves.loads[1].tolist()) - {-1}
        assert not stored_to & loaded_from
        copied_to = set(moves.copies[1].tolist()) - {-1}
        assert not copied_to & (set(moves.stores[0].tolist()) | set(moves.loads[0].tolist()))

    def execute(self, moves):
        copies = [(self.device[source], target) for source, target in zip(*moves.copies, strict=True) if source >= 0]
        for page, target in copies:  # all at once
            self.device[target] = list(page)
        for source, target in zip(*moves.stores, strict=True):
            if source >= 0:
                self.host[target] = list(self.device[source])
        for target, source in zip(*moves.loads, strict=True):
            if target >= 0:
                self.device[target] = list(self.host[source])
                self.num_loaded += 1

    def land(self, num=1):
        for moves, output in self.in_flight[:num]:
            output.ready = True
            for array, copy in zip(jax.tree.leaves(moves), self.copies_of_moves.pop(moves.step), strict=True):
                np.testing.assert_array_equal(array, copy)  # a step may read them until it is done
        del self.in_flight[:num]
        self.poll()

    def release(self, running):
        self.cache.release(running.seq)
        self.running.remove(running)

    def fork(self, running):
        seq = self.cache.fork(running.seq)
        if seq is None:
            return None
        child = Running(seq, running.tokens[: seq.num_committed])
        child.root, child.num_computed = running.root, seq.num_committed
        self.running.append(child)
        return child

    def fail(self):
        """The oldest step that is in flight, and all behind it; what they wrote is anything."""
        self._fail(0, self.in_flight[0][0])

    def lose(self, num_done):
        """All that is on the device, and the steps in flight behind the first so many, which are done."""
        for _, output in self.in_flight[num_done:]:
            output.error = RuntimeError("a step that fails")
        self._fail(num_done, None)

    def _fail(self, num_done, moves):
        for page in range(len(self.device)):
            self.device[page] = ["lost"] * PAGE
        for later, _ in self.in_flight[num_done:]:
            for target in later.stores[1].tolist():
                if target >= 0:
                    self.host[target] = ["lost"] * PAGE
        self.cache.failed(moves)
        self.in_flight.clear()
        self.computed.clear()
        lost, self.running = self.running, []
        assert not any(running.seq.is_admitted for running in lost)

    # ---- what must always hold ----

    def key_of(self, content):
        """Of a page with this content."""
        (salt, version), *tokens = content[-1]
        return [*page_keys(np.array(tokens, np.int32), PAGE, salt=salt, version=version)][-1]

    def written_in_flight(self):
        return {page for moves, _ in self.in_flight for page in moves.stores[1].tolist()}

    def touched_in_flight(self):
        return self.written_in_flight() | {page for moves, _ in self.in_flight for page in moves.loads[1].tolist()}

    def check(self):
        tiers = self.cache._tiers
        owners = {}
        for running in self.running:
            pages = running.seq.pages.tolist()
            assert len(set(pages)) == len(pages)
            shared = set(tiers.device_page[running.seq._entries].tolist())
            for page in pages:
                if page not in shared:
                    assert page not in owners, page
                    owners[page] = running
        pins = {}
        leases = [lease for lease in self.cache._saving._leases if not lease.is_over] if self.stores else []
        for entries in [*(running.seq._entries for running in self.running), *(lease._entries for lease in leases)]:
            for entry in entries.tolist():
                pins[entry] = pins.get(entry, 0) + 1
        gets = [page for call, _ in (self.cache._saving._gets if self.stores else ()) for page in call.pages]
        assert len(tiers.held) <= max(len(self.host) // 4, 2) and set(gets) <= tiers.held
        hosts = {}
        copies = (tiers.device_page >= 0).astype(int) + (tiers.host_page >= 0)
        np.testing.assert_array_equal(copies, tiers.index.copies)
        alive = np.flatnonzero(copies).tolist()
        indexed = set(tiers.index.entries().tolist())
        assert indexed <= set(alive)  # an indexed key has a copy
        assert tiers.index._num_unused + len(alive) == len(copies)
        self.check_links(tiers.index, indexed)
        known = np.array(sorted(indexed), np.intp)
        there = collections.Counter()
        for tier, pages in (("device", tiers.device_page), ("host", tiers.host_page)):
            there.update((tier, key) for key in tiers.index.keys(known[pages[known] >= 0]))
        assert there == self.told, "what routers were told"
        for entry in alive:
            assert tiers.pins[entry] == pins.get(entry, 0)
            device, host = int(tiers.device_page[entry]), int(tiers.host_page[entry])
            if device >= 0:
                assert device not in owners, device
                owners[device] = entry
            if host >= 0:
                assert host not in hosts
                hosts[host] = entry
            assert tiers.device.has(entry) == (device >= 0 and not tiers.pins[entry])
            assert tiers.host.has(entry) == (host >= 0 and not tiers.pins[entry] and host not in tiers.held)
            if entry in indexed:
                tokens = tuple(tiers.index.tokens[entry].tolist())
                if host >= 0 and tiers.stored[host] <= tiers.dispatched:
                    self.check_page(self.host[host], tokens)
                if device >= 0 and entry not in tiers.loading:
                    self.check_page(self.device[device], tokens)
        assert tiers.free_device.num_free + len(owners) == len(self.device) - len(tiers.free_device.reserved)
        assert len(tiers._free_host) + len(hosts) + len(tiers._freed_while_held) + len(gets) == len(self.host)
        assert len(set(tiers._free_host)) == len(tiers._free_host) and not tiers.held & set(tiers._free_host)

    def check_links(self, index, indexed):
        """Each page is its parent's child, or is found by its key, or its parent is gone."""
        of_keys = [entry for of_byte in index._by_key for entry in of_byte.values()]
        parents, children = index._parent.tolist(), index._child.tolist()
        is_child = {entry for entry in indexed if parents[entry] >= 0 and children[parents[entry]] == entry}
        assert len(set(of_keys)) == len(of_keys) and set(of_keys) <= indexed and not is_child & set(of_keys)
        serials = index.serial.tolist()
        for entry in is_child:
            assert serials[parents[entry]] in (index._parent_serial[entry], 0)
        for entry in indexed - is_child - set(of_keys):
            assert serials[parents[entry]] != index._parent_serial[entry]

    def check_page(self, page, tokens):
        assert all(isinstance(token, tuple) for token in page), page
        assert tuple(token[-1] for token in page) == tokens
        assert all(later[: len(token)] == token for token, later in itertools.pairwise(page))
