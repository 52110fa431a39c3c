"""PromQL as values that know their labels, so that a wrong name fails here and not on a wall.

A Source turns metrics of the catalogue into Vectors; a Vector is text plus the labels that its
series bear. Invariant: every metric, label and known label value in a Vector's text was looked up.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from scripts.dashboards.family import Family, UnknownLabelError
from scripts.dashboards.registry import Catalogue

Selector = Callable[[Family], Mapping[str, str]]
"""Matchers that every selector of a metric gets, as label to operator and value."""


@dataclass(frozen=True, slots=True)
class Vector:
    """An instant vector."""

    text: str
    labels: frozenset[str] = frozenset()
    families: frozenset[str] = frozenset()
    """Names of the metrics it is made of."""

    def sum(self, *by: str) -> "Vector":
        """Added up, per combination of the labels `by`."""
        return self._folded("sum", by)

    def max(self, *by: str) -> "Vector":
        """The largest."""
        return self._folded("max", by)

    def min(self, *by: str) -> "Vector":
        """The smallest."""
        return self._folded("min", by)

    def count(self, *by: str) -> "Vector":
        """How many series."""
        return self._folded("count", by)

    def median(self, *by: str) -> "Vector":
        """The median over series."""
        self._check(by)
        return self._made(f"quantile{_by(by)}(0.5, {self.text})", frozenset(by))

    def top(self, count: int) -> "Vector":
        """The series with the largest values."""
        return self._made(f"topk({count}, {self.text})", self.labels)

    def at_least(self, least: float) -> "Vector":
        """Values below `least` are taken for it."""
        return self._made(f"clamp_min({self.text}, {least:g})", self.labels)

    def joined(self, other: "Vector", *on: str, take: tuple[str, ...] = ()) -> "Vector":
        """Times `other`, many series to one, matched by `on`; `take` adds its labels."""
        self._check(on)
        other._check((*on, *take))
        text = f"{self.text} * on ({', '.join(on)}) group_left ({', '.join(take)}) {other.text}"
        return self._made(f"({text})", self.labels | set(take), other)

    def over_one(self, other: "Vector", *on: str) -> "Vector":
        """Divided by `other`, many series to one, matched by `on`."""
        self._check(on)
        other._check(on)
        text = f"{self.text} / on ({', '.join(on)}) group_left () {other.text}"
        return self._made(f"({text})", self.labels, other)

    def where(self, other: "Vector", *on: str) -> "Vector":
        """Series of this one for which `other` has one with equal labels `on`."""
        self._check(on)
        other._check(on)
        text = f"{self.text} and on ({', '.join(on)}) {other.text}"
        return self._made(f"({text})", self.labels, other)

    def __add__(self, other: "Vector | float") -> "Vector":
        return self._with("+", other)

    def __sub__(self, other: "Vector | float") -> "Vector":
        return self._with("-", other)

    def __mul__(self, other: "Vector | float") -> "Vector":
        return self._with("*", other)

    def __truediv__(self, other: "Vector | float") -> "Vector":
        return self._with("/", other)

    def __gt__(self, other: "Vector | float") -> "Vector":
        return self._with(">", other)

    def __lt__(self, other: "Vector | float") -> "Vector":
        return self._with("<", other)

    def equals(self, value: float) -> "Vector":
        """Series whose value is `value`."""
        return self._with("==", value)

    def _with(self, sign: str, other: "Vector | float") -> "Vector":
        if not isinstance(other, Vector):
            return self._made(f"({self.text} {sign} {other:g})", self.labels)
        text = f"({self.text} {sign} {other.text})"
        return self._made(text, self.labels & other.labels, other)

    def _folded(self, how: str, by: tuple[str, ...]) -> "Vector":
        self._check(by)
        return self._made(f"{how}{_by(by)}({self.text})", frozenset(by))

    def _made(self, text: str, labels: frozenset[str], other: "Vector | None" = None) -> "Vector":
        others = other.families if other is not None else frozenset[str]()
        return Vector(text, labels, self.families | others)

    def _check(self, labels: tuple[str, ...]) -> None:
        for label in labels:
            if label not in self.labels:
                raise UnknownLabelError(
                    f"No series of {self.text} has the label {label!r}; "
                    f"there are {sorted(self.labels)}."
                )


def _by(labels: tuple[str, ...]) -> str:
    return f" by ({', '.join(labels)}) " if labels else ""


@dataclass(frozen=True, slots=True)
class Source:
    """Makes Vectors of metrics, all with the same window and the same matchers.

    Keyword arguments of its methods are matchers of labels: a value, with one of != =~ !~ before it
    for another operator than =.
    """

    catalogue: Catalogue
    window: str = "$__rate_interval"
    selector: Selector = field(default=lambda family: {})

    def over(self, window: str) -> "Source":
        """The same over another window."""
        return Source(self.catalogue, window, self.selector)

    def now(self, name: str, **matchers: str) -> Vector:
        """Series of a gauge or an info, or of a recorded metric, as they are."""
        family = self._of_kind(name, "gauge", "info", "recorded")
        return self._series(family, "", matchers)

    def rate(self, name: str, **matchers: str) -> Vector:
        """Increase per second of a counter."""
        return self._ranged("rate", self._of_kind(name, "counter"), "", matchers)

    def increase(self, name: str, **matchers: str) -> Vector:
        """Increase of a counter over the window."""
        return self._ranged("increase", self._of_kind(name, "counter"), "", matchers)

    def changes(self, name: str, **matchers: str) -> Vector:
        """How often a gauge changed in the window."""
        return self._ranged("changes", self._of_kind(name, "gauge"), "", matchers)

    def observed(self, name: str, **matchers: str) -> Vector:
        """Observations per second of a histogram."""
        return self._ranged("rate", self._of_kind(name, "histogram"), "_count", matchers)

    def added(self, name: str, **matchers: str) -> Vector:
        """What the observations of a histogram add up to, per second."""
        return self._ranged("rate", self._of_kind(name, "histogram"), "_sum", matchers)

    def mean(self, name: str, *by: str, **matchers: str) -> Vector:
        """Mean observation of a histogram."""
        return self.added(name, **matchers).sum(*by) / self.observed(name, **matchers).sum(*by)

    def buckets(self, name: str, *by: str, **matchers: str) -> Vector:
        """Observations per second of a histogram, by bucket."""
        family = self._of_kind(name, "histogram")
        return self._ranged("rate", family, "_bucket", matchers).sum("le", *by)

    def quantile(self, share: float, name: str, *by: str, **matchers: str) -> Vector:
        """Quantile of a histogram, as far as its buckets resolve it."""
        buckets = self.buckets(name, *by, **matchers)
        text = f"histogram_quantile({share:g}, {buckets.text})"
        return Vector(text, frozenset(by), buckets.families)

    def _of_kind(self, name: str, *kinds: str) -> Family:
        family = self.catalogue[name]
        if family.kind not in kinds:
            raise TypeError(f"{name} is a {family.kind}, and {' or '.join(kinds)} is needed here.")
        return family

    def _ranged(
        self, function: str, family: Family, suffix: str, matchers: Mapping[str, str]
    ) -> Vector:
        series = self._series(family, suffix, matchers)
        text = f"{function}({series.text}[{self.window}])"
        return Vector(text, series.labels, series.families)

    def _series(self, family: Family, suffix: str, matchers: Mapping[str, str]) -> Vector:
        labels = family.labels | ({"le"} if suffix == "_bucket" else set())
        text = ",".join(
            _matcher(family, label, value)
            for label, value in {**self.selector(family), **matchers}.items()
        )
        name = family.name + suffix
        return Vector(f"{name}{{{text}}}" if text else name, labels, frozenset({family.name}))


def _matcher(family: Family, label: str, value: str) -> str:
    for sign in ("!~", "=~", "!="):
        if value.startswith(sign):
            plain = value.removeprefix(sign)
            family.check(label, plain if sign == "!=" else None)
            return f'{label}{sign}"{plain}"'
    family.check(label, value)
    return f'{label}="{value}"'
