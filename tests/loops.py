"""Layer loops as an engine has them, in the place of `run_layers`: each means what that means."""

import jax
import jax.numpy as jnp

from jax_kvpool import begin, run_layers


def in_python(apply_layer, x, device, host, **options):
    flight, x = begin(x, device, host, **options)
    is_stacked = "layer" in device.layout.order
    for layer in range(len(device.spec.layers)) if is_stacked else device.spec.layers:
        flight, x = _one(apply_layer, flight, x, layer)
    return flight.end(x)


def in_scan(apply_layer, x, device, host, num_before=0, **options):
    """Stacked layers; some in Python before, as models have dense ones in front."""
    flight, x = begin(x, device, host, **options)
    for layer in range(num_before):
        flight, x = _one(apply_layer, flight, x, layer)
    layers = jnp.arange(num_before, len(device.spec.layers), dtype=jnp.int32)
    (flight, x), _ = jax.lax.scan(lambda carry, layer: (_one(apply_layer, *carry, layer), None), (flight, x), layers)
    return flight.end(x)


def in_both(*args, **options):
    return in_scan(*args, num_before=2, **options)


def _one(apply_layer, flight, x, layer):
    flight, kv = flight.wait(layer, x)
    x, kv = apply_layer(layer, x, kv)
    return flight.put(layer, kv), x


LOOPS = {"run_layers": run_layers, "begin": in_python, "begin in a scan": in_scan, "begin in both": in_both}
