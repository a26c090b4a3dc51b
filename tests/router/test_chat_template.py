"""Chat templates give the prompt that transformers gives."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from raytroupe.cluster.errors import CheckpointError, InvalidRequest
from raytroupe.router.chat_template import ChatTemplate, find_chat_template

CHAT = [
    {"role": "system", "content": "Be <b>brief</b>."},
    {"role": "user", "content": " Wie heißt du? "},
    {"role": "assistant", "content": "Ich bin "},
]
TEMPLATE = """
{%- for message in messages %}
    {%- if message.role == 'system' %}{% continue %}{% endif %}
    {%- if message.role == 'assistant' %}
<{{ message.role }}>{% generation %}{{ message.content }}{% endgeneration %}
    {%- else %}
<{{ message.role }}>{{ message.content | trim }}
    {%- endif %}
{{ eos_token }}
{%- endfor %}
{{ {"a": "<é>"} | tojson }} {{ thinking | default(false) }} {{ strftime_now('%%') }}
{%- if add_generation_prompt %}<assistant>{% endif %}
"""


@pytest.mark.parametrize(
    ("add_generation_prompt", "continue_final_message"), [(True, False), (False, False), (False, True)]
)
def test_prompts_equal_those_of_transformers(add_generation_prompt: bool, continue_final_message: bool) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    options = {"add_generation_prompt": add_generation_prompt, "continue_final_message": continue_final_message}
    (expected,), _ = render_jinja_template([CHAT], chat_template=TEMPLATE, eos_token="</s>", thinking=True, **options)
    ours = ChatTemplate(TEMPLATE, {"eos_token": "</s>"}).render(CHAT, variables={"thinking": True}, **options)
    assert ours == expected


def test_continuing_a_message_that_the_template_trims_drops_its_trailing_space() -> None:
    template = ChatTemplate("{% for m in messages %}[{{ m.content | trim }}]{% endfor %}", {})
    assert template.render(CHAT[2:], continue_final_message=True) == "[Ich bin"


def test_continuing_a_message_that_the_template_drops_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="drops the end"):
        ChatTemplate("{{ messages[0].role }}", {}).render(CHAT, continue_final_message=True)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages.foo.bar }}", "foo"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ messages.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
    ],
)
def test_a_template_that_fails_is_the_requests_fault_and_says_why(source: str, reason: str) -> None:
    with pytest.raises(InvalidRequest, match=reason) as caught:
        ChatTemplate(source, {}).render(CHAT)
    assert caught.value.param == "messages"


def test_a_broken_template_is_found_at_loading() -> None:
    with pytest.raises(CheckpointError, match="chat template"):
        ChatTemplate("{% if %}", {})


def test_a_template_may_sit_in_any_of_its_usual_places(tmp_path: Path) -> None:
    assert find_chat_template(tmp_path, {}) is None
    assert find_chat_template(tmp_path, {"chat_template": "config"}) == "config"
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    assert find_chat_template(tmp_path, {"chat_template": named}) == "plain"
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "json"}))
    assert find_chat_template(tmp_path, {"chat_template": "config"}) == "json"
    (tmp_path / "chat_template.jinja").write_text("jinja")
    assert find_chat_template(tmp_path, {"chat_template": "config"}) == "jinja"
