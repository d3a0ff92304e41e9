"""The chat template of a tokenizer folder, rendered without transformers.

In: a folder with `chat_template` in tokenizer_config.json or a chat_template.jinja, and messages. Out: one string. The
template is the folder's own program, so it runs in Jinja's sandbox. Knows nothing of token ids.
"""

import json
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from baatt.lab.texts import read_text
from baatt.models.checkpoint import read_json

#: Stands behind the final message while it is rendered; what follows it is cut off. No template trims it.
END_OF_MESSAGE = "\ue000end of message\ue000"


class ChatTemplates(NamedTuple):
    """Templates by name, and the texts of special tokens that they may use, such as `bos_token`."""

    templates: dict[str, str]
    special_tokens: dict[str, str]

    def source(self, name: str | None = None) -> str:
        """The template of a name, None for the default one; ValueError: the folder has no template, or not this one."""
        if not self.templates:
            raise ValueError("the model's folder must have a chat template (tokenizer_config.json), and has none")
        if (name := name or "default") not in self.templates:
            raise ValueError(f"chat template must be one of {sorted(self.templates)}, got {name!r}")
        return self.templates[name]

    def render(
        self, messages: Sequence[dict[str, Any]], *, name: str | None = None, continue_final_message: bool = False
    ) -> str:
        """Messages as the prompt of the assistant's answer.

        Args:
            messages: `{"role": ..., "content": ...}`, in order.
            name: as `source`.
            continue_final_message: the last message is the beginning of the answer: the prompt ends with it, without
                the template's end of turn and without a header for another answer.

        Raises:
            ValueError: no messages, no such template, a template that refuses the messages or drops the last of them.
        """
        if not messages:
            raise ValueError("messages must not be empty")
        conversation = [dict(message) for message in messages]
        if continue_final_message:
            conversation[-1]["content"] += END_OF_MESSAGE
        source = self.source(name)
        try:
            text = _environment().from_string(source).render(
                messages=conversation, tools=None, documents=None, add_generation_prompt=not continue_final_message,
                **self.special_tokens,
            )  # fmt: skip
        except Exception as error:  # a template is a program, which may raise anything
            raise ValueError(f"the chat template refuses the messages: {error}") from error
        if not continue_final_message:
            return text
        prompt, found, _ = text.rpartition(END_OF_MESSAGE)
        if not found:
            raise ValueError("the chat template must keep the last message to continue it, and drops it")
        return prompt


def load_chat_templates(folder: str | Path) -> ChatTemplates:
    """The templates of a folder, which may have none; ValueError: a tokenizer_config.json that is broken."""
    folder = Path(folder)
    file, alone = folder / "tokenizer_config.json", folder / "chat_template.jinja"
    values = read_json(file) if file.is_file() else {}
    stored = values.get("chat_template")
    if stored is None or isinstance(stored, str):
        templates = {} if stored is None else {"default": stored}
    elif isinstance(stored, list) and all(isinstance(x, dict) and {"name", "template"} <= set(x) for x in stored):
        templates = {str(entry["name"]): str(entry["template"]) for entry in stored}
    else:
        raise ValueError(f"{folder}: chat_template must be a text or a list of names and templates, got {stored!r:.80}")
    if alone.is_file():
        templates["default"] = read_text(alone)
    # A special token is stored as a text or as an object with its `content`.
    texts = {name: x.get("content") if isinstance(x, dict) else x for name, x in values.items()}
    special = {name: text for name, text in texts.items() if name.endswith("_token") and isinstance(text, str)}
    return ChatTemplates(templates, special)


class _Generation(Extension):
    """`{% generation %}` around what the assistant says, which training wants to find: the text inside as it is."""

    tags = {"generation"}  # noqa: RUF012  (Jinja's)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_inside"), [], [], body).set_lineno(line)

    def _inside(self, caller: Callable[[], str]) -> str:
        return caller()


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """In place of Jinja's own filter, which would escape HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _environment() -> ImmutableSandboxedEnvironment:
    """Jinja as transformers sets it up for chat templates."""

    def refuse(message: str) -> NoReturn:
        raise TemplateError(message)

    extensions = [_Generation, "jinja2.ext.loopcontrols"]
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    environment.globals |= {"raise_exception": refuse, "strftime_now": lambda form: datetime.now().strftime(form)}
    environment.filters["tojson"] = _to_json
    return environment
