import pytest

from core.errors import ConfigError, InvalidRequestError
from router.text.chat_template import ChatTemplate
from router.text.processor import TextProcessor
from tests.support.router_api import CHAT_TEMPLATE, byte_tokenizer

USER = {"role": "user", "content": "hi"}


def _render(source: str, **kwargs: object) -> str:
    template = ChatTemplate(source, {"bos_token": "<s>"})
    return template.render([USER], **kwargs)  # type: ignore[arg-type]


def test_blocks_are_trimmed_as_models_saw_them() -> None:
    source = (
        "{% for m in messages %}\n  {% if true %}\n{{ m.content }}\n  {% endif %}\n{% endfor %}"
    )
    assert _render(source) == "hi\n"


def test_json_is_not_html_escaped() -> None:
    assert _render("{{ {'a': '<é&>'} | tojson }}") == '{"a": "<é&>"}'


def test_special_tokens_and_variables_are_visible() -> None:
    assert _render("{{ bos_token }}{{ mood }}", variables={"mood": "calm"}) == "<s>calm"


def test_generation_tag_and_loop_controls_render() -> None:
    source = (
        "{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}"
        "{% generation %}{{ i }}{% endgeneration %}{% endfor %}"
    )
    assert _render(source) == "01"


def test_strftime_now_formats_the_time() -> None:
    assert _render("{{ strftime_now('%Y') | int > 2000 }}") == "True"


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('no system role') }}",
        "{{ nothing.at.all }}",
        "{{ messages + 1 }}",
        "{{ ''.__class__.__mro__ }}",
        "{% for i in range(10**9) %}{% endfor %}",
    ],
)
def test_failure_inside_a_template_is_the_request_s(source: str) -> None:
    with pytest.raises(InvalidRequestError, match="refused the conversation") as caught:
        _render(source)
    assert caught.value.param == "messages"


def test_messages_can_not_be_changed_by_a_template() -> None:
    with pytest.raises(InvalidRequestError):
        _render("{{ messages.append(1) }}")


def test_reserved_variable_is_refused_by_name() -> None:
    with pytest.raises(InvalidRequestError, match="may not set messages") as caught:
        _render("x", variables={"messages": []})
    assert caught.value.param == "chat_template_kwargs"


def test_template_that_is_not_jinja_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="not valid jinja"):
        ChatTemplate("{% if %}", {})


def test_continued_message_is_left_open() -> None:
    template = ChatTemplate(CHAT_TEMPLATE, {})
    chat = [USER, {"role": "assistant", "content": "Sure: "}]
    text = template.render(chat, add_generation_prompt=False, continue_final_message=True)
    assert text == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nSure: "


def test_continued_message_is_trimmed_where_the_template_trims() -> None:
    source = "{% for m in messages %}[{{ m.content | trim }}]{% endfor %}"
    chat = [USER, {"role": "assistant", "content": "Sure: "}]
    text = ChatTemplate(source, {}).render(
        chat, add_generation_prompt=False, continue_final_message=True
    )
    assert text == "[hi][Sure:"


def test_continuing_needs_a_template_that_keeps_the_message() -> None:
    with pytest.raises(InvalidRequestError, match="continue_final_message"):
        _render("fixed", add_generation_prompt=False, continue_final_message=True)
    with pytest.raises(InvalidRequestError, match="exclude each other"):
        _render("x", add_generation_prompt=True, continue_final_message=True)


def test_model_without_template_points_to_completions() -> None:
    with pytest.raises(InvalidRequestError, match="/v1/completions"):
        TextProcessor(byte_tokenizer(), None).render_chat([USER])
