"""What is there without the extras, and which one an error names."""

import subprocess
import sys

import pytest

HIDE = """
import sys
for name in sys.argv[1:]:
    sys.modules[name] = None  # importing it is an ImportError
"""


def run(code, *hidden):
    command = [sys.executable, "-P", "-c", HIDE + code, *hidden]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_subpackages_come_by_themselves():
    ended = run("import jax_kvpool\nprint(jax_kvpool.stores.FileStore, jax_kvpool.cache.page_keys, jax_kvpool.testing)")
    assert ended.returncode == 0, ended.stderr
    assert run("import jax_kvpool\njax_kvpool.nothing").stderr.endswith("no attribute 'nothing'\n")


def test_the_core_needs_no_extra():
    hidden = ["xxhash", "pytest", "hypothesis", "tqdm", "mooncake", "flatbuffers", "safetensors"]
    ended = run("import jax_kvpool, jax_kvpool.cache\nassert 'jax_kvpool.stores' not in sys.modules", *hidden)
    assert ended.returncode == 0, ended.stderr


@pytest.mark.parametrize(
    ("code", "hidden", "says"),
    [
        (
            "import jax_kvpool\njax_kvpool.stores",
            "xxhash",
            "jax_kvpool.stores needs xxhash: pip install 'jax_kvpool[st",
        ),
        ("import jax_kvpool.prometheus", "prometheus_client", "pip install 'jax_kvpool[prometheus]'"),
        ("import jax_kvpool.testing", "pytest", "jax_kvpool.testing needs pytest: pip install 'jax_kvpool[test]'"),
        ("from jax_kvpool.testing import stores", "hypothesis", "jax_kvpool.testing needs hypothesis: pip install"),
        (
            "from jax_kvpool.stores.mooncake import MooncakeConfig, _library\n_library()",
            "mooncake",
            "MooncakeStore needs jax_kvpool[mooncake]",
        ),
    ],
)
def test_a_missing_extra_is_named(code, hidden, says):
    assert says in run(code, hidden).stderr
