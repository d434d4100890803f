"""What Wakecall's rules make of traffic, in numbers: seeded, on no clock at all."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from .comparison import FLEETS, SERVICES, compare, table
from .policies import LeastConnections, SingleQueue, Wakecall
from .world import Job, Publisher, poisson, simulate

PAGE = Path(__file__).resolve().parents[2] / "docs" / "explanation" / "placement.md"

EIGHT = FLEETS["one slot each"]
BOTH = list(itertools.product(FLEETS, SERVICES))


def jain(shares):
    """Jain's index of fairness (R. Jain, D.-M. Chiu, W. Hawe, DEC-TR-301, 1984): 1 if all have the same."""
    return sum(shares) ** 2 / (len(shares) * sum(share**2 for share in shares))


# Balance


@pytest.mark.parametrize(("fleet", "service"), BOTH)
def test_callers_wait_about_as_long_as_with_an_ideal_queue(fleet, service):
    """Which knows how fast everybody is; Wakecall has to find out. And far shorter than where one is bound on arrival."""
    waits = compare(fleet, service)
    assert waits["ideal single queue"].p99 > 1.0, "nobody waited: there is nothing to compare"
    # Of several slots the least loaded goes first, whatever its speed: in 200,000 arrivals that is 1.05, and 1.16 if
    # lognormal. (Few wait there, and the hundredth part of 20,000 varies by a tenth to either side.)
    bound = 1.2 if fleet == "one slot each" else 1.3
    assert waits["Wakecall"].p99 <= bound * waits["ideal single queue"].p99
    assert waits["Wakecall"].p99 < 0.5 * waits["least connections"].p99
    assert waits["Wakecall"].p99 < 0.01 * waits["round robin"].p99
    assert waits["Wakecall"].response <= 1.2 * waits["ideal single queue"].response


@pytest.mark.parametrize(("fleet", "service"), BOTH)
def test_the_page_has_the_table_as_it_is_printed(fleet, service):
    """If this fails the rules have changed: `python -m tests.simulations`, and its table goes there."""
    assert "\n".join(table(fleet, service)) in PAGE.read_text()


def test_an_ideal_queue_is_what_the_theory_says():
    """The simulation itself: of one slot at 80 % load, exponential both ways, the mean wait is four services (M/M/1)."""
    publishers = [Publisher("alone", 1.0)]
    jobs = poisson(publishers, 60_000, seed=1, load=0.8, service="exponential", mean_work=1.0)
    waits = [job.wait for job in simulate(SingleQueue, publishers, jobs)]
    assert sum(waits) / len(waits) == pytest.approx(4.0, rel=0.15)


# Failing


def share_of_failing(policy, victim, *, load, mean_work=8.0):
    """Of the infers after the moment from which on `victim` fails all at once: what part went to it."""
    jobs = poisson(EIGHT, 8_000, seed=3, load=load, service="lognormal", mean_work=mean_work)
    moment = jobs[2_000].arrived
    publishers = [
        publisher._replace(fails_from=moment) if index == victim else publisher for index, publisher in enumerate(EIGHT)
    ]
    after = [job for job in simulate(policy, publishers, jobs) if job.started >= moment]
    return sum(job.publisher == victim for job in after) / len(after)


@pytest.mark.parametrize(
    ("victim", "load"),
    [
        # Without the slowest or a middling one the others bear 80 %; without the fastest, 70.
        pytest.param(0, 0.8, id="the-slowest"),
        pytest.param(3, 0.8, id="a-middling-one"),
        pytest.param(7, 0.7, id="the-fastest"),
        # Where it would have been idle, and first choice, each time.
        pytest.param(7, 0.2, id="the-fastest-of-many-idle"),
        pytest.param(7, 0.03, id="the-fastest-where-little-comes"),
    ],
)
def test_one_that_fails_at_once_gets_less_than_two_percent(victim, load):
    """From the first failure on, which is counted. Fewest connections would send it whatever comes while it looks free."""
    assert 0 < share_of_failing(Wakecall, victim, load=load) < 0.02
    assert share_of_failing(LeastConnections, victim, load=load) > 0.1


