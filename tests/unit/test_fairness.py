"""The waiting line: what it promises, by example and in numbers, and all of it against lists, walked turn by turn."""

from __future__ import annotations

import copy
import itertools
import random
from collections import Counter

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from wakecall.fairness import FairLine, Lane

ROWS = ("red", "blue")
KEYS = (None, "a", "b")


def nobody(item):
    raise AssertionError(f"{item} has not moved")


def line_of(counts, *, priority="interactive"):
    """So many waiting of each key, named `key0`, `key1`, …; all of one key come before the next key's."""
    line = FairLine()
    for key, count in counts.items():
        for number in range(count):
            line.add(f"{key}{number}", key=key, lane=Lane.ANY, priority=priority)
    return line


def drain(line, row="red"):
    return list(iter(lambda: line.pop(row, nobody), None))


def jain(shares):
    """Jain's index of fairness (R. Jain, D.-M. Chiu, W. Hawe, DEC-TR-301, 1984): 1 if all have the same."""
    return sum(shares) ** 2 / (len(shares) * sum(share**2 for share in shares))


def test_one_key_is_first_come_first_served_over_all_lanes():
    line = FairLine()
    lanes = ["red", Lane.ANY, Lane.MOVED, Lane.ANY, "red", Lane.MOVED]
    for number, lane in enumerate(lanes):
        line.add(number, key="a", lane=lane, priority="interactive")
    assert [line.pop("red", lambda item: True) for _ in range(7)] == [0, 1, 2, 3, 4, 5, None]


def test_a_row_gets_only_what_it_may_take():
    """Its own, what any may have, and what moved and it accepts; the others wait on, in order."""
    line = FairLine()
    for item, lane in [("b", "blue"), ("m1", Lane.MOVED), ("m2", Lane.MOVED), ("r", "red")]:
        line.add(item, key=None, lane=lane, priority="interactive")
    accepts = {"m2"}.__contains__
    assert [line.pop("red", accepts) for _ in range(3)] == ["m2", "r", None]
    assert not line.has_for("red", accepts)
    assert line.has_for("blue", accepts)
    assert sorted(line) == ["b", "m1"]


def test_a_draining_row_takes_only_what_names_it():
    line = FairLine()
    for item, lane in [("any", Lane.ANY), ("moved", Lane.MOVED), ("named", "red")]:
        line.add(item, key=None, lane=lane, priority="interactive")
    assert line.has_for("red", nobody, only_named=True)
    assert line.pop("red", nobody, only_named=True) == "named"
    assert not line.has_for("red", nobody, only_named=True)
    assert line.pop("red", nobody, only_named=True) is None
    assert len(line) == 2


def test_keys_take_turns():
    assert drain(line_of({"a": 3, "b": 1, "c": 2})) == ["a0", "b0", "c0", "a1", "c1", "a2"]


def test_a_key_with_nothing_for_this_row_keeps_its_place():
    line = FairLine()
    line.add("for blue", key="a", lane="blue", priority="interactive")
    for number in range(3):
        line.add(number, key="b", lane=Lane.ANY, priority="interactive")
    assert [line.pop("red", nobody) for _ in range(2)] == [0, 1]
    assert line.pop("blue", nobody) == "for blue"


def test_what_is_put_back_is_next_again():
    """At the head of its key, and its key at the head of the ring: as if it had not been popped."""
    line = line_of({"a": 2, "b": 2})
    first = line.pop("red", nobody)
    line.add(first, key="a", lane=Lane.ANY, priority="interactive", first=True)
    assert line.ahead(first) == 0
    assert drain(line) == ["a0", "b0", "a1", "b1"]


def test_an_infer_waits_once():
    line = line_of({"a": 1})
    with pytest.raises(AssertionError, match="once"):
        line.add("a0", key="b", lane="red", priority="batch")
    assert (len(line), line.count_key("b"), line.count("red")) == (1, 0, 0)


def test_what_is_discarded_is_gone():
    line = line_of({"a": 3})
    assert line.discard("a1")
    assert not line.discard("a1")
    assert not line.discard("never came")
    assert "a1" not in line
    assert drain(line) == ["a0", "a2"]


def test_nothing_stays_behind_of_what_is_gone():
    """Flows and lanes are as many as what waits needs: keys and rows that come and go leave no trace."""
    line = FairLine()
    for number in range(100):
        line.add(number, key=f"key{number}", lane=f"row{number}", priority="batch" if number % 2 else "interactive")
    for number in range(100):
        assert line.discard(number) if number % 3 else line.pop(f"row{number}", nobody) == number
    for each in (line._interactive, line._batch):
        assert not each.ring
        assert not each.lanes
    assert not line._entries


