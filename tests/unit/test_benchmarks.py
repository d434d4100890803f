"""The benchmark itself: its tool builds, every kind of traffic goes through, and what it writes down is right. No speeds."""

from __future__ import annotations

import math
import subprocess
from collections.abc import Iterator
from types import ModuleType
from xml.etree import ElementTree

import pytest
from tests.benchmarks import death, heartbeats, memory, pace, plainly, report, svg, tool, traffic, wakes
from tests.benchmarks.report import Bar, Figure
from tests.benchmarks.servers import Server, server
from tests.benchmarks.sizes import EVENTS, chat, post
from tests.programs import program


@pytest.fixture(scope="module", autouse=True)
def compiler() -> None:
    program("cc", "gcc libc6-dev")


@pytest.fixture(scope="module")
def ours() -> Iterator[Server]:
    with server("wakecall", None) as running:
        yield running


@pytest.fixture(scope="module")
def floor() -> Iterator[Server]:
    with server("floor-guarded", None) as running:
        yield running


def test_plain_infers_go_through_by_one_result_post_each(ours: Server) -> None:
    request = post("/v1/chat/completions", chat(), ours.client)
    found = tool.requests(ours.port, [request], 4, 0.1, tool.Publisher(server=ours, kept=2))
    assert found["answers"] > 0
    assert 0 < found["latency_median_ms"] <= found["latency_p99_ms"]


def test_plain_infers_go_through_on_a_shared_upload_where_there_is_one(ours: Server) -> None:
    """Where the broker offers none, the publisher says so instead of taking the other way unseen."""
    request = post("/v1/chat/completions", chat(), ours.client)
    publisher = tool.Publisher(server=ours, is_shared=True)
    if tool.offers_shared(ours):
        found = tool.requests(ours.port, [request], 4, 0.1, publisher)
        assert found["records"] >= found["all_answers"] > 0
    else:
        with pytest.raises(RuntimeError, match="offers no shared upload"):
            tool.requests(ours.port, [request], 4, 0.1, publisher)


def test_streams_are_counted_by_their_events(ours: Server, floor: Server) -> None:
    """Every answer has all its events, however many of them arrive in one read."""
    body = chat(stream=True)
    publisher = tool.Publisher(server=ours, kept=3)
    for found in (
        tool.streams(ours.port, post("/v1/chat/completions", body, ours.client), 3, 0.1, publisher),
        tool.streams(floor.port, post("/stream", body), 3, 0.1),
    ):
        assert found["all_events"] == found["all_answers"] * EVENTS > 0


def test_paced_streams_tell_how_late_each_chunk_is(ours: Server, floor: Server) -> None:
    figures = pace.compare(floor, ours, 3, 0.2, (0.0, 0.0))
    assert all(math.isfinite(figure.value) and figure.ours > 0 for figure in figures)
    assert all(figure.floor is not None and figure.floor > 0 for figure in figures)


def test_a_publisher_of_its_own_process_answers(ours: Server) -> None:
    request = post("/v1/chat/completions", chat(), ours.client)
    with tool.publishing(tool.Publisher(server=ours, kept=2), 20):
        assert tool.requests(ours.port, [request], 2, 0.1)["answers"] > 0


def test_a_refusal_ends_the_run(ours: Server) -> None:
    """What is measured are answers: an error may not count as a quick one."""
    with pytest.raises(RuntimeError, match=r"HTTP/1\.1 401"):
        tool.requests(ours.port, [post("/v1/chat/completions", chat(), "wk_wrong")], 1, 0.1)


