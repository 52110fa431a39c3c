from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pytest
from pydantic import BaseModel, ConfigDict, Field, SecretStr

from core.errors import ConfigError
from core.settings import ByteSize, Seconds, dump, load, load_or_exit


class Example(BaseModel):
    """An example process."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    block_size: int = Field(16, ge=1, le=256, description="Tokens per block.")
    dtype: Literal["auto", "float32"] = Field("auto", description="Number format.")
    pool: ByteSize = Field(ByteSize(1 << 30), ge=1, description="Size of the pool.")
    wait_s: Seconds = Field(0.25, gt=0, description="Longest wait, 100 % of it.")
    limit_s: Seconds | None = Field(None, gt=0, description="Limit; default: no limit.")
    count: int | None = Field(3, description="How many.")
    token: SecretStr | None = Field(None, description="Shared secret.")
    peers: tuple[str, ...] = Field((), description="Addresses of peers.")
    labels: dict[str, str] = Field(default_factory=dict, description="Labels.")
    caching: bool = Field(True, description="Keep things.")


class Needy(BaseModel):
    name: str = Field(description="Without a default.")


def resolve(*argv: str) -> Example:
    return load(Example, argv, prog="diptych example", env_prefix="EXAMPLE_")


@pytest.fixture
def yaml_file(tmp_path: Path) -> Callable[[str], str]:
    def write(text: str) -> str:
        path = tmp_path / "example.yaml"
        path.write_text(text)
        return str(path)

    return write


def refusal(*argv: str) -> str:
    with pytest.raises(ConfigError) as caught:
        resolve(*argv)
    return str(caught.value)


def test_defaults_hold_without_any_source() -> None:
    assert resolve() == Example()


def test_command_line_beats_environment_beats_yaml_beats_default(
    yaml_file: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = yaml_file("block_size: 32\ncount: 5\ndtype: float32\n")
    monkeypatch.setenv("EXAMPLE_BLOCK_SIZE", "64")
    monkeypatch.setenv("EXAMPLE_COUNT", "6")
    settings = resolve("--config", path, "--block-size", "128")
    assert (settings.block_size, settings.count, settings.dtype) == (128, 6, "float32")
    assert settings.wait_s == 0.25


def test_result_is_the_class_that_was_asked_for_and_knows_what_was_set() -> None:
    settings = resolve("--count", "7")
    assert type(settings) is Example
    assert settings.model_fields_set == {"count"}


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("250ms", 0.25), ("2", 2.0), ("1.5s", 1.5), ("2m", 120.0), ("1h", 3600.0), (".5 s", 0.5)],
)
def test_durations_accept_units(text: str, seconds: float) -> None:
    assert resolve("--wait-s", text).wait_s == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("text", "size"),
    [("1GiB", 1 << 30), ("2GB", 2 * 10**9), ("512", 512), ("1.5 KiB", 1536)],
)
def test_sizes_accept_units(text: str, size: int) -> None:
    assert resolve("--pool", text).pool == size


def test_yaml_takes_units_and_lists_and_null(yaml_file: Callable[[str], str]) -> None:
    path = yaml_file("pool: 7MiB\nwait_s: 3m\npeers: [a:1, b:2]\ncount: null\nlabels: {a: b}\n")
    settings = resolve("--config", path)
    assert settings.pool == 7 << 20
    assert settings.wait_s == 180.0
    assert settings.peers == ("a:1", "b:2")
    assert settings.count is None
    assert settings.labels == {"a": "b"}


def test_lists_and_mappings_on_command_line_and_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("EXAMPLE_PEERS", "127.0.0.1:1, [::1]:2")
    monkeypatch.setenv("EXAMPLE_LABELS", '{"a": "b"}')
    assert resolve().peers == ("127.0.0.1:1", "[::1]:2")
    assert resolve().labels == {"a": "b"}
    assert resolve("--peers", "").peers == ()
    assert resolve("--peers", '["x,y"]').peers == ("x,y",)


def test_none_unsets_what_may_be_unset_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXAMPLE_LIMIT_S", "none")
    assert resolve("--count", "none").count is None
    assert resolve().limit_s is None
    assert "block_size" in refusal("--block-size", "none")


def test_switches_have_a_negative() -> None:
    assert resolve("--no-caching").caching is False
    assert resolve("--caching").caching is True


def test_unknown_option_is_refused_with_the_nearest() -> None:
    message = refusal("--blok-size", "3")
    assert "--blok-size" in message
    assert "Did you mean --block-size?" in message


def test_abbreviated_option_is_refused() -> None:
    assert "--block-siz" in refusal("--block-siz", "3")


def test_unknown_variable_is_refused_with_the_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXAMPLE_BLOKSIZE", "3")
    assert "EXAMPLE_BLOKSIZE" in refusal()
    assert "Did you mean EXAMPLE_BLOCK_SIZE?" in refusal()


def test_variable_that_kubernetes_adds_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXAMPLE_SERVICE_HOST", "10.0.0.1")
    assert "enableServiceLinks" in refusal()


def test_unknown_key_is_refused_with_the_nearest_and_its_line(
    yaml_file: Callable[[str], str],
) -> None:
    path = yaml_file("# a comment\ncount: 1\nblock-size: 3\n")
    message = refusal("--config", path)
    assert f"{path}:3" in message
    assert "Did you mean block_size?" in message


def test_key_that_stands_twice_is_refused(yaml_file: Callable[[str], str]) -> None:
    message = refusal("--config", yaml_file("count: 1\ncount: 2\n"))
    assert ":1" in message
    assert ":2" in message


@pytest.mark.parametrize("text", ["- a\n", "a\n", "{", "count: 1\n- 3\n", "3: 4\n", "[1]: 2\n"])
def test_file_that_is_no_mapping_of_settings_is_refused(
    yaml_file: Callable[[str], str], text: str
) -> None:
    path = yaml_file(text)
    assert path in refusal("--config", path)


def test_missing_file_is_refused_and_empty_file_is_not(
    yaml_file: Callable[[str], str], tmp_path: Path
) -> None:
    assert "absent.yaml" in refusal("--config", str(tmp_path / "absent.yaml"))
    assert resolve("--config", yaml_file("# nothing\n")) == Example()


def test_wrong_value_names_field_value_place_and_what_is_allowed(
    yaml_file: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EXAMPLE_WAIT_S", "3 weeks")
    path = yaml_file("count: 1\nblock_size: 1000\n")
    message = refusal("--config", path, "--dtype", "float7")
    assert f"block_size = 1000 ({path}:2): " in message
    assert "less than or equal to 256" in message
    assert "dtype = 'float7' (--dtype)" in message
    assert "'auto' or 'float32'" in message
    assert "wait_s = '3 weeks' (EXAMPLE_WAIT_S)" in message
    assert "250ms" in message


def test_missing_required_setting_says_how_to_give_it() -> None:
    with pytest.raises(ConfigError, match="--name"):
        load(Needy, [], prog="x", env_prefix="NEEDY_")


def test_stray_words_and_missing_values_are_refused() -> None:
    assert "'foo'" in refusal("foo")
    assert "--block-size" in refusal("--block-size")


def test_secrets_are_never_shown(
    yaml_file: Callable[[str], str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert "s3cret" not in refusal("--config", yaml_file("token: [s3cret]\n"))
    settings = resolve("--token", "s3cret")
    assert settings.token is not None
    assert settings.token.get_secret_value() == "s3cret"
    assert "s3cret" not in repr(settings) + dump(settings)


def test_print_config_prints_what_config_reads(
    yaml_file: Callable[[str], str], capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ("--pool=1MiB", "--peers=a:1,b:2", "--no-caching", "--limit-s=2m")
    with pytest.raises(SystemExit) as caught:
        resolve(*argv, "--print-config")
    assert caught.value.code == 0
    printed = capsys.readouterr().out
    assert resolve("--config", yaml_file(printed)) == resolve(*argv)


def test_help_explains_every_field(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        resolve("--help")
    assert caught.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for name, field in Example.model_fields.items():
        assert "--" + name.replace("_", "-") in text
        assert f"[EXAMPLE_{name.upper()}]" in text
        assert field.description is not None
        assert field.description in text
    assert "--pool BYTES Size of the pool. In bytes, or as in 512MiB, 2GB. Default: 1.0GiB." in text
    assert "{auto,float32}" in text


def test_edge_turns_an_error_into_a_message_and_status_2(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as caught:
        load_or_exit(Example, ["--nope"], prog="diptych example", env_prefix="EXAMPLE_")
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith("diptych example: error: Unknown option --nope")


def test_check_judges_every_source_and_prints_ok(
    yaml_file: Callable[[str], str], capsys: pytest.CaptureFixture[str]
) -> None:
    path = yaml_file("block_size: 32\n")
    with pytest.raises(SystemExit) as caught:
        resolve("--config", path, "--check")
    assert caught.value.code == 0
    assert capsys.readouterr().out == "ok\n"
    path = yaml_file("block_size: 0\n")
    assert f"block_size = 0 ({path}:1)" in refusal("--config", path, "--check")