def test_batch_gets_one_of_ten_while_both_wait():
    line = line_of({"i": 90})
    for number in range(20):
        line.add(("batch", number), key="b", lane=Lane.ANY, priority="batch")
    order = drain(line)
    assert [index for index, item in enumerate(order) if item[0] == "batch"] == [*range(9, 100, 10), *range(100, 110)]


def test_batch_that_this_row_cannot_take_is_not_counted():
    """The tenth pop is batch's only where batch had something for it ten times."""
    line = line_of({"i": 30})
    line.add("elsewhere", key="b", lane="blue", priority="batch")
    for _ in range(15):
        line.pop("red", nobody)
    line.add("here", key="b", lane="red", priority="batch")
    assert drain(line).index("here") == 9


@pytest.mark.parametrize("keys", [2, 3, 10])
@pytest.mark.parametrize("seed", range(3))
def test_a_backlogged_key_is_served_at_least_every_k_pops(keys, seed):
    """Whatever comes meanwhile of however many others: never more than K - 1 pops between two of one key."""
    random_ = random.Random(seed)
    line = line_of(dict.fromkeys(range(keys), 200))
    last = dict.fromkeys(range(keys), -1)
    owner = {f"{key}{number}": key for key in range(keys) for number in range(200)}
    more = itertools.count(200)
    for pop in range(150):
        for _ in range(random_.randrange(3)):
            key, number = random_.randrange(keys), next(more)
            line.add(f"{key}{number}", key=key, lane=Lane.ANY, priority="interactive")
            owner[f"{key}{number}"] = key
        key = owner[line.pop("red", nobody)]
        assert pop - last[key] <= keys
        last[key] = pop


def test_a_thousand_waiting_delay_another_key_by_one_pop_at_the_most():
    """By none when it comes: then it waits for no more than the service that is under way. Its next ones by one each."""
    line = line_of({"many": 1000})
    line.pop("red", nobody)
    for number in range(100):
        line.add(("one", number), key="one", lane=Lane.ANY, priority="interactive")
        line.add(("one", number, "more"), key="one", lane=Lane.ANY, priority="interactive")
        for before, expected in [(0, ("one", number)), (1, ("one", number, "more"))]:
            assert line.ahead(expected) == before
            many = [line.pop("red", nobody) for _ in range(before)]
            assert all(item.startswith("many") for item in many)
            assert line.pop("red", nobody) == expected
        assert line.pop("red", nobody).startswith("many")


def test_one_that_went_without_waiting_has_had_its_turn():
    """A thousand come at once, the first of them finds a slot: the next slot is the other key's, who comes after them."""
    line = FairLine()
    line.note_unwaited("many", "interactive")
    for number in range(3):
        line.add(f"many{number}", key="many", lane=Lane.ANY, priority="interactive")
    line.add("one", key="one", lane=Lane.ANY, priority="interactive")
    assert line.pop("red", nobody) == "one"
    line.add("other", key="other", lane=Lane.ANY, priority="interactive")
    line.note_unwaited("many", "interactive")
    assert drain(line) == ["other", "many0", "many1", "many2"]


def test_a_key_that_comes_and_goes_is_served_no_more_often_than_one_that_stays():
    """It goes before whoever was served last, and that is itself."""
    line = line_of({"stays": 100})
    order = []
    for number in range(60):
        for key in "ab":
            if not line.count_key(key):
                line.add((key, number), key=key, lane=Lane.ANY, priority="interactive")
        order.append(line.pop("red", nobody)[0])
    assert Counter(order) == {"s": 20, "a": 20, "b": 20}


def test_ten_equal_keys_get_the_same():
    """By Jain's index, after any number of pops that is more than a handful."""
    line = line_of(dict.fromkeys(range(10), 100))
    got = Counter(line.pop("red", nobody)[0] for _ in range(505))
    assert jain(list(got.values())) >= 0.99


def served_seconds(services, *, charged):
    """Seconds of service that each of ten keys had of one server, after 4,000 s, all of them always waiting."""
    line = FairLine()
    for key in range(10):
        for number in range(4000):
            line.add((key, number), key=str(key), lane=Lane.ANY, priority="interactive")
    got = [0.0] * 10
    mean, count = 1.0, 0
    while sum(got) < 4000:
        key, _ = line.pop("red", nobody)
        seconds = services(key)
        got[key] += seconds
        count += 1
        mean += (seconds - mean) / min(count, 200)
        if charged:
            line.charge(str(key), "interactive", seconds / mean - 1)
    return got


def test_ten_keys_of_different_services_get_the_same_seconds():
    """One asks for answers up to three times as long as another's: that is what `charge` is for."""
    random_ = random.Random(4)

    def services(key):
        return random_.expovariate(1 / (0.5 + key / 9))

    assert jain(served_seconds(services, charged=False)) < 0.95
    assert jain(served_seconds(services, charged=True)) >= 0.99


