"""A real engine for the tests: llama.cpp's own server on a model of 0.7 MB, in a process of its own.

The model is a llama with random weights from a fixed seed. What it says is noise, but everything around it is real:
the tokenizer, the chat template, slots, streaming, usage, and what happens when a client leaves. It is written with
`gguf` and served by `xllamacpp` on the CPU; nothing is downloaded.

In a test: the fixtures of conftest.py, or `with run_engine(model)` / `async with open_engine(model)` for one of its
own. By hand, or as a wake command: `python -m tests.e2e.engine --model PATH --port N`, which serves until SIGTERM and
prints one line of JSON once `/health` answers.

It never says "end": every answer has exactly the tokens asked for, so `max_tokens` is how long a stream is. Measured on
one core: the first 1,000 tokens come at 3,000 a second or so, 8,000 take about 18 s.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import click
import httpx2
import trio

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parents[2]
SEED = 20240607
CONTEXT_TRAINED = 1 << 20
"""Tokens; far more than a test asks for, so that only the engine's own `--context` bounds a stream."""

N_EMBD, N_LAYER, N_HEAD, N_FF = 64, 2, 4, 128

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|> {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

WORDS = """a able about after again all also always an and another any are around as asleep ask at away back be because
been before began being better big black body book both bring broker but by call came can chair city clear client close
cold come could cut day deep did do door down each early earth end engine even ever every eye face far feel few find
fire first fish five fly follow food for form found four free from full gave get give go gold good great green ground
grow had half hand hard has have he head hear heart help her here high him his hold home hot hour house how idea if in
into is it its just keep kind king knew know land large last late lead learn left less let life light like line list
little live long look love low made make man many map may me mean men might mile mind moon more most mother move much
music must my name near need never new next night no north nose not note now of off often old on once one only open or
order other our out over own page part pass past pattern peer people place plain plan plant play point port power press
problem pull put queen question quick rain ran reach read ready real red rest right river road rock room round rule run
said same saw say school sea second see seem self sent set she ship short should show side since sing six sky sleep
slow small snow so some song soon sound south space stand star start state stay step still stop story stream street
strong such sun sure table tail take talk tell ten than that the their them then there these they thing think this
those thought three through time to told too took top toward town travel tree true try turn two under unit until up us
use very voice wait wake walk want war warm was watch water way we well went were west what wheel when where which
while white who whole why will wind with wood word work world would write year yes yet you young your"""


def write_model(path: Path) -> None:
    """Write the GGUF: a two-layer llama, 64 wide, with a SentencePiece vocabulary that can spell every byte.

    Args:
        path: the file to make, 0.7 MB; the same bytes on every run of one version of numpy.
    """
    import gguf
    import numpy as np

    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    letters = ["▁", *(chr(code) for code in range(0x21, 0x7F)), "\n"]
    pieces = [*letters, *(f"▁{word}" for word in WORDS.split() if len(word) > 1)]
    special = ["<unk>", "<s>", "</s>"]
    tokens = [*special, *byte_tokens, *pieces]
    kinds = (
        [gguf.TokenType.UNKNOWN, gguf.TokenType.CONTROL, gguf.TokenType.CONTROL]
        + [gguf.TokenType.BYTE] * len(byte_tokens)
        + [gguf.TokenType.NORMAL] * len(pieces)
    )
    # A longer piece scores higher: SentencePiece merges the best first, so words stay whole.
    scores = [0.0] * (len(special) + len(byte_tokens)) + [float(len(piece)) for piece in pieces]

    rng = np.random.default_rng(SEED)

    def random(*shape: int) -> NDArray[np.float32]:
        return (rng.standard_normal(shape) * shape[-1] ** -0.5).astype(np.float32)

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("wakecall-noise")
    writer.add_context_length(CONTEXT_TRAINED)
    writer.add_embedding_length(N_EMBD)
    writer.add_block_count(N_LAYER)
    writer.add_feed_forward_length(N_FF)
    writer.add_head_count(N_HEAD)
    writer.add_head_count_kv(N_HEAD)
    writer.add_rope_dimension_count(N_EMBD // N_HEAD)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores(scores)
    writer.add_token_types(kinds)
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(True)
    writer.add_chat_template(CHAT_TEMPLATE)

    writer.add_tensor("token_embd.weight", random(len(tokens), N_EMBD))
    for layer in range(N_LAYER):
        block = f"blk.{layer}"
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"{block}.{name}.weight", np.ones(N_EMBD, dtype=np.float32))
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            writer.add_tensor(f"{block}.{name}.weight", random(N_EMBD, N_EMBD))
        for name in ("ffn_gate", "ffn_up"):
            writer.add_tensor(f"{block}.{name}.weight", random(N_FF, N_EMBD))
        writer.add_tensor(f"{block}.ffn_down.weight", random(N_EMBD, N_FF))
    writer.add_tensor("output_norm.weight", np.ones(N_EMBD, dtype=np.float32))
    writer.add_tensor("output.weight", random(len(tokens), N_EMBD))

    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@dataclass(frozen=True)
class Engine:
    """A running engine.

    Attributes:
        base_url: `http://127.0.0.1:PORT`, without `/v1`.
        model: the id that it lists and wants: the path of its file.
        pid: of its process; SIGSTOP makes it fall silent, SIGKILL makes it die.
        log: the file that its stderr goes to.
    """

    base_url: str
    port: int
    model: str
    pid: int
    log: Path

    async def busy_slots(self) -> int:
        """How many of its slots generate at this moment (llama.cpp's `GET /slots`)."""
        async with httpx2.AsyncClient(base_url=self.base_url) as http:
            slots = (await http.get("/slots")).raise_for_status().json()
        return sum(slot["is_processing"] for slot in slots)

    async def tokens_predicted(self) -> int:
        """How many tokens it has generated since its start, in answers that have ended or were left."""
        async with httpx2.AsyncClient(base_url=self.base_url) as http:
            text = (await http.get("/metrics")).raise_for_status().text
        found = re.search(r"^llamacpp:tokens_predicted_total (\d+)$", text, re.MULTILINE)
        assert found is not None
        return int(found[1])

    async def wait_busy(self, count: int) -> None:
        """Return once exactly `count` slots generate. The engine has no event for it, so this asks every 20 ms."""
        while await self.busy_slots() != count:
            await trio.sleep(0.02)


def engine_command(
    model: Path, *, port: int = 0, slots: int = 4, context: int = 16_384, embedding: bool = False
) -> list[str]:
    """The command that serves `model`, such as for `wakecall publish --wake-command`: run it from the project's root.

    Args:
        model: the GGUF that `write_model` made.
        port: 0 picks a free one.
        slots: how many answers at once; further requests wait inside the engine.
        context: tokens of one slot, question and answer together.
        embedding: serve `/v1/embeddings` too, which is a 501 otherwise.
    """
    command = [sys.executable, "-m", "tests.e2e.engine", "--model", str(model), "--port", str(port)]
    command += ["--slots", str(slots), "--context", str(context)]
    return [*command, "--embedding"] if embedding else command


@contextlib.contextmanager
def run_engine(
    model: Path, *, port: int = 0, slots: int = 4, context: int = 16_384, embedding: bool = False
) -> Iterator[Engine]:
    """Serve `model` in a process of its own, which dies with the block, and with this process however that ends.

    Args:
        model: the GGUF that `write_model` made; the log is written beside it.
        port, slots, context, embedding: as for `engine_command`.

    Raises:
        RuntimeError: it ended before it was ready; the message holds the end of its log.
    """
    command = engine_command(model, port=port, slots=slots, context=context, embedding=embedding)
    log = model.with_name(f"engine-{os.getpid()}-{time.monotonic_ns()}.log")
    with log.open("wb") as stderr:
        process = subprocess.Popen(
            [*command, "--leash"], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr
        )
    with process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line:
                raise RuntimeError(f"the engine did not start:\n{log.read_text(errors='replace')[-2000:]}")
            ready = json.loads(line)
            yield Engine(ready["base_url"], ready["port"], ready["model"], process.pid, log)
        finally:
            process.kill()


@contextlib.asynccontextmanager
async def open_engine(
    model: Path, *, port: int = 0, slots: int = 4, context: int = 16_384, embedding: bool = False
) -> AsyncIterator[Engine]:
    """`run_engine` for a Trio task: the start, about a second, is spent in a thread."""
    running = run_engine(model, port=port, slots=slots, context=context, embedding=embedding)
    engine = await trio.to_thread.run_sync(running.__enter__)
    try:
        yield engine
    finally:
        running.__exit__(None, None, None)


def serve(model: Path, *, port: int, slots: int, context: int, embedding: bool) -> tuple[Any, str]:
    """Start llama.cpp's server; it listens, and its model is loaded, when this returns.

    Returns:
        The server, which runs as long as it is referenced, and its base URL.
    """
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(model)
    params.hostnames = ["127.0.0.1"]
    params.port = port
    params.n_parallel = slots
    params.n_ctx = slots * context
    # One connection holds one thread, waiting for a slot or not: fewer threads would queue requests unseen.
    params.n_threads_http = 256
    params.cpuparams.n_threads = 1
    params.cpuparams_batch.n_threads = 1
    params.endpoint_metrics = True
    params.sampling.ignore_eos = True
    # Off: it keeps whole finished conversations, up to 8 GiB of them.
    params.cache_ram_mib = 0
    params.warmup = False
    if embedding:
        params.embedding = True
        params.pooling_type = xllamacpp.llama_pooling_type.LLAMA_POOLING_TYPE_MEAN
    server = xllamacpp.Server(params)
    return server, server.listening_address


def wait_end(lifetime_s: float, leash: IO[bytes] | None) -> None:
    """Return on SIGTERM or SIGINT (both blocked already), after `lifetime_s`, or when the `leash` is cut."""
    if leash is not None:

        def hold() -> None:
            leash.read()
            os.kill(os.getpid(), signal.SIGTERM)

        threading.Thread(target=hold, daemon=True).start()
    signal.sigtimedwait({signal.SIGTERM, signal.SIGINT}, lifetime_s)


@click.command()
@click.option("--model", type=click.Path(path_type=Path), required=True, help="GGUF; written if it is not there.")
@click.option("--port", default=0, show_default=True)
@click.option("--slots", default=4, show_default=True, help="Answers at once.")
@click.option("--context", default=16_384, show_default=True, help="Tokens of one slot.")
@click.option("--embedding", is_flag=True, help="Serve embeddings too.")
@click.option("--pid-file", type=click.Path(path_type=Path), help="Appended to: one line per start.")
@click.option("--lifetime", default=600.0, show_default=True, help="Seconds; then it ends by itself.")
@click.option("--leash", is_flag=True, help="End when stdin does.")
def main(
    model: Path,
    port: int,
    slots: int,
    context: int,
    embedding: bool,
    pid_file: Path | None,
    lifetime: float,
    leash: bool,
) -> None:
    """Serve the noise model until SIGTERM; one line of JSON on stdout says when it is ready."""
    # Before any thread is there, so that all of llama.cpp's inherit the mask and the signal waits for `wait_end`.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    if pid_file is not None:
        with pid_file.open("a") as lines:
            lines.write(f"{os.getpid()}\n")
    if not model.exists():
        write_model(model)
    _server, base_url = serve(model, port=port, slots=slots, context=context, embedding=embedding)
    httpx2.get(f"{base_url}/health").raise_for_status()
    ready = {"base_url": base_url, "port": int(base_url.rpartition(":")[2]), "model": str(model), "pid": os.getpid()}
    print(json.dumps(ready), flush=True)
    wait_end(lifetime, sys.stdin.buffer if leash else None)
    # Not a return: the server's destructor waits for the connections that are still open.
    os._exit(0)


if __name__ == "__main__":
    main()
