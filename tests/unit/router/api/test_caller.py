import pytest

from core.errors import InvalidRequestError
from router.admission import Priority
from router.api.caller import caller_key, priority_of


def test_key_is_that_of_the_secret_and_never_shows_it() -> None:
    key = caller_key({b"authorization": b"Bearer secret"}, "alice")
    assert key == caller_key({b"authorization": b"Bearer secret"}, "bob")
    assert key != caller_key({b"authorization": b"Bearer other"}, "alice")
    assert "secret" not in key


def test_without_a_secret_the_user_counts() -> None:
    assert caller_key({}, "alice") == caller_key({}, "alice") != caller_key({}, "bob")
    assert caller_key({}, None) == ""


def test_priority_is_read_and_checked() -> None:
    assert priority_of({}) is Priority.NORMAL
    assert priority_of({b"x-request-priority": b"High"}) is Priority.HIGH
    with pytest.raises(InvalidRequestError, match="high, normal, low, got 'urgent'"):
        priority_of({b"x-request-priority": b"urgent"})
