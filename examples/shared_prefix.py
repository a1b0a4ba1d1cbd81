"""Two servers, each a process of its own, share the KV of a prompt through a page store, one key a page.

    python examples/shared_prefix.py                       # Mooncake Store on this machine, started and ended, or files
                                                           # where it is not installed
    python examples/shared_prefix.py --master HOST:PORT    # one that runs already
    python examples/shared_prefix.py --directory DIR       # files instead
    python examples/shared_prefix.py --model 8b --prompt 8192   # for a GPU

The first server computes the prompt and puts its pages into the store. The second one begins with nothing: it gets them
into its host pool, loads them in its first step, and computes only the last tokens. Its answer is compared with that of
the first one, and with what it computes itself without the store. A difference ends the program with 1.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from model import MODELS, init_params
from server import Request, Server

from jax_kvpool import HostPool
from jax_kvpool.cache import KVCache
from jax_kvpool.stores import FileStore, Namespace, PageStore

NUM_OUTPUT = 8
ROUNDS = 5


def wait_for_pages(server: Server, request: Request) -> int:
    """Lets the cache get what the store has of a prompt; returns how many pages came. A server with more to do does
    that meanwhile, and polls now and then."""
    request.seq = server.cache.open(request.prompt, salt=request.salt)
    before = server.cache.metrics.fetched
    server.cache.prefetch(request.seq, seconds=10)
    while server.cache.is_fetching(request.seq):
        server.cache.poll()
        time.sleep(1e-4)  # for the store's threads
    return server.cache.metrics.fetched - before


def save_all(server: Server) -> None:
    """What the requests have left on the device goes to the host pool with the next step, and from there to the
    store."""
    server.step([], 1)
    server.cache.close(flush=60)


def requests_of(num_tokens: int, vocab: int) -> tuple[Request, Request]:
    """The same prompt twice; the second time with a salt of its own, so that it is computed."""
    prompt = np.random.default_rng(0).integers(0, vocab, num_tokens, np.int32)
    return Request(prompt, NUM_OUTPUT), Request(prompt, NUM_OUTPUT, salt=os.urandom(16))


def serve(args: argparse.Namespace) -> dict[str, Any]:
    """What each of the two processes does; returns what it found."""
    config = MODELS[args.model]

    def open_store(host: HostPool) -> PageStore:
        namespace = Namespace(host.spec, host.layout, f"{args.model} with random weights of seed 0")
        if args.directory:
            return FileStore(namespace, args.directory)
        from jax_kvpool.stores.mooncake import MooncakeConfig, MooncakeStore

        store = MooncakeStore(namespace, MooncakeConfig(args.master))
        for memory in host.memories:
            store.register(memory)
        return store

    num_pages = -(-(args.prompt + NUM_OUTPUT) // args.page_size)
    params = init_params(config, 0)
    sizes = args.page_size, num_pages, num_pages, 8 * num_pages  # at most an eighth of the host pool comes at once
    server = Server(config, params, *sizes, open_stores=lambda host: [open_store(host)], ahead=1)
    with server.stores[0] as store:
        samples: dict[str, list[float]] = {"get": [], "first_token": [], "recompute": []}
        for _ in range(ROUNDS if args.role == "second" else 1):
            server.cache = KVCache(server.device, server.host, **server.options)  # cold
            request, plain = requests_of(args.prompt, config.vocab)
            begin = time.perf_counter()
            num_found = wait_for_pages(server, request)
            samples["get"].append((time.perf_counter() - begin) * 1e3)
            server.run([request])
            samples["first_token"].append(samples["get"][-1] + request.first_token_seconds * 1e3)
            if args.role == "first":
                save_all(server)
            server.run([plain])
            samples["recompute"].append(plain.first_token_seconds * 1e3)
        return {
            "output": request.output,
            "recomputed": plain.output,
            "num_pages": (args.prompt - 1) // args.page_size,  # the last token is always computed
            "num_found": num_found,
            "page_bytes": store.record_bytes,
            **{f"{name}_ms": statistics.median(of) for name, of in samples.items()},
        }


@contextlib.contextmanager
def mooncake_store(segment_bytes: int) -> Iterator[str]:
    """A master and a process that lends it memory, on this machine; gives the master's address."""
    with contextlib.ExitStack() as stack:

        def start(*command: str) -> subprocess.Popen[str]:
            process = stack.enter_context(
                subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
            )
            stack.callback(process.kill)
            return process

        ports = []
        for _ in range(2):
            with socket.create_server(("127.0.0.1", 0)) as probe:
                ports.append(probe.getsockname()[1])
        address = f"127.0.0.1:{ports[0]}"
        start(
            str(Path(sys.executable).with_name("mooncake_master")),
            *("--rpc_address=127.0.0.1", f"--rpc_port={ports[0]}"),
            *("--metrics_host=127.0.0.1", f"--metrics_port={ports[1]}", "--enable_metric_reporting=false"),
        )
        storage = start(sys.executable, "-c", STORAGE, address, str(segment_bytes))
        if not storage.stdout or storage.stdout.readline().strip() != "ready":
            sys.exit("Mooncake Store did not start: are libibverbs1, libnuma1 and libcurl4 installed?")
        yield address


