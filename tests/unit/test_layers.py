"""The layers of the code, as one table: arrows point down, and every import under app/wakecall is held to it.

An import inside a function or under `TYPE_CHECKING` is an arrow like any other.
"""

from __future__ import annotations

import ast
import fnmatch
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

APP = Path(__file__).resolve().parents[2] / "app"


class Layer(NamedTuple):
    """One layer: its modules (patterns of names below `wakecall`) and what they may import beside each other."""

    modules: str
    ours: str
    third_party: str


# A module belongs to the first layer that names it; "@" is the package's own `__init__`.
LAYERS = {
    # Decisions and data: no Trio, no I/O, no clock.
    "pure": Layer(
        "lifecycle placement sweep frames models events errors config addresses keys limits faults fairness health usage"
        " ledger rewrite drafts",
        "",
        "",
    ),
    # What both ends of a shared upload read and write: pure too, but for its JSON.
    "records": Layer("records", "pure", "msgspec"),
    # SQL stands in one place; what everybody else sees is the protocol in store/base.py.
    "sqlite": Layer("store.sqlite store.rows store.migrations", "pure store", "trio sqlite_utils"),
    "store": Layer("store store.*", "pure", "trio"),
    # Trio, but neither HTTP nor SQL nor a socket.
    "broker": Layer(
        "taskids"
        " broker core publishing operating session wake task channel row specs directory dispatch journal local registry"
        " access keyring upload views naming accounting hosting"
        " bytestream deadlines waking loading stopping infers placing waiting results",
        "pure records store",
        "trio",
    ),
    "testing": Layer("testing", "pure records store broker", "trio"),
    "http": Layer(
        "http http.* web web.*",
        "pure store broker",
        "trio quart quart_trio hypercorn h11 werkzeug msgspec prometheus_client",
    ),
    # The agent knows the wire, never the broker.
    "publisher": Layer("publisher publisher.*", "pure records outbound", "trio httpx2 msgspec platformdirs"),
    # What our HTTP clients share.
    "outbound": Layer("outbound", "pure", "trio httpx2"),
    # The other way to an engine: straight to an API that an operator named.
    "upstream": Layer("upstream", "pure outbound broker", "trio httpx2"),
    "serving": Layer("serving", "pure sqlite store broker http package", "trio hypercorn platformdirs"),
    # An engine like any other: it does not know what it stands behind.
    "demo_engine": Layer("cli.demo_engine cli.demo_replies", "", "trio h11 msgspec click"),
    "cli": Layer(
        "cli cli.* __main__",
        "pure sqlite store broker http publisher outbound upstream serving package demo_engine",
        "trio httpx2 msgspec click rich platformdirs",
    ),
    "package": Layer("@", "pure store sqlite broker http upstream serving", ""),
}

# The only standard modules of the pure layer.
PURE_STDLIB = (
    "__future__ base64 bisect collections dataclasses email enum functools hashlib ipaddress itertools json math operator re"
    " string"
    " traceback types typing urllib"
)

# Standard modules that are not for everyone, and the layers that may have them.
RESERVED_STDLIB = {
    "asyncio": "",
    "sqlite3": "sqlite",
    "socket": "http publisher serving cli",
    "ssl": "http publisher outbound upstream serving",
    "http": "",
    "urllib.request": "",
    "subprocess": "publisher cli demo_engine",
}

# A clock asked in a pure module, whatever it was imported as.
CLOCKS = {"now", "utcnow", "today", "time", "monotonic", "time_ns", "monotonic_ns", "perf_counter"}


def module_name(path: Path) -> str:
    """`app/wakecall/store/base.py` is `store.base`; the package itself is `@`."""
    parts = path.relative_to(APP / "wakecall").with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__") or "@"


MODULES = {module_name(path): path for path in sorted((APP / "wakecall").rglob("*.py"))}


def layer_of(module: str) -> str | None:
    for name, layer in LAYERS.items():
        if any(fnmatch.fnmatchcase(module, pattern) for pattern in layer.modules.split()):
            return name
    return None