def test_a_charge_is_bounded_both_ways():
    """An answer of an hour shuts its key out for eight turns; a thousand short ones buy one infer more in a turn."""
    line = line_of({"a": 30, "b": 30})
    line.charge("a", "interactive", 1e6)
    for _ in range(1000):
        line.charge("b", "interactive", -1.0)
    order = drain(line)
    assert order.index("a0") == 9
    assert order[9:13] == ["a0", "b9", "a1", "b10"]


def test_where_everybody_owes_the_least_is_served_at_once():
    """Nobody is made to wait for a row that is free."""
    line = line_of({"a": 2, "b": 2, "c": 2})
    for key, amount in [("a", 5.0), ("b", 2.0), ("c", 7.5)]:
        line.charge(key, "interactive", amount)
    assert drain(line) == ["b0", "b1", "a0", "a1", "c0", "c1"]


def test_a_key_that_left_owes_nothing():
    line = line_of({"a": 1})
    line.pop("red", nobody)
    line.charge("a", "interactive", 8.0)
    for item in ("a1", "a2", "b1", "b2"):
        line.add(item, key=item[0], lane=Lane.ANY, priority="interactive")
    assert drain(line) == ["b1", "a1", "b2", "a2"]


def test_the_oldest_of_a_row_is_the_first_come_of_all_keys_and_classes():
    line = FairLine()
    assert line.oldest("red") is None
    for item, key, lane, priority in [
        ("any", "a", Lane.ANY, "interactive"),
        ("other", "a", "blue", "interactive"),
        ("batch", "b", "red", "batch"),
        ("late", "a", "red", "interactive"),
    ]:
        line.add(item, key=key, lane=lane, priority=priority)
    assert line.oldest("red") == "batch"
    line.add("back", key="c", lane="red", priority="interactive", first=True)
    assert line.oldest("red") == "back"


@pytest.mark.parametrize("seed", range(5))
def test_ahead_is_how_many_go_before_it(seed):
    """Of every one that waits, in both classes, some of which have been cancelled and some popped before."""
    random_ = random.Random(seed)
    line = FairLine()
    for number in range(300):
        line.add(
            number, key=random_.choice("abcdefg"), lane=Lane.ANY, priority=random_.choice(["interactive", "batch"])
        )
    for number in random_.sample(range(300), 60):
        line.discard(number)
    for _ in range(random_.randrange(40)):
        line.pop("red", nobody)
    for key, priority in itertools.product(["a", "new"], ["interactive", "batch"]):
        before = line.ahead_of_next(key, priority)
        line.add("next", key=key, lane=Lane.ANY, priority=priority)
        assert line.ahead("next") == before
        line.discard("next")
    told = {item: line.ahead(item) for item in line}
    assert told == {item: index for index, item in enumerate(drain(line))}


class Lists:
    """The same line as lists: every turn is walked, every question is answered by looking at everything."""

    def __init__(self):
        self.came = []  # (item, key, lane, priority), as they came
        self.ring = {"interactive": [], "batch": []}  # [key, deficit, items], the one with the turn first
        self.last = {}
        self.contested = 0

    def add(self, entry, first):
        item, key, _, priority = entry
        ring = self.ring[priority]
        flow = next((flow for flow in ring if flow[0] == key), None)
        if flow is None:
            flow = [key, 0.0, []]
            ring.append(flow)
            if priority in self.last and self.last[priority] != key:
                ring.sort(key=lambda flow: flow[0] == self.last[priority])
        if first:
            ring.remove(flow)
            ring.insert(0, flow)
        flow[2].insert(0 if first else len(flow[2]), item)
        self.came.insert(0 if first else len(self.came), entry)

    def remove(self, item):
        self.came = [entry for entry in self.came if entry[0] != item]
        for ring in self.ring.values():
            for flow in list(ring):
                flow[2] = [each for each in flow[2] if each != item]
                if not flow[2]:
                    ring.remove(flow)

    def charge(self, key, priority, amount):
        for flow in self.ring[priority]:
            if flow[0] == key:
                flow[1] = min(max(flow[1] - amount, -8), 1)

    def pop(self, may):
        """`may`: whether this row may have an entry."""
        open_to = {entry[0] for entry in self.came if may(entry)}
        found = {name: any(open_to & set(flow[2]) for flow in ring) for name, ring in self.ring.items()}
        if not any(found.values()):
            return None
        priority = "interactive" if found["interactive"] else "batch"
        if all(found.values()):
            self.contested += 1
            if self.contested == 10:
                priority, self.contested = "batch", 0
        ring = self.ring[priority]
        while True:
            flow = next(flow for flow in ring if open_to & set(flow[2]))
            before = flow[1]
            if before >= 1:
                flow[1] -= 1
            else:
                ring.remove(flow)
                ring.append(flow)
            if before >= 0:
                self.last[priority] = flow[0]
                item = next(each for each in flow[2] if each in open_to)
                self.remove(item)
                return item
            flow[1] += 1

    def drain(self):
        return list(iter(lambda: self.pop(lambda entry: True), None))


