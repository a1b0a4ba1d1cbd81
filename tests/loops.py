"""Layer loops as an engine has them, in the place of `run_layers`: each means what that means."""

import jax
import jax.numpy as jnp

from jax_kvpool import begin, run_layers


def in_python(apply_layer, x, device, host, **options):
    flight, x = begin(x, device, host, **options)
    is_stacked = "layer" in device.layout.order
    for layer in range(len(device.spec.layers)) if is_stacked else device.spec.layers:
        flight, kv = flight.wait(layer, x)
        x, kv = apply_layer(layer, x, kv)
        flight = flight.put(layer, kv)
    return flight.end(x)


def in_scan(apply_layer, x, device, host, **options):
    """Stacked layers."""

    def body(carry, layer):
        flight, x = carry
        flight, kv = flight.wait(layer, x)
        x, kv = apply_layer(layer, x, kv)
        return (flight.put(layer, kv), x), None

    flight, x = begin(x, device, host, **options)
    layers = jnp.arange(len(device.spec.layers), dtype=jnp.int32)
    (flight, x), _ = jax.lax.scan(body, (flight, x), layers)
    return flight.end(x)


def in_both(apply_layer, x, device, host, **options):
    """Stacked layers: two in Python, as models have dense ones in front, then a scan."""

    def body(carry, layer):
        flight, x = carry
        flight, kv = flight.wait(layer, x)
        x, kv = apply_layer(layer, x, kv)
        return (flight.put(layer, kv), x), None

    flight, x = begin(x, device, host, **options)
    for layer in range(2):
        (flight, x), _ = body((flight, x), layer)
    layers = jnp.arange(2, len(device.spec.layers), dtype=jnp.int32)
    (flight, x), _ = jax.lax.scan(body, (flight, x), layers)
    return flight.end(x)


LOOPS = {"run_layers": run_layers, "begin": in_python, "begin in a scan": in_scan, "begin in both": in_both}
