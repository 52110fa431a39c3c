"""A histogram for what one event loop observes for every token.

Used by the router, whose loop both observes and answers scrapes. No other thread may touch it.
"""

from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate

from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString


class LoopSeries:
    """One series of a LoopHistogram."""

    def __init__(self, bounds: Sequence[float]) -> None:
        """`bounds`: upper ones of the buckets, ascending; above the last is one more bucket."""
        self._bounds = tuple(bounds)
        self._counts = [0] * (len(self._bounds) + 1)
        self._sum = 0.0

    def observe(self, amount: float) -> None:
        """Count one value."""
        self._counts[bisect_left(self._bounds, amount)] += 1
        self._sum += amount

    def add_to(self, family: HistogramMetricFamily, label: str) -> None:
        """Put it into what is shown."""
        bounds = [*map(floatToGoString, self._bounds), "+Inf"]
        counts = accumulate(self._counts)
        family.add_metric([label], list(zip(bounds, counts, strict=True)), self._sum)


class LoopHistogram(Collector):
    """A histogram that only one thread observes and shows.

    To a scraper it looks like prometheus_client's own, which takes two locks for each value.
    """

    def __init__(
        self,
        name: str,
        documentation: str,
        label: str,
        *,
        buckets: Sequence[float],
        registry: CollectorRegistry,
    ) -> None:
        self._name, self._documentation, self._label = name, documentation, label
        self._buckets = buckets
        self._series: dict[str, LoopSeries] = {}
        registry.register(self)

    def labels(self, value: str) -> LoopSeries:
        """The series with a value of the label."""
        return self._series.setdefault(value, LoopSeries(self._buckets))

    def describe(self) -> list[Metric]:
        """Its name, for the registry."""
        return [self._family()]

    def collect(self) -> list[Metric]:
        """All series."""
        family = self._family()
        for value, series in self._series.items():
            series.add_to(family, value)
        return [family]

    def _family(self) -> HistogramMetricFamily:
        return HistogramMetricFamily(self._name, self._documentation, labels=[self._label])
