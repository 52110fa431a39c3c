"""Label and field selectors."""

import re
from collections.abc import Callable, Mapping

from tests.support.kube.failure import Failure

Test = Callable[[Mapping[str, object]], bool]
_SET = re.compile(r"(\S+)\s+(in|notin)\s+\(([^)]*)\)")
_SPLIT = re.compile(r",(?![^(]*\))")


def labels(selector: str) -> Test:
    """A test of objects for `a=b,c!=d,e in (f,g),h notin (i),j,!k`."""
    tests = [_requirement(part.strip()) for part in _SPLIT.split(selector) if part.strip()]
    return lambda item: all(test(_labels(item)) for test in tests)


def fields(selector: str) -> Test:
    """A test of objects for `metadata.name=a,status.phase!=b`."""
    tests = []
    for part in filter(None, selector.split(",")):
        path, operator, value = re.split(r"(!=|==?)", part, maxsplit=1)
        tests.append((path.split("."), operator == "!=", value))
    return lambda item: all(
        (_field(item, path) == value) != negated for path, negated, value in tests
    )


def _requirement(text: str) -> Callable[[Mapping[str, str]], bool]:
    if found := _SET.fullmatch(text):
        key, operator, values = found[1], found[2], {v.strip() for v in found[3].split(",")}
        if operator == "in":
            return lambda have: have.get(key) in values
        return lambda have: have.get(key) not in values
    if "!=" in text:
        key, _, value = text.partition("!=")
        return lambda have: have.get(key.strip()) != value.strip()
    if "=" in text:
        key, _, value = text.replace("==", "=").partition("=")
        return lambda have: have.get(key.strip()) == value.strip()
    if text.startswith("!"):
        return lambda have: text[1:] not in have
    if " " in text:
        raise Failure(400, f"unable to parse requirement: {text}")
    return lambda have: text in have


def _labels(item: Mapping[str, object]) -> Mapping[str, str]:
    return item["metadata"].get("labels") or {}  # type: ignore[index,return-value]


def _field(item: object, path: list[str]) -> str:
    for step in path:
        item = item.get(step) if isinstance(item, Mapping) else None
    return "" if item is None else str(item)
