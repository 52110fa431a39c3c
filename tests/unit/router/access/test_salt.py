from router.access.salt import TenantSalt, tenant_salt


def test_tenants_and_what_they_asked_for_never_meet() -> None:
    salt = TenantSalt(b"secret")
    pairs = [("a", ""), ("b", ""), ("a", "x"), ("ab", "x"), ("a", "bx"), ("1:a", ""), ("1", ":a")]
    assert len({salt.of(*pair) for pair in pairs}) == len(pairs)
    assert salt.of("a", "x") == TenantSalt(b"secret").of("a", "x")


def test_without_the_secret_a_salt_can_t_be_told() -> None:
    assert TenantSalt(b"secret").of("a", "") != TenantSalt(b"other").of("a", "")
    assert tenant_salt("token").of("a", "") == tenant_salt("token").of("a", "")
    assert tenant_salt(None).of("a", "") != tenant_salt(None).of("a", "")
    assert "secret" not in TenantSalt(b"secret").of("a", "")


def test_without_keys_the_client_s_own_salt_is_all() -> None:
    assert TenantSalt(b"secret").of("", "") == ""
    assert TenantSalt(b"secret").of("", "mine") == "mine"
    assert TenantSalt(b"secret").of("a", "\ud800")