class FairLineMachine(RuleBasedStateMachine):
    """Whatever comes, goes, moves, is put back and charged: nothing is lost or doubled, and the order is the lists'."""

    @initialize()
    def begin(self):
        self.line = FairLine()
        self.lists = Lists()
        self.numbers = itertools.count()
        self.popped = []

    @rule(
        key=st.sampled_from(KEYS),
        lane=st.sampled_from([Lane.ANY, Lane.ANY, Lane.MOVED, *ROWS]),
        priority=st.sampled_from(["interactive", "interactive", "batch"]),
        count=st.integers(1, 4),
    )
    def add(self, key, lane, priority, count):
        for _ in range(count):
            entry = (next(self.numbers), key, lane, priority)
            self.line.add(entry[0], key=key, lane=lane, priority=priority)
            self.lists.add(entry, first=False)

    @rule(key=st.sampled_from(KEYS), priority=st.sampled_from(["interactive", "batch"]))
    def send_without_waiting(self, key, priority):
        self.line.note_unwaited(key, priority)
        self.lists.last[priority] = key
        self.lists.ring[priority].sort(key=lambda flow: flow[0] == key)

    @precondition(lambda self: self.popped)
    @rule(data=st.data())
    def put_back(self, data):
        entry = self.popped.pop(data.draw(st.integers(0, len(self.popped) - 1)))
        item, key, lane, priority = entry
        self.line.add(item, key=key, lane=lane, priority=priority, first=True)
        self.lists.add(entry, first=True)

    @precondition(lambda self: self.lists.came)
    @rule(data=st.data())
    def discard(self, data):
        item = data.draw(st.sampled_from(self.lists.came))[0]
        assert self.line.discard(item)
        assert not self.line.discard(item)
        self.lists.remove(item)

    @rule(row=st.sampled_from(ROWS), refuses=st.integers(1, 3), only_named=st.booleans(), count=st.integers(1, 12))
    def pop(self, row, refuses, only_named, count):
        moved = {entry[0] for entry in self.lists.came if entry[2] is Lane.MOVED}

        def accepts(item):
            assert item in moved
            return item % refuses == 0

        def may(entry):
            item, _, lane, _ = entry
            return lane == row or (
                not only_named and (lane is Lane.ANY or (lane is Lane.MOVED and item % refuses == 0))
            )

        for _ in range(count):
            entries = {entry[0]: entry for entry in self.lists.came}
            has = self.line.has_for(row, accepts, only_named=only_named)
            item = self.line.pop(row, accepts, only_named=only_named)
            assert item == self.lists.pop(may)
            assert has == (item is not None)
            if item is not None:
                self.popped.append(entries[item])

    # Quarters, so that one sum is what many are.
    @precondition(lambda self: self.lists.came)
    @rule(data=st.data(), quarters=st.sampled_from([-8, -4, -3, -2, -1, 1, 3, 8, 50]))
    def charge(self, data, quarters):
        _, key, _, priority = data.draw(st.sampled_from(self.lists.came))
        self.line.charge(key, priority, quarters / 4)
        self.lists.charge(key, priority, quarters / 4)

    @rule(key=st.sampled_from(KEYS), priority=st.sampled_from(["interactive", "batch"]))
    def charge_whether_it_waits_or_not(self, key, priority):
        self.line.charge(key, priority, 1.0)
        self.lists.charge(key, priority, 1.0)

    @rule()
    def ask_how_many_go_before(self):
        future = copy.deepcopy(self.lists)
        order = future.drain()
        assert {item: self.line.ahead(item) for item in self.line} == {item: index for index, item in enumerate(order)}
        for key, priority in itertools.product(KEYS, ["interactive", "batch"]):
            with_it = copy.deepcopy(self.lists)
            with_it.add(("next", key, Lane.ANY, priority), first=False)
            assert self.line.ahead_of_next(key, priority) == with_it.drain().index("next")

    @invariant()
    def says_what_waits(self):
        came = self.lists.came
        assert len(self.line) == len(came)
        assert sorted(self.line) == sorted(entry[0] for entry in came)
        assert all(entry[0] in self.line for entry in came)
        for lane in (*Lane, *ROWS):
            assert self.line.count(lane) == sum(entry[2] == lane for entry in came)
        for row in ROWS:
            assert self.line.oldest(row) == next((entry[0] for entry in came if entry[2] == row), None)
        for key in KEYS:
            assert self.line.count_key(key) == sum(entry[1] == key for entry in came)


TestFairLine = FairLineMachine.TestCase
# The same examples each time: a search is for a person who has the time.
TestFairLine.settings = settings(
    max_examples=100,
    stateful_step_count=40,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