STORAGE = """
import sys, time
from mooncake.store import MooncakeDistributedStore
store = MooncakeDistributedStore()
for _ in range(20):
    if not store.setup("127.0.0.1", "P2PHANDSHAKE", int(sys.argv[2]), 0, "tcp", "", sys.argv[1]):
        break
    time.sleep(0.2)
else:
    sys.exit("no master")
print("ready", flush=True)
time.sleep(1e9)
"""
"""Storage in a process of its own: pages outlive the servers."""


@contextlib.contextmanager
def store_of(args: argparse.Namespace, num_bytes: int) -> Iterator[list[str]]:
    """The options that say where the pages go: what was asked for, else a Mooncake Store, else files."""
    if args.directory or args.master:
        yield ["--directory", str(args.directory)] if args.directory else ["--master", args.master]
        return
    try:
        import mooncake.store  # noqa: F401
    except ImportError as error:
        print(f"no Mooncake here ({error}): files instead")
        with tempfile.TemporaryDirectory() as directory:
            yield ["--directory", directory]
    else:
        with mooncake_store(num_bytes) as address:
            yield ["--master", address]


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    option = parser.add_argument
    option("--model", choices=MODELS, default="tiny", help="(default: tiny)")
    option("--prompt", type=int, default=4096, help="tokens (default: 4096)")
    option("--page-size", type=int, default=64, help="tokens a page (default: 64)")
    option("--master", help="host:port of a mooncake_master that runs (default: starts one, if installed)")
    option("--directory", type=Path, help="keep the pages in files there instead")
    option("--json", type=Path, help="a file to write the results to")
    option("--role", choices=["first", "second"], help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse_arguments(arguments)
    if args.role:
        print(json.dumps(serve(args)))
        return 0
    page_bytes = MODELS[args.model].page_spec(args.page_size).payload_bytes
    num_bytes = 2 * (args.prompt // args.page_size + 16) * (page_bytes + 4096)
    with store_of(args, max(num_bytes, 64 << 20)) as where:
        print(f"pages go by way of {where[0].removeprefix('--')} {where[1]}")
        options = ["--model", args.model, "--prompt", str(args.prompt), "--page-size", str(args.page_size), *where]
        first, second = (
            json.loads(
                subprocess.run(
                    [sys.executable, __file__, "--role", role, *options], stdout=subprocess.PIPE, check=True
                ).stdout
            )
            for role in ("first", "second")
        )
    print(f"{args.model} model, {args.prompt:,} tokens, {first['num_pages']} pages of {first['page_bytes']:,} bytes")
    print("Time to the first token:")
    print(f"  first server, all computed       {first['recompute_ms']:8.1f} ms")
    print(f"  second server, from the store    {second['first_token_ms']:8.1f} ms", end="")
    print(f", of which {second['get_ms']:.1f} ms for getting {second['num_found']} pages")
    print(f"  second server, all computed      {second['recompute_ms']:8.1f} ms")
    if args.json:
        args.json.write_text(json.dumps({"first": first, "second": second}, indent=1))
    outputs = [tuple(of[key]) for of in (first, second) for key in ("output", "recomputed")]
    if second["num_found"] < second["num_pages"]:
        print(f"FAILED: {second['num_found']} of {second['num_pages']} pages came from the store", file=sys.stderr)
        return 1
    if len(set(outputs)) != 1:
        print(f"FAILED: the answers differ: {outputs}", file=sys.stderr)
        return 1
    print(f"all four answers are equal: {list(outputs[0])}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
