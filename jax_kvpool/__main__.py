"""`python -m jax_kvpool replay TRACE`."""

import sys

from jax_kvpool import replay

if __name__ == "__main__":
    if sys.argv[1:2] != ["replay"]:
        sys.exit("usage: python -m jax_kvpool replay TRACE [options]; --help after replay lists them")
    sys.exit(replay.main(sys.argv[2:]))
