"""Tests for what users write. Needs pytest, pytest-timeout, hypothesis and xxhash: `pip install 'jax_kvpool[test]'`."""

import importlib.util

_missing = [name for name in ("pytest", "pytest_timeout", "hypothesis", "xxhash") if not importlib.util.find_spec(name)]
if _missing:
    raise ImportError(f"jax_kvpool.testing needs {', '.join(_missing)}: pip install 'jax_kvpool[test]'")

import pytest  # noqa: E402

pytest.register_assert_rewrite("jax_kvpool.testing.stores")
