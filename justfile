# Recipes for a checkout whose .venv is there (README: the second command). `.venv/bin/just` runs them.

# The tools of .venv first, so that no venv has to be activated.
export PATH := justfile_directory() / ".venv/bin:" + env("PATH")

# Check, then test.
default: check test

# Everything in one go on this machine: a broker, a sleeping engine, a call that wakes it.
demo *args:
    wakecall demo {{ args }}

# A broker on 127.0.0.1:8080.
serve *args:
    wakecall serve {{ args }}

# The suite, or a part of it: `just test tests/unit -x`.
test *args:
    pytest {{ args }}

# Search for an order of events that the broker takes otherwise than its model, in so many fresh examples.
machine examples="5000":
    WAKECALL_MACHINE_EXAMPLES={{ examples }} pytest -q -n 0 tests/broker/test_machine.py

# Lint, format, types and the layers.
check:
    ruff check .
    ruff format --check .
    mypy --strict
    pytest -q -n 0 tests/unit/test_layers.py

# Measure each figure beside its floor: `just bench --rounds 5 --json FILE --markdown FILE --plots FOLDER`. It takes a `cc`.
bench *args:
    python -m tests.benchmarks {{ args }}

# Traffic of all kinds for so long, then: is anything left over?
soak minutes="10" *args:
    python -m tests.soak {{ minutes }} {{ args }}

# The documentation's links, commands and code blocks.
docs *args:
    pytest -q -n 0 tests/docs {{ args }}

# Fuzz the edges for so long, all targets or those named: `just fuzz 600 client_json http_bytes`.
fuzz seconds *targets:
    python -m tests.fuzz {{ seconds }} {{ targets }}
