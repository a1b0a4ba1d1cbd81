import hypothesis.stateful as stateful
import pytest
from hypothesis import strategies as st

from jax_kvpool import OutOfPagesError, PageAllocator, StalePageError


def test_all_or_nothing():
    pages = PageAllocator(5)
    held = pages.allocate(3)
    with pytest.raises(OutOfPagesError, match="3 pages wanted, 2 of 5 are free"):
        pages.allocate(3)
    assert pages.num_free == 2
    assert sorted([*held, *pages.allocate(2)]) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("freed", [[0, 0], [0, 1, 0], [4], [0, 4]])
def test_double_free_changes_nothing(freed):
    pages = PageAllocator(5)
    assert pages.allocate(3).tolist() == [0, 1, 2]
    with pytest.raises(StalePageError):
        pages.free(freed)
    assert pages.num_free == 2
    pages.free([0, 1, 2])


def test_use_after_free_and_reuse():
    pages = PageAllocator(2)
    held = pages.allocate(2)
    generations = pages.generations(held)
    pages.check(held, generations)
    pages.free(held[:1])
    with pytest.raises(StalePageError, match=r"\[0\]"):
        pages.check(held, generations)
    assert pages.allocate(1).tolist() == [0]  # the same page, another owner
    with pytest.raises(StalePageError):
        pages.check(held, generations)
    pages.check(held[1:], generations[1:])
    with pytest.raises(StalePageError):  # not ours any more: it stays the other's
        pages.free(held[:1], generations[:1])
    pages.free(held[1:], generations[1:])
    with pytest.raises(ValueError, match="generations: expected one for each of 2 pages"):
        pages.check(held, generations[:1])


@pytest.mark.parametrize("bad", [[-1], [5], [[0]], [0.5]])
def test_bad_ids(bad):
    with pytest.raises((IndexError, TypeError), match="pages"):
        PageAllocator(5).free(bad)


class AgainstSets(stateful.RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.pages = PageAllocator(7)
        self.held = {}

    @stateful.rule(num=st.integers(0, 9))
    def allocate(self, num):
        if num > 7 - len(self.held):
            with pytest.raises(OutOfPagesError):
                self.pages.allocate(num)
            return
        new = self.pages.allocate(num)
        assert len(set(new.tolist())) == num and not set(new.tolist()) & set(self.held)
        self.held.update(zip(new.tolist(), self.pages.generations(new).tolist(), strict=True))

    @stateful.rule(ids=st.lists(st.integers(0, 6), max_size=7))
    def free(self, ids):
        if len(set(ids)) == len(ids) and set(ids) <= set(self.held):
            self.pages.free(ids)
            for page in ids:
                with pytest.raises(StalePageError):
                    self.pages.check([page], [self.held.pop(page)])
        else:
            with pytest.raises(StalePageError):
                self.pages.free(ids)

    @stateful.invariant()
    def counts_and_generations(self):
        assert self.pages.num_free == 7 - len(self.held)
        self.pages.check(list(self.held), list(self.held.values()))


TestAgainstSets = AgainstSets.TestCase