def test_one_that_fails_for_a_while_has_its_share_again():
    """It is tried, does well, and is trusted: a fifth of the later infers go to the fastest of eight, as before."""
    jobs = poisson(EIGHT, 8_000, seed=3, load=0.7, service="lognormal", mean_work=8.0)
    sick, well = jobs[2_000].arrived, jobs[4_000].arrived
    publishers = [*EIGHT[:-1], EIGHT[-1]._replace(fails_from=sick, fails_until=well)]
    done = simulate(Wakecall, publishers, jobs)

    def share(jobs):
        return sum(job.publisher == 7 for job in jobs) / len(jobs)

    assert share(done[2_100:4_000]) < 0.02
    before, after = share(done[:2_000]), share(done[5_000:])
    assert before > 0.15
    assert after == pytest.approx(before, rel=0.15)


# Fairness


def backlog(key, count, *, works, arrived=0.0):
    return [Job(key, arrived, next(works), 0.1) for _ in range(count)]


def test_ten_keys_that_always_wait_get_the_same():
    """Of a pool of eight publishers; in infers, and in the work that they are."""
    sizes = poisson(EIGHT, 10_000, seed=5, load=1.0, service="exponential", mean_work=8.0)
    works = (job.work for job in sizes)
    jobs = [job for key in "abcdefghij" for job in backlog(key, 1_000, works=works)]
    done = simulate(Wakecall, EIGHT, jobs)
    middle = max(job.ended for job in done) / 2
    half = [job for job in done if job.ended <= middle]
    assert len(half) > 4_000
    shares = [[job.work for job in half if job.key == key] for key in "abcdefghij"]
    assert jain([len(works) for works in shares]) >= 0.99
    assert jain([sum(works) for works in shares]) >= 0.99


def test_keys_of_long_and_of_short_answers_get_the_same_work():
    """Five ask for twice as much as the other five each time: they get half as many answers."""
    sizes = poisson(EIGHT, 10_000, seed=6, load=1.0, service="exponential", mean_work=8.0)
    long, short = (job.work * 4 / 3 for job in sizes), (job.work * 2 / 3 for job in sizes)
    jobs = [job for key in "abcdefghij" for job in backlog(key, 1_000, works=long if key < "f" else short)]
    done = simulate(Wakecall, EIGHT, jobs)
    first = max(job.ended for job in done) / 3
    third = [job for job in done if job.ended <= first]
    assert jain([sum(job.work for job in third if job.key == key) for key in "abcdefghij"]) >= 0.99
    assert jain([sum(job.key == key for job in third) for key in "abcdefghij"]) < 0.95


@pytest.mark.parametrize("arrives", [0.0, 0.01, 17.3, 500.99])
def test_a_thousand_of_one_key_cost_another_one_service_at_the_most(arrives):
    """Whenever it comes: one publisher, one slot, and services of one second."""
    ones = itertools.repeat(1.0)
    many = backlog("many", 1_000, works=ones)
    one = backlog("one", 1, works=ones, arrived=arrives)
    done = simulate(Wakecall, [Publisher("alone", 1.0)], sorted([*many, *one], key=lambda job: job.arrived))
    assert next(job.wait for job in done if job.key == "one") <= 1.0
    assert max(job.wait for job in done) == 1_000.0


def test_a_caller_who_comes_now_and_then_never_waits_for_more_than_what_is_under_way():
    """Two hundred times, beside a thousand of another key."""
    ones = itertools.repeat(1.0)
    many = backlog("many", 1_000, works=ones)
    steady = [job for number in range(200) for job in backlog("steady", 1, works=ones, arrived=number * 2.5)]
    done = simulate(Wakecall, [Publisher("alone", 1.0)], sorted([*many, *steady], key=lambda job: job.arrived))
    waits = [job.wait for job in done if job.key == "steady"]
    assert len(waits) == 200
    assert max(waits) <= 1.0
