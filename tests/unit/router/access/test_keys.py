import logging
import os
from base64 import b64encode
from pathlib import Path

import pytest

from core.errors import ConfigError
from router.access.caller import Access
from router.access.door import Door
from router.access.key_file import KeyFile
from router.access.keys import hash_of, new_key, read_keys
from router.admission import Priority
from router.api.errors import HttpError
from tests.support.api_keys import KeyRing

DIGEST = "sha256:" + "a" * 64


def test_keys_are_random_and_the_file_holds_their_digests_only() -> None:
    keys = {new_key() for _ in range(100)}
    assert len(keys) == 100
    assert all(key.startswith("dk-") and len(key) >= 46 for key in keys)
    ring = KeyRing(a={}, b={"tenant": "t", "models": ["m"], "priority": "high", "admin": True})
    assert not any(key in ring.text for key in ring.plain.values())
    entry = ring.keys.find(ring.plain["b"].encode())
    assert entry is not None
    caller = entry.caller()
    assert (caller.name, caller.tenant, caller.admin) == ("b", "t", True)
    assert caller.best_priority is Priority.HIGH
    assert caller.may_use("m") and not caller.may_use("n")
    assert ring.keys.find(ring.plain["a"].encode() + b"x") is None
    assert ring.keys.find(hash_of(ring.plain["a"]).encode()) is None


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "at least one key"),
        ("[]", "at least one key"),
        ("name: a", "must be a list"),
        ("- name: a\n  bad: [", "not valid YAML in line"),
        ("- name: a", "key 1.hash"),
        ("- name: a\n  hash: dk-plainkey", "diptych keys new"),
        (f"- name: a b\n  hash: {DIGEST}", "key 1.name"),
        (f"- name: a\n  hash: {DIGEST}\n  rpm: 3", "key 1.rpm"),
        (f"- name: a\n  hash: {DIGEST}\n  priority: urgent", "high, normal, low"),
        (f"- name: a\n  hash: {DIGEST}\n  requests_per_minute: 0", "requests_per_minute"),
        (f"- name: a\n  hash: {DIGEST}\n- name: a\n  hash: {hash_of('b')}", "key 2 has a name"),
        (f"- name: a\n  hash: {DIGEST}\n- name: b\n  hash: {DIGEST}", "key 2 has a hash"),
    ],
)
def test_a_wrong_file_says_where_and_shows_nothing(text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=r"keys\.yaml") as caught:
        read_keys(text, "keys.yaml")
    assert says in caught.value.message
    assert "plainkey" not in caught.value.message
    assert DIGEST not in caught.value.message


def _code(door: Door, headers: dict[bytes, bytes], access: Access = Access.KEY) -> int:
    try:
        door.admit(headers, access)
    except HttpError as error:
        return error.status
    return 200


def test_the_door_knows_keys_however_they_are_sent() -> None:
    ring = KeyRing(a={})
    key = ring.plain["a"].encode()
    door = Door(ring.keys)
    for headers in (
        {b"authorization": b"Bearer " + key},
        {b"authorization": b"bearer  " + key},
        {b"x-api-key": key},
    ):
        assert door.admit(headers, Access.KEY).name == "a"
    for headers in (
        {},
        {b"authorization": b""},
        {b"authorization": b"Bearer"},
        {b"authorization": key},
        {b"authorization": b"Basic !"},
        {b"authorization": b"Bearer " + key[:-1]},
        {b"authorization": b"Bearer " + key * 20},
        {b"x-api-key": b"\xff\x00"},
    ):
        assert _code(door, headers) == 401
    assert _code(door, {}, Access.OPEN) == 200
    assert _code(door, {b"x-api-key": key}, Access.ADMIN) == 403


def test_a_browser_s_remembered_key_is_of_no_use_to_another_site() -> None:
    ring = KeyRing(root={"admin": True})
    door = Door(ring.keys)
    key = b64encode(b"any:" + ring.plain["root"].encode())
    basic = {b"authorization": b"Basic " + key, b"host": b"llm.example"}
    assert _code(door, basic, Access.PAGE) == 200
    assert _code(door, basic | {b"origin": b"https://llm.example"}, Access.ADMIN) == 200
    assert _code(door, basic | {b"origin": b"https://evil.example"}, Access.ADMIN) == 401
    assert _code(door, basic | {b"origin": b"null"}, Access.ADMIN) == 401
    assert _code(door, basic | {b"sec-fetch-site": b"cross-site"}, Access.ADMIN) == 401


def _swap(folder: Path, text: str, version: str) -> None:
    """As Kubernetes replaces the files of a mounted Secret."""
    data = folder / version
    data.mkdir()
    (data / "keys.yaml").write_text(text)
    (folder / "new").symlink_to(version)
    os.replace(folder / "new", folder / "..data")


async def test_a_file_that_changes_is_read_again_and_a_broken_one_is_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = KeyRing(a={"requests_per_minute": 5}), KeyRing(a={}, b={})
    _swap(tmp_path, first.text, "1")
    (tmp_path / "keys.yaml").symlink_to("..data/keys.yaml")
    file = KeyFile(tmp_path / "keys.yaml")
    door = Door(file.read())

    def opens(key: str) -> bool:
        return _code(door, {b"x-api-key": key.encode()}) == 200

    await file.follow(door)
    assert opens(first.plain["a"]) and not opens(second.plain["b"])

    secret = "dk-was-pasted-here"
    _swap(tmp_path, f"- name: a\n  hash: {secret}", "2")
    with caplog.at_level(logging.ERROR):
        await file.follow(door)
        await file.follow(door)
    assert caplog.text.count("stay in use") == 1
    assert secret not in caplog.text
    assert opens(first.plain["a"])

    _swap(tmp_path, second.text, "3")
    await file.follow(door)
    assert opens(second.plain["b"]) and not opens(first.plain["a"])

    (tmp_path / "..data").unlink()
    await file.follow(door)
    assert opens(second.plain["b"])


def test_new_keys_leave_what_is_used_up_as_it_is_unless_limits_changed() -> None:
    ring = KeyRing(a={"requests_per_minute": 1})
    door = Door(ring.keys, clock=lambda: 0.0)
    caller = door.admit({b"x-api-key": ring.plain["a"].encode()}, Access.KEY)

    def spent() -> bool:
        allowance = door.allowance(caller)
        assert allowance is not None
        try:
            with allowance.request():
                return False
        except HttpError as error:
            return error.status == 429

    assert not spent()
    door.change(ring.keys)
    assert spent()
    door.change(KeyRing(a={"requests_per_minute": 2}).keys)
    assert not spent()
