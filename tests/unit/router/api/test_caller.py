import pytest

from core.errors import InvalidRequestError
from router.access.caller import ANYONE
from router.admission import Priority
from router.api.caller import caller_key, priority_of


def test_key_is_that_of_the_secret_and_never_shows_it() -> None:
    key = caller_key(ANYONE, {b"authorization": b"Bearer secret"}, "alice")
    assert key == caller_key(ANYONE, {b"authorization": b"Bearer secret"}, "bob")
    assert key != caller_key(ANYONE, {b"authorization": b"Bearer other"}, "alice")
    assert "secret" not in key


def test_without_a_secret_the_user_counts() -> None:
    assert (
        caller_key(ANYONE, {}, "alice")
        == caller_key(ANYONE, {}, "alice")
        != caller_key(ANYONE, {}, "bob")
    )
    assert caller_key(ANYONE, {}, None) == ""


def test_priority_is_read_and_checked() -> None:
    assert priority_of(ANYONE, {}) is Priority.NORMAL
    assert priority_of(ANYONE, {b"x-request-priority": b"High"}) is Priority.HIGH
    with pytest.raises(InvalidRequestError, match="high, normal, low, got 'urgent'"):
        priority_of(ANYONE, {b"x-request-priority": b"urgent"})
