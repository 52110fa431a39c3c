from hypothesis import given
from hypothesis import strategies as st

from router.text.stop_strings import StopStrings

LETTERS = "abc"
STOPS = st.lists(st.text(LETTERS, min_size=1, max_size=4), min_size=1, max_size=3)


def _expected(text: str, stops: list[str], include: bool) -> tuple[str, str | None]:
    """By the definition: the first prefix that ends with a stop string, its longest if several."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            stop = max(found, key=len)
            return text[: end if include else end - len(stop)], stop
    return text, None


@given(st.lists(st.text(LETTERS, max_size=4), max_size=8), STOPS, st.booleans())
def test_what_passes_does_not_depend_on_the_cuts(
    pieces: list[str], stops: list[str], include: bool
) -> None:
    watch = StopStrings(stops, include_match=include)
    sent, matched = "", None
    for piece in pieces:
        passed = watch.push(piece)
        sent += passed.text
        matched = passed.matched
        if matched is not None:
            break
    else:
        sent += watch.flush()
    assert (sent, matched) == _expected("".join(pieces), stops, include)


@given(st.text(LETTERS, max_size=8), STOPS)
def test_only_what_could_become_a_stop_is_held(text: str, stops: list[str]) -> None:
    watch = StopStrings(stops)
    passed = watch.push(text)
    if passed.matched is not None:
        return
    held = text[len(passed.text) :]
    starts = {stop[:n] for stop in stops for n in range(1, len(stop))}
    suffixes = [text[i:] for i in range(len(text)) if text[i:] in starts]
    assert held == (max(suffixes, key=len) if suffixes else "")


def test_stop_across_pieces_is_never_shown() -> None:
    watch = StopStrings(["STOP"])
    assert watch.push("go S").text == "go "
    assert watch.push("TO").text == ""
    last = watch.push("P and on")
    assert (last.text, last.matched) == ("", "STOP")


def test_false_start_is_let_through() -> None:
    watch = StopStrings(["STOP"])
    assert [watch.push(piece).text for piece in ("ST", "AR", "S")] == ["", "STAR", ""]
    assert watch.flush() == "S"
    assert watch.flush() == ""
