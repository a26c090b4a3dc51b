"""Chat templates: Jinja programs that come with a model and turn messages into a prompt.

The environment offers what transformers offers to templates (`transformers/utils/chat_template_utils.py`), so that a
template gives the same prompt here and there: the sandbox, trimmed blocks, loop controls, `raise_exception`,
`strftime_now`, a `tojson` that does not escape HTML, and `{% generation %}` blocks, which render their content.
transformers itself is not imported: that costs seconds and drags torch into the ingress.
"""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ..cluster.errors import CheckpointError, InvalidRequest

_CONTINUATION_MARK = "\ufdd0continue\ufdd1"
"""Put behind a message to find its end in the prompt. Noncharacters of Unicode: no text for a reader has them."""


class _GenerationBlock(jinja2.ext.Extension):
    """`{% generation %} … {% endgeneration %}` marks an assistant's text for training; here it only renders it."""

    tags = {"generation"}  # noqa: RUF012 - read by jinja as a class attribute

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatTemplate:
    """A compiled chat template with the special tokens that it may name."""

    def __init__(self, source: str, special_tokens: dict[str, str]) -> None:
        """Compile `source`.

        Args:
            source: the Jinja text.
            special_tokens: `bos_token`, `eos_token` … as the template names them.

        Raises:
            CheckpointError: the template has a syntax error.
        """
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, "jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise CheckpointError(f"the chat template cannot be compiled: {error}") from None
        self._special_tokens = special_tokens
        self.definition = f"{source}\0{sorted(special_tokens.items())}"
        """All that the rendered text depends on, besides the conversation."""

    def render(
        self,
        messages: list[dict[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: dict[str, Any] | None = None,
    ) -> str:
        """The prompt for `messages`.

        Args:
            messages: `role`, `content` (text) and whatever else the template reads.
            add_generation_prompt: end with the header of an assistant's message.
            continue_final_message: end inside the last message, for the model to go on with it.
            variables: further template variables (`chat_template_kwargs`).

        Raises:
            InvalidRequest: the template refuses the messages or fails on them.
        """
        if continue_final_message:
            last = messages[-1]
            # The space tells whether the template trims messages.
            messages = [*messages[:-1], {**last, "content": last.get("content", "") + _CONTINUATION_MARK + " "}]
        try:
            prompt = self._template.render(
                {
                    **self._special_tokens,
                    "tools": None,
                    "documents": None,
                    **(variables or {}),
                    "messages": messages,
                    "add_generation_prompt": add_generation_prompt,
                }
            )
        except Exception as error:  # a template is the model author's program and may raise anything
            reason = str(error) or type(error).__name__
            raise InvalidRequest(f"the chat template refused the messages: {reason}", param="messages") from None
        if not continue_final_message:
            return prompt
        before, mark, after = prompt.rpartition(_CONTINUATION_MARK)
        if not mark:
            raise InvalidRequest(
                "continue_final_message: the chat template drops the end of the last message",
                param="continue_final_message",
            )
        return before if after.startswith(" ") else before.rstrip()


def find_chat_template(folder: Path, tokenizer_config: dict[str, Any]) -> str | None:
    """The source of a model's default chat template, or None if it has none.

    Looked for, as transformers does, in `chat_template.jinja`, `chat_template.json` and the `chat_template` field of
    `tokenizer_config.json` (a text, or a list of named ones).
    """
    if (file := folder / "chat_template.jinja").is_file():
        return file.read_text(encoding="utf-8")
    found: Any = None
    if (file := folder / "chat_template.json").is_file():
        found = json.loads(file.read_text(encoding="utf-8")).get("chat_template")
    found = found or tokenizer_config.get("chat_template")
    if isinstance(found, list):
        found = {entry["name"]: entry["template"] for entry in found}
    if isinstance(found, dict):
        found = found.get("default")
    return found


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without the escapes for HTML that Jinja's own filter adds."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
