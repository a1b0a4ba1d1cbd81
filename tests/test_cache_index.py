"""The index of a `KVCache`, alone: against lists and dictionaries that do the same slowly."""

import math
import random

import numpy as np
import pytest

from jax_kvpool.cache.index import Index, Recency


class SlowRecency:
    """Two lists, of the cold and of the other entries, the oldest first."""

    def __init__(self, share):
        self.share, self.cold, self.warm = share, [], []

    def discard(self, entries):
        self.cold = [entry for entry in self.cold if entry not in entries]
        self.warm = [entry for entry in self.warm if entry not in entries]

    def add(self, entries):
        self.discard(entries)
        self.warm += entries

    def add_oldest(self, entries):
        self.discard(entries)
        self.cold = entries + self.cold

    def oldest(self, num):
        return (self.cold + self.warm)[:num]

    def take_oldest(self, num):
        entries = self.oldest(num)
        self.discard(entries)
        return entries

    def cool(self):
        num = max(math.ceil(self.share * len(self.cold + self.warm)) - len(self.cold), 0)
        cooled, self.warm = self.warm[:num], self.warm[num:]
        self.cold += cooled
        return cooled


@pytest.mark.parametrize("share", [0, 0.05, 0.5, 1])
@pytest.mark.parametrize("num_pages", [1, 40, 300, 3000])
def test_recency(num_pages, share):
    """Also with far more holes than entries, and with pages that stay for ever among others that come and go."""
    rng = random.Random(num_pages)
    capacity = 2 * num_pages
    recency, slow = Recency(capacity, num_pages, share), SlowRecency(share)
    for i in range(min(1500, 600_000 // num_pages)):
        batch = rng.sample(range(capacity), rng.randint(0, min(capacity, rng.choice([2, 100, num_pages]))))
        action = rng.choices(["add", "add_oldest", "discard", "take_oldest", "oldest", "cool"], [6, 1, 4, 1, 1, 3])[0]
        if action in ("add", "add_oldest"):
            known = set(slow.cold + slow.warm)
            new = [entry for entry in batch if entry not in known]
            batch = [entry for entry in batch if entry in known] + new[: num_pages - len(known)]
        if action in ("take_oldest", "oldest"):
            num = rng.randint(0, len(slow.cold + slow.warm)) if rng.random() < 0.2 else 1
            result, expected = getattr(recency, action)(num), getattr(slow, action)(num)
        elif action == "cool":
            result, expected = recency.cool(), slow.cool()
        else:
            result, expected = getattr(recency, action)(np.array(batch, np.intp)), getattr(slow, action)(batch)
        if result is not None:
            assert result.tolist() == expected, i
        assert len(recency) == len(slow.cold + slow.warm)
        if i % 50 == 0:
            assert recency.oldest(num_pages).tolist() == slow.cold + slow.warm
            is_in = recency.has(np.arange(capacity))
            assert np.flatnonzero(is_in).tolist() == sorted(slow.cold + slow.warm)


def keys_of(num, first=0):
    return [bytes([n % 256, n // 256, *bytes(30)]) for n in range(first, first + num)]


def test_an_index_that_is_full_and_empty_again():
    index = Index(100, 4)
    tokens = np.arange(400, dtype=np.int32).reshape(100, 4)
    for _ in range(3):
        entries, new = index.insert(keys_of(100), b"root key", tokens)
        assert sorted(entries.tolist()) == [*range(100)] and new.tolist() == entries.tolist()
        index.copies[entries] += 1
        assert index.match(b"root key", keys_of, 100, tokens).tolist() == entries.tolist()
        assert index.match(b"another root", keys_of, 100, tokens).tolist() == []
        index.hide(entries[50:60])
        assert index.match(b"root key", keys_of, 100, tokens).tolist() == entries[:50].tolist()
        index.drop_copies(entries)
        assert not len(index.entries()) and not any(index._by_key)


def test_a_miss_asks_for_few_keys():
    asked = []
    index = Index(4, 4)

    def keys(num):
        asked.append(num)
        return keys_of(num)

    assert not len(index.match(b"root key", keys, 10**6, np.zeros((10**6, 4), np.int32)))
    assert asked == [1]
    index.insert(keys_of(4), b"root key", np.zeros((4, 4), np.int32))
    index.match(b"root key", keys, 10**6, np.zeros((10**6, 4), np.int32))
    assert max(asked) == 5


def test_a_page_whose_parent_is_gone_is_not_found():
    index = Index(10, 2)
    tokens = np.arange(8, dtype=np.int32).reshape(4, 2)
    known, _ = index.insert(keys_of(4), b"root key", tokens)
    index.copies[known] += 1
    index.drop_copies(known[1:2])  # and what was behind it has no parent any more
    assert index.match(b"root key", keys_of, 4, tokens).tolist() == known[:1].tolist()
    entries, new = index.insert(keys_of(4), b"root key", tokens)
    assert entries[0] == known[0] and new.tolist() == entries[1:].tolist() and len(new) == 3
    assert not {*new.tolist()} & {*known[2:].tolist()}
    index.copies[new] += 1
    index.drop_copies(known[2:])  # of the same keys
    assert index.match(b"root key", keys_of, 4, tokens).tolist() == entries.tolist()


def test_branches():
    """Of pages behind the same page, one is its child, the others are found by their keys, whoever goes first."""
    rng = random.Random(0)
    index = Index(200, 2)
    prompts = {}
    for _ in range(300):
        if prompts and rng.random() < 0.45:
            index.drop_copies(prompts.pop(rng.choice([*prompts]))[::-1])
        prompt = tuple(rng.choice("abc") for _ in range(5))
        if prompt in prompts or len(index.entries()) > 195:
            continue
        keys = [bytes([*prompt[: i + 1].__repr__().encode()]).ljust(32)[-32:] for i in range(5)]
        tokens = np.array([[ord(letter), i] for i, letter in enumerate(prompt)], np.int32)
        entries, _ = index.insert(keys, b"root key", tokens)
        index.copies[entries] += 1
        prompts[prompt] = entries
        for known, of_known in prompts.items():
            common = next((i for i in range(5) if known[i] != prompt[i]), 5)
            assert (of_known == entries).tolist() == [i < common for i in range(5)]
        found = index.match(b"root key", lambda num, keys=keys: keys[:num], 5, tokens)
        assert found.tolist() == entries.tolist()