@pytest.mark.parametrize(
    ("group", "bars"), [(traffic, {"≥ 0.42", "≥ 0.33", "≤ 3.3", "≥ 0.6"}), (heartbeats, {"≥ 0.8"})]
)
def test_a_round_of_a_group_has_its_bars_and_finite_figures(
    group: ModuleType, bars: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(traffic, "_STREAMS", 8)
    figures = group.measure(0.15)
    assert {str(figure.bar) for figure in figures if figure.bar is not None} == bars
    assert all(math.isfinite(figure.value) and figure.value > 0 for figure in figures)


@pytest.mark.parametrize(
    ("group", "few", "bars"),
    [
        (memory, {"_STREAM_MIB": 1, "_CHANNELS": 3, "_FIRST_CHANNELS": 1}, {"≤ 4", "≤ 40"}),
        (death, {"_CALLERS": 5, "_TURNS": 1}, {"≤ 1.5"}),
        (wakes, {"_CALLERS": 8}, {"≤ 2", "≤ 40"}),
    ],
)
def test_a_round_of_masses_has_its_bars_and_everybody_is_answered(
    group: ModuleType, few: dict[str, int], bars: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, number in few.items():
        monkeypatch.setattr(group, name, number)
    figures = group.measure(0.1)
    assert {str(figure.bar) for figure in figures if figure.bar is not None} == bars
    assert all(math.isfinite(figure.value) for figure in figures)


def test_a_crowd_that_is_refused_is_no_figure(ours: Server) -> None:
    with pytest.raises(RuntimeError, match="not all were answered 200"):
        death.floor_ms(ours, 2)  # it wants a key


def test_every_wake_is_told(ours: Server) -> None:
    """One after another, each is a line of its own: two for one crowd would be seen."""
    with tool.publishing(tool.Publisher(server=ours), 20) as said:
        for number in range(2):
            plainly.register(ours, "bench", status="hibernating")
            with tool.crowd(ours.port, post("/v1/chat/completions", chat(), ours.client), 1) as crowd:
                crowd.ask()
                task = said.get(timeout=20)["wake"]
                assert plainly.call(ours, "POST", f"/publisher/v1/tasks/{task}/result", b"")[0] == 200
                assert crowd.wait()["statuses"] == {"200": 1}, number
    assert said.empty()


def test_a_plot_of_nothing_has_an_axis_all_the_same() -> None:
    assert "<svg" in svg.line_plot("", "", "", {"a": [(1, 0)]})


def test_without_a_compiler_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    monkeypatch.setattr(tool.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(tool.shutil, "which", lambda _: None)
    with pytest.raises(RuntimeError, match="apt-get install gcc"):
        tool.build()


def test_the_tools_compile_without_a_warning(tmp_path: object) -> None:
    for source in (tool._SOURCE, tool._BURST):
        command = ["cc", "-O2", "-Wall", "-Wextra", "-Werror", "-o", f"{tmp_path}/{source.stem}", str(source)]
        subprocess.run(command, check=True)


def test_rounds_become_medians_beside_their_bars() -> None:
    rounds = [[Figure("a", "ms", ours, 1.0, ours, Bar("≤", 2)), Figure("b", "KiB", 1, None, 1)] for ours in (9, 2, 1)]
    first, second = report.summarise(rounds)
    assert (first.median, first.least, first.most, first.is_met) == (2, 1, 9, True)
    assert (second.floor, second.is_met) == (None, None)
    table = report.as_markdown([first, second], report.machine())
    assert "| a | ms | 1 | 2 | 2 (1–9) | ≤ 2 | yes |" in table
    assert "| b | KiB |  | 1 | 1 (1–1) |  |  |" in table
    assert report.as_json([first], {}, {})["figures"][0]["bar"] == "≤ 2"


@pytest.mark.parametrize(("most", "last"), [(0.9, 1.0), (1.0, 1.0), (7, 8), (2600, 3000)])
def test_ticks_are_round_and_reach_beyond(most: float, last: float) -> None:
    assert svg.ticks_to(most)[-1] == pytest.approx(last)


@pytest.mark.parametrize(
    ("least", "most", "powers"), [(0.3, 40, [0.1, 1, 10, 100]), (1, 10, [1, 10]), (10, 10, [10, 100])]
)
def test_powers_of_ten_stand_around_the_values(least: float, most: float, powers: list[float]) -> None:
    assert svg.powers_over(least, most) == pytest.approx(powers)


@pytest.mark.parametrize("is_log", [True, False])
def test_a_plot_is_well_formed_and_within_its_frame(is_log: bool) -> None:
    lines = {"floor & more": [(1.0, 5.0), (64.0, 9.0)], "ours": [(1.0, 2.0), (64.0, 4.0)]}
    root = ElementTree.fromstring(svg.line_plot("A <title>", "x", "y", lines, is_log_x=is_log, is_log_y=is_log))
    dots = root.findall("{http://www.w3.org/2000/svg}circle")
    assert len(dots) == 4
    assert all(70 <= float(dot.attrib["cx"]) <= 700 and 70 <= float(dot.attrib["cy"]) <= 350 for dot in dots)


def test_the_rates_of_one_group_are_held_against_the_guarded_floor(ours: Server, floor: Server) -> None:
    found = {"seconds": 1.0, "answers": 10, "all_answers": 10}
    sides = {name: traffic.Side(floor, lambda _: found, [found], 1.0) for name in ("guarded", "bare")}
    sides["ours"] = traffic.Side(ours, lambda _: found, [found | {"answers": 5, "all_answers": 4}], 1.0)
    first, *others = traffic.compare("x", "requests/s", "answers", sides, "ours", Bar("≥", 0.42))
    assert (first.ours, first.floor, first.value) == (5, 10, 0.5)
    assert [each.bar for each in others] == [None, None]
    assert others[-1].value == 0.4
