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
import hashlib
import json
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from model import MODELS, init_params
from server import Pages, Request, Server

from jax_kvpool import HostPool
from jax_kvpool.stores import FileStore, Namespace, PageStore

NUM_OUTPUT = 8
ROUNDS = 5


class SharingServer(Server):
    """A server whose host pool fills from a page store, and whose new pages go there."""

    def __init__(self, *args: Any, open_store: Callable[[HostPool], PageStore]) -> None:
        super().__init__(*args)
        self.store = open_store(self.host)
        for memory in self.host.memories:
            self.store.register(memory)

    def fetch(self, request: Request) -> int:
        """Gets the longest prefix that the store has into the host pool; returns how many pages came."""
        missing = [key for key in request.prefixes if key not in self.cache.pages]
        hits = [result.is_hit for result in self.store.contains(missing)]
        pages = list(self.cache.insert(missing[: (*hits, False).index(False)]).values())
        records = [self.host.record(page, writable=True) for page in pages]
        results = self.store.get(missing[: len(pages)], records)
        # A page is good for nothing without those before it.
        num_found = (*(result.is_hit for result in results), False).index(False)
        self.cache.drop(missing[num_found : len(pages)])
        self.cache.unpin()
        return num_found

    def on_stored(self, device_pages: Pages, host_pages: Pages) -> None:
        """Waits until the step has stored the pages into the host pool, puts them, and waits for that. A server with
        more to do uses `store.submit`, and keeps the host pages pinned until the future is done."""
        if not len(host_pages):
            return
        keys = {page: key for key, page in self.cache.pages.items()}
        records = self.host.landed(host_pages, after=self.device)
        for result in self.store.put([keys[page] for page in host_pages], records):
            if not result.is_hit:
                print(f"a page was not stored: {result.reason}", file=sys.stderr)


def requests_of(num_tokens: int, vocab: int, page_size: int) -> tuple[Request, Request]:
    """The same prompt twice: with the keys of its pages, and without, so that it is computed."""
    prompt = np.random.default_rng(0).integers(0, vocab, num_tokens, np.int32)
    prefixes, key = [], b""
    for end in range(page_size, num_tokens + 1, page_size):  # a page's KV depends on all tokens before: so does its key
        key = hashlib.sha256(key + prompt[end - page_size : end].tobytes()).digest()
        prefixes.append(key)
    return Request(prompt, prefixes, NUM_OUTPUT), Request(prompt, [], NUM_OUTPUT)


def serve(args: argparse.Namespace) -> dict[str, Any]:
    """What each of the two processes does; returns what it found."""
    config = MODELS[args.model]

    def requests() -> tuple[Request, Request]:
        return requests_of(args.prompt, config.vocab, args.page_size)

    def open_store(host: HostPool) -> PageStore:
        namespace = Namespace(host.spec, host.layout, f"{args.model} with random weights of seed 0")
        if args.directory:
            return FileStore(namespace, args.directory)
        from jax_kvpool.stores.mooncake import MooncakeConfig, MooncakeStore

        return MooncakeStore(namespace, MooncakeConfig(args.master))

    num_pages = requests()[0].num_pages(args.page_size)
    params = init_params(config, 0)
    server = SharingServer(config, params, args.page_size, num_pages, num_pages, num_pages, open_store=open_store)
    with server.store:
        samples: dict[str, list[float]] = {"get": [], "first_token": [], "recompute": []}
        for _ in range(ROUNDS if args.role == "second" else 1):
            request, plain = requests()
            begin = time.perf_counter()
            num_found = server.fetch(request)
            samples["get"].append((time.perf_counter() - begin) * 1e3)
            server.run([request])
            samples["first_token"].append(samples["get"][-1] + request.first_token_seconds * 1e3)
            server.run([plain])
            samples["recompute"].append(plain.first_token_seconds * 1e3)
            if args.role == "second":  # cold again
                server.cache.drop(list(server.cache.pages))
        return {
            "output": request.output,
            "recomputed": plain.output,
            "num_pages": len(request.prefixes),
            "num_found": num_found,
            "page_bytes": server.store.record_bytes,
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
