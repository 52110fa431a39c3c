"""One metric as PromQL sees it: its name, its series' names, and the labels that they bear."""

from collections.abc import Mapping
from dataclasses import dataclass, replace


class UnknownMetricError(LookupError):
    """A panel or a rule names a metric that no process shows."""


class UnknownLabelError(LookupError):
    """A panel or a rule names a label, or a value of one, that its metric does not have."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """A metric with all of its series."""

    name: str
    """Of a histogram without _bucket, _sum, _count; else of the series."""
    kind: str
    """counter, gauge, histogram or info; recorded for what a rule computes."""
    meaning: str
    values: Mapping[str, frozenset[str]]
    """Own label to its values; empty if they are no fixed set."""
    scraped: frozenset[str]
    """Labels that every series of its process bears."""
    processes: tuple[str, ...] = ()
    """Of Diptych: router, worker (the service process), prefill or decode (the engine process)."""
    exporter: str = ""
    """Who shows it, if not Diptych."""

    @property
    def labels(self) -> frozenset[str]:
        """Every label that can be asked for."""
        return self.scraped | set(self.values)

    @property
    def of_workers(self) -> bool:
        """True if workers show it."""
        return "worker" in self.scraped

    def joined(self, other: "Family") -> "Family":
        """The same metric as two processes declare it."""
        values = {
            name: self.values.get(name, frozenset()) | other.values.get(name, frozenset())
            for name in (*self.values, *other.values)
        }
        return replace(
            self,
            values=values,
            scraped=self.scraped & other.scraped,
            processes=tuple(dict.fromkeys((*self.processes, *other.processes))),
        )

    def check(self, label: str, value: str | None = None) -> None:
        """Raise UnknownLabelError if there is no such label, or no such value of it."""
        if label not in self.labels:
            raise UnknownLabelError(
                f"{self.name} has no label {label!r}; it has {sorted(self.labels)}."
            )
        known = self.values.get(label)
        if value is not None and known and value not in known:
            raise UnknownLabelError(
                f"{self.name} has no {label}={value!r}; there are {sorted(known)}."
            )
