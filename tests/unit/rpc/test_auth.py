from pathlib import Path

import pytest

from core.errors import ConfigError
from rpc.auth import Credentials, require_protection
from tests.support.pki import issue


@pytest.fixture
def pem(tmp_path: Path) -> Path:
    path = tmp_path / "a.pem"
    path.write_text("not looked at here")
    return path


def test_token_is_not_shown() -> None:
    assert "s3cret" not in repr(Credentials(token="s3cret"))


def test_empty_settings_mean_unset() -> None:
    unset = Credentials.from_settings(token="", ca="", cert=None, key="")
    assert unset == Credentials()
    assert unset.metadata == ()


@pytest.mark.parametrize("token", ["two words", "line\nbreak", "é"])
def test_token_that_no_header_can_carry_is_refused(token: str) -> None:
    with pytest.raises(ConfigError, match="auth_token") as caught:
        Credentials(token=token)
    assert token not in str(caught.value)


def test_certificate_and_key_go_together(pem: Path) -> None:
    with pytest.raises(ConfigError, match="tls_key"):
        Credentials(cert=pem)
    with pytest.raises(ConfigError, match="tls_cert"):
        Credentials(key=pem)


def test_file_that_is_not_there_is_named(pem: Path) -> None:
    with pytest.raises(ConfigError, match=r"tls_ca names .*absent"):
        Credentials(ca=pem.with_name("absent"))


@pytest.mark.parametrize("host", ["127.0.0.1", "127.3.2.1", "::1", "[::1]", "localhost"])
def test_loopback_needs_no_protection(host: str) -> None:
    require_protection(host, Credentials(), insecure=False)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "example.org", ""])
def test_other_hosts_need_protection(host: str, pem: Path) -> None:
    with pytest.raises(ConfigError, match="auth_token"):
        require_protection(host, Credentials(), insecure=False)
    one_sided = Credentials(ca=pem, cert=pem, key=pem, mutual=False)
    with pytest.raises(ConfigError):
        require_protection(host, one_sided, insecure=False)
    require_protection(host, Credentials(), insecure=True)
    require_protection(host, Credentials(token="t"), insecure=False)
    require_protection(host, Credentials(ca=pem, cert=pem, key=pem), insecure=False)


def test_files_of_no_use_are_refused_at_start(tmp_path: Path, pem: Path) -> None:
    one, other = issue(tmp_path / "one"), issue(tmp_path / "other")
    assert Credentials.from_settings(ca=str(one.ca), cert=str(one.cert), key=str(one.key))
    with pytest.raises(ConfigError, match=r"tls_key .*other.* can't be used"):
        Credentials.from_settings(cert=str(one.cert), key=str(other.key))
    with pytest.raises(ConfigError, match=r"tls_ca .* no PEM certificate"):
        Credentials.from_settings(ca=str(pem))
