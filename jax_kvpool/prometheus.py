"""A `KVCache`'s metrics for Prometheus. Needs the extra `jax_kvpool[prometheus]`.

from prometheus_client import REGISTRY
REGISTRY.register(Collector(cache))
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from jax_kvpool.cache.kvcache import KVCache

try:
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
    from prometheus_client.registry import Collector as _Collector
except ImportError as error:
    raise ImportError("jax_kvpool.prometheus needs prometheus-client: pip install 'jax_kvpool[prometheus]'") from error

__all__ = ["Collector"]


class Collector(_Collector):
    """Counters `jax_kvpool_NAME_total` of all that is in `Metrics`, by tier or by reason where they are, histograms of
    its waits, and gauges of the pools' occupancy. They are read when Prometheus asks, on its thread."""

    def __init__(self, cache: KVCache) -> None:
        self._cache = cache

    def collect(self) -> Iterator[Metric]:
        metrics = self._cache.metrics
        for field in dataclasses.fields(metrics):
            value = getattr(metrics, field.name)
            what = f"{field.name} of a KVCache; see jax_kvpool.cache.Metrics"
            if field.name == "page_bytes":
                moved = CounterMetricFamily("jax_kvpool_moved_bytes", f"as {what}", labels=["how"])
                for how, num_bytes in metrics.moved_bytes.items():
                    moved.add_metric([how], num_bytes)
                yield moved
            elif isinstance(value, int):
                yield CounterMetricFamily(f"jax_kvpool_{field.name}", what, value=value)
            elif field.name == "waits":
                waits = HistogramMetricFamily("jax_kvpool_waits", f"seconds; {what}", labels=["of"])
                for name, histogram in value.items():
                    buckets = zip([*map(str, histogram.bounds), "+Inf"], histogram.cumulative(), strict=True)
                    waits.add_metric([name], [*buckets], histogram.sum)
                yield waits
            elif isinstance(value, dict):
                label = "reason" if field.name == "failures" else "tier"
                family = CounterMetricFamily(f"jax_kvpool_{field.name}", what, labels=[label])
                for name, number in [*value.items()]:
                    family.add_metric([name], number)
                yield family
        gauge = GaugeMetricFamily("jax_kvpool_occupancy", "share of a pool's pages that are not free", labels=["tier"])
        for tier, share in self._cache.occupancy().items():
            gauge.add_metric([tier], share)
        yield gauge
