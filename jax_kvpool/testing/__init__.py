"""Tests for what users write. Needs pytest, pytest-timeout and hypothesis."""

import pytest

pytest.register_assert_rewrite("jax_kvpool.testing.stores")
