"""`KVCache`: plans which page of KV lives where. It copies nothing itself."""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, Final

import jax
import numpy as np
import numpy.typing as npt

from jax_kvpool._check import MAX_INT32, checked_int, checked_kind, checked_seconds, shown
from jax_kvpool.cache.index import Entries
from jax_kvpool.cache.keys import extras_by_page, root_key, token_array
from jax_kvpool.cache.metrics import Event, Metrics
from jax_kvpool.cache.saving import Lease, Saving, checked_share, checked_stores
from jax_kvpool.cache.sequence import Matched, Moves, Sequence
from jax_kvpool.cache.tiers import Tiers
from jax_kvpool.device_pool import DevicePool
from jax_kvpool.host_pool import HostPool
from jax_kvpool.id_arrays import padded_size
from jax_kvpool.tuning import current

if TYPE_CHECKING:
    from jax_kvpool.stores import PageStore  # which needs more than the cache does

__all__ = ["KVCache"]

_LOAD_COST: Final = 10
"""How many times as long it takes to compute KV as to load its bytes: Llama 3 8B computes 16 GFLOP for the 131 KB of a
token, 32 us at 500 TFLOP/s; the link of an H100 takes 2.4 us."""


class KVCache:
    """Which page lives where, for the engine of one device pool: in it, in the host pool, or in neither.

    The engine computes; the cache says where. For each sequence: `open`, `admit`, then steps, `commit` of what they
    have written, `release`. For each step: `step()` closes a plan, the engine's jitted function executes it and
    computes, `dispatched(moves, output)` tells that it was called. Plans of one device pool happen in their order, so a
    page may be matched, loaded or overwritten as soon as the step that writes it is dispatched.

        moves = cache.step()
        logits, device = step(params, device, host, batch, moves)
        cache.dispatched(moves, logits)

    One thread, the engine's, calls everything. Nothing blocks, but `failed` and `close`.

    Args:
      device, host: the pools, or their specs and numbers of pages in other words; only these are read. The pages of
        `host` belong to the cache. `host` None: no second tier.
      stores: page stores, one for each shard of `host` that is this process's; by default none. A page is there if it
        is in all of them. They are the caller's to close, after the cache.
      reserved: device pages that are never handed out.
      ahead: the share of the device tier, its coldest pages, that is kept stored in the host pool; 0: a page is stored
        when it has to go, 1: when it is committed.
      second: store only what a second request has got.
      min_pages: fewer pages than this in a row are neither loaded nor got from a store, but computed again. By default
        what is computed in the time that a load costs a step besides its bytes, 0.1 ms, if the GPU computes them in ten
        times the link's time: 1 page for most models, and without a GPU.
      max_loads: pages that one step loads, at most; what is more comes with the next ones, see `is_loaded`.
      version: of what computes the KV, the model's weights above all; part of all keys.
      make_ids: makes the arrays of `Moves` out of NumPy's, which are fresh: `host_ids` for the copy engine.
      on_event: see `metrics.Event`.

    Attributes:
      metrics: see `Metrics`.

    Raises `TypeError` or `ValueError` for an argument that is none of these, or pools of other specs.
    """

    def __init__(
        self,
        device: DevicePool,
        host: HostPool | None = None,
        *,
        stores: Iterable[PageStore] = (),
        reserved: Iterable[int] = (),
        ahead: float = 0.05,
        second: bool = False,
        min_pages: int | None = None,
        max_loads: int = 512,
        version: str | bytes = b"",
        make_ids: Callable[[npt.NDArray[np.int32]], Any] = np.asarray,
        on_event: Event | None = None,
    ) -> None:
        checked_kind("device", device, DevicePool, "the engine's pool, of which the cache plans the pages")
        if host is not None:
            checked_kind("host", host, HostPool, "HostPool.create(device.spec, num_pages) makes one")
            if host.spec != device.spec:
                raise ValueError(f"host: expected a pool of {device.spec}, as the device pool, got one of {host.spec}")
        ahead = checked_share("ahead", ahead)
        stores = checked_stores(stores, host)
        self.metrics = Metrics(page_bytes=device.spec.payload_bytes, on_event=on_event)
        self._page_size: Final = device.spec.page_size
        self._host = host
        self._tiers = Tiers(
            device.num_pages,
            0 if host is None else host.num_pages,
            self._page_size,
            self.metrics,
            reserved=reserved,
            ahead=ahead,
            second=checked_kind("second", second, bool, "pass True or False"),
            saves=bool(stores),
        )
        self._min_pages = _min_pages(device) if min_pages is None else checked_int("min_pages", min_pages, 1)
        self._saving = Saving(self._tiers, host, stores, self._min_pages) if host is not None and stores else None
        self._max_loads = checked_int("max_loads", max_loads, 1, MAX_INT32)
        self._make_ids = make_ids
        self._blank_ids: dict[int, tuple[Any, Any]] = {}  # of no page, which most steps have
        self._version = version
        root_key(version)  # raises if it is none
        self._moves: Moves | None = None  # closed, and neither dispatched nor cancelled
        self._in_flight = collections.deque[tuple[Moves, Any]]()
        self._running: dict[Sequence, None] = {}  # that are admitted
        self._pending = collections.Counter[bytes]()  # keys of pages that running sequences are computing

    # ---- sequences ----

    def open(self, tokens: npt.ArrayLike, *, salt: bytes = b"", extras: Iterable[tuple[int, bytes]] = ()) -> Sequence:
        """A sequence of these tokens, at least one; nothing is held for it yet. `tokens`, `salt`, `extras`: as in
        `page_keys`."""
        array = token_array("tokens", tokens)
        if not array.size:
            raise ValueError("tokens: expected at least one, got none")
        of_pages = extras_by_page(extras, self._page_size, array.size)
        return Sequence(array, self._page_size, self._version, salt, of_pages)

    def match(self, seq: Sequence) -> Matched:
        """How many tokens need not be computed if it were admitted now; never all of them."""
        self._check_kind(seq)
        entries = self._match(seq)
        num, limit, pending = len(entries), self._matchable(seq), 0
        is_there = self._tiers.device_page[entries] >= 0
        of_device = num if is_there.all() else int(is_there.argmin())
        while self._pending and num + pending < limit:
            if seq._all_keys(num + pending + 1)[num + pending] not in self._pending:
                break
            pending += 1
        size = self._page_size
        return Matched(of_device * size, (num - of_device) * size, pending * size)

    def prefetch(self, seq: Sequence, seconds: float) -> None:
        """Asks the stores for the pages behind those that are matched, in the background: looks up, then gets into the
        host pool what is there, as far as there is room. What came can be matched, and stays there, until `admit`,
        `release`, or the deadline in so many seconds; what is not there by then is a miss. It ends earlier if another
        sequence needs the device pages that are kept for it.
        """
        self._check_kind(seq)
        seconds = checked_seconds("seconds", seconds)
        if self._saving is None or seq.is_admitted:
            return
        self._end_lease(seq)
        limit, entries = self._matchable(seq), self._match(seq)
        if (num := len(entries)) < limit:
            seq._lease = Lease(self._tiers, entries, ends=True)
            keys, tokens = seq._all_keys(limit)[num:limit], seq._by_page(limit)[num:].copy()
            self._saving.request(seq._lease, seconds, seq._root, keys, tokens)

    def is_fetching(self, seq: Sequence) -> bool:
        """Whether pages that it has asked for may still come before its deadline."""
        self._check_kind(seq)
        return seq._lease is not None and not seq._lease.is_done

    def admit(self, seq: Sequence, num_tokens: int) -> bool:
        """Makes room for the first `num_tokens` tokens of a sequence, those that are cached included: `seq.pages` then
        has all their pages. All or nothing: False if there are not enough pages that are free or can be made so.

        The cached pages of the prefix, `seq.num_cached` tokens, need not be computed; `is_loaded` says from which step
        on they are there.
        """
        self._check_kind(seq)
        if seq.is_admitted:
            raise ValueError(f"seq: expected one that is not admitted, got {seq}; grow it, or release it before")
        num_tokens = checked_int("num_tokens", num_tokens, 1, MAX_INT32)
        tiers = self._tiers
        entries = self._match(seq)[: num_tokens // self._page_size]
        tiers.pin(entries)
        to_load = entries[tiers.device_page[entries] < 0]
        num_pages = self._num_pages(num_tokens) - len(entries) + len(to_load)
        if not self._has_room(num_pages):
            tiers.unpin(entries)
            return False
        pages = tiers.take(num_pages)
        self._end_lease(seq)
        fetched = 0
        if len(to_load):
            tiers.load(to_load, pages[: len(to_load)])
            pages = pages[len(to_load) :]
            fetched = int(np.count_nonzero(tiers.is_fetched[to_load]))
            tiers.is_fetched[to_load] = False
        tiers.use(entries)
        seq._entries, seq._is_indexed, seq._num_pages = entries, True, 0
        seq._append_pages(tiers.device_page[entries])
        seq._append_pages(pages)
        seq.is_admitted = True
        seq.num_cached = seq.num_committed = len(entries) * self._page_size
        self._running[seq] = None
        self._announce(seq, num_tokens)
        self.metrics.requests += 1
        self.metrics.tokens += num_tokens
        self.metrics.hits["store"] += fetched * self._page_size
        self.metrics.hits["host"] += (len(to_load) - fetched) * self._page_size
        self.metrics.hits["device"] += (len(entries) - len(to_load)) * self._page_size
        return True

    def is_loaded(self, seq: Sequence) -> bool:
        """Whether its cached pages are on the device once the plan that was closed last is executed: the step of that
        plan can compute it."""
        self._check_admitted(seq)
        loading = self._tiers.loading
        return not loading or not any(loading.get(entry) == 0 for entry in seq._entries.tolist())

    def grow(self, seq: Sequence, num_tokens: int) -> bool:
        """Makes room for the first `num_tokens` tokens of an admitted sequence. All or nothing, as `admit`."""
        self._check_admitted(seq)
        num_tokens = checked_int("num_tokens", num_tokens, 1, MAX_INT32)
        missing = self._num_pages(num_tokens) - seq._num_pages
        if not self._has_room(missing):
            return False
        if missing > 0:
            seq._append_pages(self._tiers.take(missing))
        return True

    def commit(self, seq: Sequence, tokens: npt.ArrayLike) -> None:
        """Tells which tokens the next positions of the sequence have: known, verified ones, whose KV steps that were
        dispatched have written. From `num_committed` on, prompt and answers alike, in any portions.

        Each page that is full then can be matched by others. If another sequence was quicker with the same page, its
        page is the one that is found, and this one stays private.

        Raises `ValueError` for tokens beyond the sequence's pages, or others than it was opened with.
        """
        self._check_admitted(seq)
        data = token_array("tokens", tokens)
        begin, end = seq.num_committed, seq.num_committed + data.size
        if end > seq._num_pages * self._page_size:
            raise ValueError(
                f"tokens: expected at most {seq._num_pages * self._page_size - begin}, for which {seq} has pages, got "
                f"{data.size}"
            )
        known = data[: seq._num_known - begin]
        if not np.array_equal(known, seq._tokens[begin : begin + known.size]):
            at = int(np.flatnonzero(known != seq._tokens[begin : begin + known.size])[0])
            raise ValueError(
                f"tokens: expected those of the sequence, {seq._tokens[begin + at]} at {begin + at}, got {known[at]}"
            )
        seq._append_tokens(data[known.size :])
        seq.num_committed = end
        self._index_pages(seq)

    def fork(self, seq: Sequence) -> Sequence | None:
        """Another sequence of the tokens that are committed, with their KV; what comes behind them may differ. It
        shares the pages that others can match, and gets copies of the rest, of which the next plan's `copies` tells.
        None if there are not enough pages."""
        self._check_admitted(seq)
        tiers = self._tiers
        num_shared, num_pages = len(seq._entries), self._num_pages(max(seq.num_committed, 1))
        tiers.pin(seq._entries)
        pages = self._take_for_copies(num_pages - num_shared)
        if pages is None:
            tiers.unpin(seq._entries)
            return None
        tokens = seq.tokens[: seq.num_committed].copy()
        child = Sequence(tokens, self._page_size, seq._version, seq._salt, seq._extras)
        child._keys = seq._keys[: seq.num_committed // self._page_size]
        child._entries, child._is_indexed = seq._entries, seq._is_indexed
        child._append_pages(tiers.device_page[seq._entries])
        child._append_pages(pages)
        child.is_admitted, child.num_cached, child.num_committed = True, seq.num_cached, seq.num_committed
        tiers.copy(seq.pages[num_shared:num_pages], pages, child)
        self._running[child] = None
        return child

    def release(self, seq: Sequence) -> None:
        """Gives its pages back, or ends its prefetch: at its end, when it is aborted, or to make room; then it may be
        admitted again. What it has committed can be matched from now on as before. Steps that were dispatched may still
        write the others."""
        if isinstance(seq, Sequence) and not seq.is_admitted and seq._lease is not None:
            self._end_lease(seq)
            return
        self._check_admitted(seq)
        tiers = self._tiers
        num, pages = len(seq._entries), seq.pages
        is_own = tiers.device_page[seq._entries] != pages[:num]
        if len(own := np.append(pages[:num][is_own], pages[num:])):
            tiers.free_device.free(own)
        copies = tiers.plan.copies
        for target in [target for target, (_, owner) in copies.items() if owner is seq]:
            del copies[target]
        tiers.unpin(seq._entries)
        self._forget(seq)

    # ---- steps ----

    def step(self) -> Moves:
        """Closes the plan of one step: what it moves before it computes. To be told `dispatched` or `cancelled`
        next."""
        if self._moves is not None:
            raise RuntimeError(f"step: expected step {self._moves.step} to be dispatched or cancelled before")
        plan = self._tiers.close(self._max_loads)
        copies = [source for source, _ in plan.copies.values()], [*plan.copies]
        stores = [*plan.stores.values()], [*plan.stores]
        loads = self._tiers.device_page[plan.loads], self._tiers.host_page[plan.loads]
        nums = [len(ids) for ids, _ in (copies, stores, loads)]
        # A fork copies one page, as a rule.
        size = padded_size(max(nums[1:]))
        sizes = (padded_size(nums[0], 1), size, size)
        arrays = [self._ids(*pairs, n) for pairs, n in zip((copies, stores, loads), sizes, strict=True)]
        self._moves = Moves(arrays[0], arrays[1], arrays[2], plan.step, nums[0], nums[1], nums[2])
        return self._moves

    def blank_moves(self) -> Iterator[Moves]:
        """Plans of no page, one of each form that `step` can return while there are no forks, to compile the engine's
        programs before they are needed. They are no steps: tell nothing of them."""
        num_most, size = self._tiers.free_device.num_pages if self._host is not None else 0, 0
        while True:
            ids = self._ids([], [], size)
            yield Moves(self._ids([], [], 0), ids, ids)
            if size >= num_most:
                return
            size = padded_size(size + 1)

    def dispatched(self, moves: Moves, output: Any = None) -> None:
        """The step was called, so its moves come before those of all later ones.

        `output`: a pytree of arrays of the step that the next one does not donate, which live on every device: when all
        are ready, the step is done. None: `landed` or `failed` will tell. `ValueError` for one that is on some of the
        devices of the host pool only, or has no array.
        """
        self._check_moves(moves)
        self._check_output(output)
        self._moves = None
        self._tiers.dispatch()
        self._in_flight.append((moves, output))
        self.metrics.copied += moves.num_copies
        self.metrics.written += moves.num_stores
        self.metrics.loaded += moves.num_loads

    def cancelled(self, moves: Moves) -> None:
        """The step was not called, or the call raised before anything ran: its moves are in the next plan."""
        self._check_moves(moves)
        self._moves = None
        self._tiers.cancel()
        copies = self._tiers.plan.copies
        for target in [t for t, (_, owner) in copies.items() if t not in owner.pages[len(owner._entries) :]]:
            del copies[target]

    def poll(self) -> None:
        """Looks which steps are done, and what the stores have done, and gives them more. Never blocks; to be called
        now and then, also when no step runs. Raises what a step failed with, again and again until `failed` is called
        for it."""
        while self._in_flight and self._in_flight[0][1] is not None:
            moves, output = self._in_flight[0]
            leaves = jax.tree.leaves(output)
            if any(leaf.is_deleted() for leaf in leaves):  # of which jax 0.10 must not be asked more
                raise ValueError(
                    f"output: expected arrays that no later step donates, got one of step {moves.step} that is deleted"
                )
            if not all(leaf.is_ready() for leaf in leaves):
                break
            for leaf in leaves:  # a step that failed is as ready as any
                leaf.block_until_ready()
            self._in_flight.popleft()
            self._tiers.landed = moves.step
        if self._saving is not None:
            self._saving.poll()

    def landed(self, moves: Moves) -> None:
        """The step, and with it all before, is done on every device: for engines that have no array to ask."""
        self._check_in_flight(moves)
        while self._in_flight and self._in_flight[0][0].step <= moves.step:
            self._in_flight.popleft()
        self._tiers.landed = moves.step

    def failed(self, moves: Moves | None = None) -> None:
        """The step failed when it ran. Waits for all steps that were dispatched. Nothing that it or a later one wrote
        is ever matched, nor anything in the device pool; all sequences that are admitted have lost their pages and are
        to be admitted again.

        `moves` None: of those in flight the first that has failed, if any: the engine has lost the device pool's
        contents, or made its arrays anew.
        """
        step = self._tiers.dispatched + 1
        if moves is not None:
            self._check_in_flight(moves)
            step = moves.step
        for other, output in self._in_flight:
            if output is None and moves is None:  # nobody knows how it ended
                step = min(step, other.step)
            for leaf in jax.tree.leaves(output):
                try:
                    leaf.block_until_ready()
                except Exception:  # that is why we are here
                    step = min(step, other.step)
        if self._host is not None:
            self._host.synchronize()
        self._in_flight.clear()
        self._moves = None
        if self._saving is not None:
            self._saving.end_all()
        for seq in list(self._running):
            self._forget(seq)
        self._tiers.fail(step)

    def reset(self, version: str | bytes) -> None:
        """Nothing that was computed before is ever matched again: the weights have changed. Sequences that are admitted
        keep their pages until they are released."""
        root_key(version)
        self._version = version
        if self._saving is not None:
            self._saving.end_all()
        self._tiers.reset()
        for seq in self._running:
            seq._is_indexed = False

    @property
    def num_available(self) -> int:
        """Device pages that are free or can be made so."""
        return self._tiers.num_available()

    def occupancy(self) -> dict[str, float]:
        """The share of each pool's pages that are not free: held by sequences, or cached."""
        free, num = self._tiers.free_device, self._tiers.free_device.num_pages
        occupancy = {"device": 1 - free.num_free / num}
        if self._host is not None:
            occupancy["host"] = 1 - self._tiers.num_free_host / self._host.num_pages
        return occupancy

    def close(self, flush: float = 0) -> None:
        """Ends what is under way. With `flush`, puts what the host pool has and the stores have not, as far as it gets
        in so many seconds. Whoever closes the stores behind that waits for what is left. Idempotent."""
        flush = flush and checked_seconds("flush", flush)
        if self._saving is not None:
            self._saving.close(flush)

    # ---- what they share ----

    def _end_lease(self, seq: Sequence) -> None:
        if seq._lease is not None:
            seq._lease._end()
            seq._lease = None

    def _match(self, seq: Sequence) -> Entries:
        """The entries of the pages that need not be computed."""
        seq._set_version(self._version)
        limit, tiers = self._matchable(seq), self._tiers
        entries = tiers.index.match(seq._root, seq._all_keys, limit, seq._by_page(limit))
        is_on_device = tiers.device_page[entries] >= 0
        if is_on_device.all():
            return entries
        is_readable = is_on_device | tiers.has_readable(entries)
        if not is_readable.all():
            entries = entries[: int(is_readable.argmin())]
        # A short row of pages to load at the end is computed again.
        on_device = np.flatnonzero(is_on_device[: len(entries)])
        behind = int(on_device[-1]) + 1 if len(on_device) else 0
        return entries if len(entries) - behind >= self._min_pages else entries[:behind]

    def _matchable(self, seq: Sequence) -> int:
        """Pages that may be matched: full ones, and something must be left to compute."""
        return (seq._num_known - 1) // self._page_size

    def _num_pages(self, num_tokens: int) -> int:
        return -(-num_tokens // self._page_size)

    def _index_pages(self, seq: Sequence) -> None:
        """Gives entries to the pages that are full now."""
        begin, end = len(seq._entries), seq.num_committed // self._page_size
        if begin >= end or not seq._is_indexed:
            return
        parent = int(seq._entries[-1]) if begin else seq._root
        keys, tokens, pages = seq._all_keys(end)[begin:end], seq._by_page(end)[begin:], seq._table[begin:end]
        seq._entries = np.concatenate([seq._entries, self._tiers.commit(keys, parent, tokens, pages)])
        seq._is_indexed = len(seq._entries) == end  # else another page has the next key
        self._withdraw(seq, end)

    def _announce(self, seq: Sequence, num_tokens: int) -> None:
        """Tells which pages a sequence is going to compute, as far as its tokens are known."""
        begin, end = len(seq._entries), min(num_tokens, seq._num_known) // self._page_size
        self._pending.update(seq._all_keys(end)[begin:end])
        seq._pending = begin, max(begin, end)

    def _withdraw(self, seq: Sequence, num_pages: int) -> None:
        """Of those, the ones of the first pages, which are there, or will not be."""
        begin, end = seq._pending
        pending = self._pending
        for key in seq._keys[begin : min(num_pages, end)]:
            if pending[key] > 1:
                pending[key] -= 1
            else:
                pending.pop(key)  # `del` is slow: a Counter's is Python
        seq._pending = max(begin, min(num_pages, end)), end

    def _has_room(self, num_pages: int) -> bool:
        """Whether so many device pages are free or can be made so. Who waits for a store keeps nobody from running."""
        missing = num_pages - self._tiers.num_available()
        if missing > 0 and self._saving is not None:
            self._saving.give_up(missing, self._tiers.device_page)
        return num_pages <= self._tiers.num_available()

    def _take_for_copies(self, num: int) -> npt.NDArray[np.int32] | None:
        """Device pages that no store reads which comes with the copies, or behind them."""
        tiers = self._tiers
        self._has_room(num)
        taken: list[int] = []
        kept: list[int] = []
        while len(taken) < num and tiers.num_available():
            page = int(tiers.take(1)[0])
            (kept if page in tiers.stored_pages() else taken).append(page)
        is_enough = len(taken) == num
        tiers.free_device.free(kept if is_enough else kept + taken)
        return np.array(taken, np.int32) if is_enough else None

    def _forget(self, seq: Sequence) -> None:
        self._withdraw(seq, len(seq._keys))
        del self._running[seq]
        seq.is_admitted, seq.num_cached, seq.num_committed = False, 0, 0
        seq._entries, seq._num_pages = np.empty(0, np.intp), 0

    def _ids(self, first: Any, second: Any, size: int) -> tuple[Any, Any]:
        if (num := len(first)) == 0 and size in self._blank_ids:
            return self._blank_ids[size]
        both = np.full(size, -1, np.int32), np.full(size, -1, np.int32)
        both[0][:num], both[1][:num] = first, second
        made = self._make_ids(both[0]), self._make_ids(both[1])
        if not num:
            self._blank_ids[size] = made
        return made

    def _check_kind(self, seq: Sequence) -> None:
        checked_kind("seq", seq, Sequence, "cache.open(tokens) makes one")
        if seq._page_size != self._page_size:
            raise ValueError(f"seq: expected one of pages of {self._page_size} tokens, got one of {seq._page_size}")

    def _check_admitted(self, seq: Sequence) -> None:
        self._check_kind(seq)
        if seq not in self._running:
            raise ValueError(f"seq: expected one that this cache has admitted, and not released since, got {seq}")

    def _check_moves(self, moves: Moves) -> None:
        if moves is not self._moves:
            step = "none" if self._moves is None else f"those of step {self._moves.step}"
            raise ValueError(f"moves: expected what the last step() returned, {step}, got those of step {moves.step}")

    def _check_output(self, output: Any) -> None:
        if output is None:
            return
        leaves = jax.tree.leaves(output)
        if not leaves:
            raise ValueError(f"output: expected arrays of the step, or None, got {shown(output)}")
        arrays = [leaf for leaf in leaves if isinstance(leaf, jax.Array)]
        if self._host is not None and arrays:
            devices = {device for array in arrays for device in array.sharding.addressable_devices}
            if missing := self._host.array.sharding.addressable_devices - devices:
                names = ", ".join(sorted(map(str, missing)))
                raise ValueError(f"output: expected one on every device of the host pool, got none on {names}")

    def _check_in_flight(self, moves: Moves) -> None:
        if all(moves is not other for other, _ in self._in_flight):
            raise ValueError(f"moves: expected those of a step that is dispatched and not done, got step {moves.step}")


def _min_pages(device: DevicePool) -> int:
    arrays = jax.tree.leaves(device.arrays)
    if not arrays or all(each.platform != "gpu" for each in arrays[0].sharding.device_set):
        return 1
    return max(1, round(current().min_stage_bytes / (_LOAD_COST * device.spec.payload_bytes)))
