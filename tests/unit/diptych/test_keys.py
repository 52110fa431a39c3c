import pytest

from diptych.keys import main
from router.access.keys import read_keys


def test_a_key_is_shown_once_beside_the_entry_that_lets_it_in(
    capsys: pytest.CaptureFixture[str],
) -> None:
    entries = []
    keys = []
    for argv in (
        ["--name=a"],
        ["--name=b", "--tenant=t", "--models=x,y", "--requests-per-minute=5", "--admin"],
    ):
        assert main(["new", *argv]) == 0
        shown = capsys.readouterr()
        (key,) = [line.strip() for line in shown.err.splitlines() if line.startswith("  dk-")]
        assert key not in shown.out
        keys.append(key)
        entries.append(shown.out)
    found = read_keys("".join(entries), "keys.yaml")
    plain, full = (found.find(key.encode()) for key in keys)
    assert plain is not None and full is not None
    assert (plain.name, plain.limited, plain.admin) == ("a", False, False)
    assert (full.tenant, full.models, full.requests_per_minute) == ("t", ("x", "y"), 5)


@pytest.mark.parametrize("argv", [[], ["old"], ["new"], ["new", "--name=a b"]])
def test_what_is_missing_is_said(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    try:
        status = main(argv)
    except SystemExit as error:
        status = int(error.code or 0)
    assert status == 2
    shown = capsys.readouterr()
    assert "new" in shown.out + shown.err
    assert "dk-" not in shown.out + shown.err
