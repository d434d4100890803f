"""Many deadlines on one heap, against the simplest thing that could be right: a dict from deadline to instant."""

import math

import pytest
import trio
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, rule
from trio.testing import wait_all_tasks_blocked

from wakecall.deadlines import Deadline, Deadlines

INSTANTS = st.integers(0, 40).map(float)


class DeadlinesMachine(RuleBasedStateMachine):
    """Whatever is armed, moved to and fro, disarmed and fired: each fires once, when it is due, and nothing else does."""

    made = Bundle("made")

    @initialize()
    def begin(self):
        self.heap = Deadlines()
        self.now = 0.0
        self.fired = []
        self.expected = {}  # deadline → due, of those armed
        self.again = {}  # deadline → what to add to the instant at which it fires, to be armed for again

    @rule(target=made)
    def make(self):
        deadline = Deadline(lambda: self.on_fire(deadline))
        return deadline

    def on_fire(self, deadline):
        self.fired.append(deadline)
        if deadline in self.again:
            due = self.now + self.again.pop(deadline)
            self.expected_again[deadline] = due
            self.heap.arm(deadline, due)

    @rule(deadline=made, later=INSTANTS, sooner=INSTANTS | st.just(math.inf))
    def arm(self, deadline, later, sooner):
        if deadline.fire is not None:
            self.heap.arm(deadline, self.now + later, self.now + sooner)
            self.expected[deadline] = self.now + later

    @rule(deadline=made, later=INSTANTS.filter(bool))
    def arm_again_when_it_fires(self, deadline, later):
        self.again[deadline] = later

    @rule(deadline=made)
    def disarm(self, deadline):
        self.heap.disarm(deadline)
        self.heap.disarm(deadline)
        self.expected.pop(deadline, None)
        assert deadline.fire is None, "it lets go of what it held"

    @rule(step=INSTANTS)
    def pass_time(self, step):
        self.now += step
        self.fired, self.expected_again = [], {}
        due = {each for each, at in self.expected.items() if at <= self.now}
        next_look = self.heap.fire_due(self.now)
        assert len(self.fired) == len(set(self.fired))
        assert set(self.fired) == due
        for each in due:
            del self.expected[each]
        self.expected |= self.expected_again
        assert next_look <= min(self.expected.values(), default=math.inf), "it would look too late"
        assert next_look > self.now

    @invariant()
    def it_counts_what_is_armed_and_stays_small(self):
        if hasattr(self, "heap"):
            assert self.heap.armed == len(self.expected)
            assert len(self.heap) <= 2 * self.heap.armed + 33


TestDeadlines = DeadlinesMachine.TestCase
TestDeadlines.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)


def armed_at(heap, due, fired, name):
    deadline = Deadline(lambda: fired.append(name))
    heap.arm(deadline, due)
    return deadline


def test_of_equals_the_one_armed_first_fires_first():
    heap, fired = Deadlines(), []
    for name in range(10):
        armed_at(heap, 5.0, fired, name)
    heap.fire_due(5.0)
    assert fired == list(range(10))


def test_moving_a_deadline_later_costs_no_entry():
    heap, fired = Deadlines(), []
    deadline = armed_at(heap, 1.0, fired, "x")
    for due in range(2, 1000):
        heap.arm(deadline, float(due))
    assert len(heap) == 1
    assert heap.fire_due(998.5) == 999.0
    assert fired == []
    heap.fire_due(999.0)
    assert fired == ["x"]


@pytest.mark.parametrize("move", ["earlier", "disarmed"])
def test_entries_that_will_be_passed_over_are_swept_out(move):
    """A thousand that ended early leave no thousand entries behind, nor does one that moved a thousand times."""
    heap, fired = Deadlines(), []
    kept = armed_at(heap, 5000.0, fired, "kept")
    for i in range(1000):
        if move == "earlier":
            heap.arm(kept, 4999.0 - i)
        else:
            heap.disarm(armed_at(heap, 10.0, fired, i))
    assert heap.armed == 1
    assert len(heap) <= 2 + 33
    heap.fire_due(5000.0)
    assert fired == ["kept"]
    assert (len(heap), heap.armed) == (0, 0)


def test_an_old_entry_at_the_same_instant_is_not_taken_for_the_new_one():
    """Moved earlier, fired, and armed for the very instant that its first entry still bears: it fires there once."""
    heap, fired = Deadlines(), []
    deadline = armed_at(heap, 10.0, fired, "x")
    heap.arm(deadline, 5.0)
    heap.fire_due(5.0)
    heap.arm(deadline, 10.0)
    assert heap.armed == 1
    heap.fire_due(10.0)
    assert fired == ["x", "x"]
    assert (len(heap), heap.armed) == (0, 0)


def test_a_deadline_that_disarms_another_due_at_once_spares_it():
    heap, fired = Deadlines(), []
    second = Deadline(lambda: fired.append("second"))
    first = Deadline(lambda: heap.disarm(second))
    heap.arm(first, 1.0)
    heap.arm(second, 1.0)
    assert heap.fire_due(1.0) == math.inf
    assert fired == []


async def test_run_fires_each_in_its_instant(autojump_clock):
    heap, fired = Deadlines(), []
    begin = trio.current_time()
    for due in (3.0, 1.0, 2.0):
        heap.arm(Deadline(lambda: fired.append(trio.current_time() - begin)), begin + due)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(heap.run)
        await wait_all_tasks_blocked()
        # An earlier one wakes the sleeper earlier.
        heap.arm(Deadline(lambda: fired.append(trio.current_time() - begin)), begin + 0.5)
        await trio.sleep(10)
        assert fired == [0.5, 1.0, 2.0, 3.0]
        nursery.cancel_scope.cancel()


def test_one_that_was_to_be_looked_at_early_is_moved_there_for_nothing():
    """One entry in the heap, as often as it comes forward; and until then it fires when it was to fire."""
    heap, fired = Deadlines(), []
    moved, left = Deadline(lambda: fired.append("moved")), Deadline(lambda: fired.append("left"))
    heap.arm(moved, 100.0, 10.0)
    heap.arm(left, 90.0, 10.0)
    heap.arm(moved, 50.0)
    heap.arm(moved, 12.0)
    assert len(heap) == 2
    assert heap.fire_due(10.0) == 12.0
    assert fired == []
    assert heap.fire_due(12.0) == 90.0
    assert fired == ["moved"]
    heap.fire_due(90.0)
    assert fired == ["moved", "left"]