def imported(tree: ast.AST, package: str) -> Iterator[tuple[int, str]]:
    """Line and absolute name of everything imported; `package` is what a relative import starts from."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            # `from . import errors` names a module, `from .errors import X` does not: both are tried.
            yield from ((node.lineno, f"{source}.{alias.name}") for alias in node.names)


def our_module(name: str) -> str:
    """The longest module of ours that an absolute name starts with."""
    parts = name.split(".")[1:]
    while parts and ".".join(parts) not in MODULES:
        parts.pop()
    return ".".join(parts) or "@"


def violations(module: str, source: str, *, is_package: bool = False) -> list[str]:
    """What in a module's source points up or sideways, one line each."""
    layer_name = layer_of(module)
    if layer_name is None:
        return [f"wakecall.{module} is in no layer: place it in the table of tests/unit/test_layers.py"]
    layer = LAYERS[layer_name]
    full = "wakecall" if module == "@" else f"wakecall.{module}"
    tree = ast.parse(source)
    found = []
    for line, name in imported(tree, full if is_package else full.rpartition(".")[0]):
        top = name.partition(".")[0]
        if top == "wakecall":
            target = layer_of(our_module(name))
            bad = target != layer_name and target not in layer.ours.split()
        elif top in sys.stdlib_module_names:
            holders = [layers for key, layers in RESERVED_STDLIB.items() if f"{name}.".startswith(f"{key}.")]
            bad = (layer_name == "pure" and top not in PURE_STDLIB.split()) or any(
                layer_name not in layers.split() for layers in holders
            )
        else:
            bad = top not in layer.third_party.split()
        if bad:
            found.append(f"wakecall.{module}:{line} ({layer_name}) must not import {name}")
    if layer_name == "pure":
        found += [
            f"wakecall.{module}:{node.lineno} (pure) must not ask a clock: `now` is an argument"
            for node in ast.walk(tree)
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in CLOCKS
        ]
    return found


@pytest.mark.parametrize("module", MODULES)
def test_arrows_point_down(module: str) -> None:
    """A module imports what its layer may, and every module has a layer."""
    path = MODULES[module]
    assert violations(module, path.read_text(), is_package=path.name == "__init__.py") == []


@pytest.fixture
def the_whole_tree(monkeypatch: pytest.MonkeyPatch) -> None:
    """The modules that the examples below speak of, whether they are there or not."""
    for module in ("errors", "models", "broker", "http", "publisher", "serving", "cli", "store", "store.sqlite"):
        monkeypatch.setitem(MODULES, module, Path())


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("lifecycle", "import trio"),
        ("models", "import time"),
        ("config", "import os.path"),
        ("sweep", "from datetime import datetime"),
        ("sweep", "def f(clock): return clock.now()"),
        ("errors", "from .broker import Broker"),
        ("placement", "from wakecall import broker"),
        ("frames", "import msgspec"),
        ("broker", "import socket"),
        ("broker", "from urllib.request import urlopen"),
        ("broker", "import sqlite_utils"),
        ("session", "def f():\n    from .http import create_app"),
        ("task", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import httpx2"),
        ("broker", "from .store.sqlite import SqliteStore"),
        ("store.base", "from ..broker import Broker"),
        ("store.base", "import sqlite3"),
        ("store.base", "from .sqlite import SqliteStore"),
        ("http.app", "from ..store.sqlite import SqliteStore"),
        ("http.app", "from ..publisher import agent"),
        ("http.app", "from ..serving import serve"),
        ("publisher.agent", "from ..broker import Broker"),
        ("publisher.agent", "from ..store import Store"),
        ("serving", "from .cli import main"),
        ("testing", "from .http import create_app"),
        ("cli.demo_engine", "from ..broker import open_broker"),
        ("cli.demo_engine", "import httpx2"),
        ("cli.main", "import asyncio"),
        ("something_new", ""),
    ],
)
@pytest.mark.usefixtures("the_whole_tree")
def test_an_arrow_that_points_up_is_found(module: str, source: str) -> None:
    """The check itself: it sees functions, `TYPE_CHECKING`, relative names, clocks, and modules without a layer."""
    assert len(violations(module, source)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("models", "from dataclasses import dataclass\nfrom .errors import WakecallError"),
        (
            "store.sqlite",
            "import sqlite3, sqlite_utils, urllib.parse\nfrom ..models import LLM\nfrom .base import Store",
        ),
        ("broker", "import time, trio\nfrom . import errors, models\nfrom .store import Store"),
        ("http.app", "from quart_trio import QuartTrio\nfrom ..broker import Broker\nfrom .errors import table"),
        ("publisher.agent", "import subprocess, httpx2\nfrom ..errors import WakecallError"),
        ("cli.main", "from ..serving import serve\nfrom ..store.sqlite import SqliteStore"),
    ],
)
@pytest.mark.usefixtures("the_whole_tree")
def test_an_arrow_that_points_down_is_none_of_its_business(module: str, source: str) -> None:
    assert violations(module, source) == []


def test_importing_the_package_loads_no_heavy_module() -> None:
    """An embedder who wants the broker pays for Trio, not for a web server, a client or a terminal."""
    heavy = {"quart", "hypercorn", "httpx2", "sqlite_utils", "click", "rich"}
    script = f"import sys, wakecall; print(*sorted({heavy!r} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=APP)
    assert run.stdout.split() == []


def test_keys_of_a_file_are_made_and_listed_without_a_web_server(tmp_path: Path) -> None:
    """It takes longer to load than all else that the command does."""
    script = (
        "import sys; from wakecall.cli.keyplaces import FileKeys; place = FileKeys(sys.argv[1]);"
        "place.create('admin', {}); place.listing();"
        "print(*sorted({'quart', 'hypercorn', 'werkzeug'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "w.db")]
    run = subprocess.run(command, capture_output=True, text=True, check=True, cwd=APP)
    assert run.stdout.split() == []
