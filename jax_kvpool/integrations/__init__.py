"""Adapters for serving stacks that others wrote. Each is imported by who uses it, and needs its stack."""
