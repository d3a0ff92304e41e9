"""Chat templates: found where a tokenizer folder keeps them, rendered as transformers renders them."""

import json
from pathlib import Path

import pytest

from baatt.lab.chat import load_chat_templates

# The shape of LLaDA-8B-Instruct's template: Llama 3's headers and end of turn.
LLADA = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    "+ message['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
QUESTION = [{"role": "user", "content": " What is it? "}]
PREFIX = [*QUESTION, {"role": "assistant", "content": "The answer is"}]
ASKED = "<|startoftext|><|start_header_id|>user<|end_header_id|>\n\nWhat is it?<|eot_id|>"
HEADER = "<|start_header_id|>assistant<|end_header_id|>\n\n"


def write(folder: Path, **values: object) -> Path:
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<|startoftext|>", **values}))
    return folder


def test_llada_s_template(tmp_path):
    chat = load_chat_templates(write(tmp_path, chat_template=LLADA))
    assert chat.source() == LLADA
    assert chat.render(QUESTION) == ASKED + HEADER
    assert chat.render(PREFIX, continue_final_message=True) == ASKED + HEADER + "The answer is"


@pytest.mark.parametrize("prefix", ["Answer:", " Answer: ", "two\nlines ", "{{ no }} template", "What is it?"])
def test_a_prefix_is_kept_as_it_is(tmp_path, prefix):
    """Whitespace at its end too: it belongs to the answer; the template trims its beginning."""
    chat = load_chat_templates(write(tmp_path, chat_template=LLADA))
    messages = [*QUESTION, {"role": "assistant", "content": prefix}]
    assert chat.render(messages, continue_final_message=True) == ASKED + HEADER + prefix.lstrip()
    assert messages[-1]["content"] == prefix


def test_it_is_what_transformers_renders(tmp_path):
    transformers = pytest.importorskip("transformers")
    from baatt.assets import shipped_model

    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(Path(shipped_model()) / "tokenizer.json"), chat_template=LLADA, bos_token="<|startoftext|>"
    )
    chat = load_chat_templates(write(tmp_path, chat_template=LLADA))
    for messages, prompt in ((QUESTION, True), (PREFIX, False)):
        rendered = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=prompt, continue_final_message=not prompt
        )
        assert chat.render(messages, continue_final_message=not prompt) == rendered


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
        "{% for m in messages %}\n  {%- generation -%}\n {{ m.content }} {% endgeneration +%}\n{% endfor %}",
        "{% set x = 1 %}{% generation %}{% set x = 2 %}{{ x }}{{ messages[0].content }}{% endgeneration %}{{ x }}",
        "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m.content }}{% endfor %}",
        "{% if tools is not none or documents is not none %}tools{% endif %}{{ messages[0].content }}",
        "{{ strftime_now('%Y') }}{{ messages[0].content }}",
        "{{ messages | tojson }}{{ messages | tojson(indent=1) }}{{ {'b': '<\u00e9>', 'a': 1} | tojson }}",
        "{{ {'b': '<\u00e9>', 'a': 1} | tojson(true, separators=(',', ':'), sort_keys=true) }}",
        "{{ {'b': 2, 'a': 1} | tojson(false, 2) }}{{ {'b': 2} | tojson(false, none, (',', ':'), true) }}",
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
        "{{ dict(a=1, b=messages[0].role) }}{{ messages[0].content.strip().split(' ')[-1] }}{{ bos_token }}",
        "  {% if true %}\n{{ messages[0].content }}\r\n  {% endif %}\n tail\n",
    ],
)
def test_what_templates_may_use(tmp_path, template):
    """The tags, functions and filters that transformers adds to Jinja, and no more."""
    transformers = pytest.importorskip("transformers")
    from baatt.assets import shipped_model

    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(Path(shipped_model()) / "tokenizer.json"),
        chat_template=template,
        bos_token="<|startoftext|>",
    )
    chat = load_chat_templates(write(tmp_path, chat_template=template))
    for messages in (QUESTION, PREFIX):
        expected = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert chat.render(messages) == expected


def test_where_templates_are_stored(tmp_path):
    named = [{"name": "default", "template": "A"}, {"name": "rag", "template": "B"}]
    chat = load_chat_templates(write(tmp_path, chat_template=named, eos_token={"content": "<end>"}, pad_token=None))
    assert (chat.source(), chat.source("rag")) == ("A", "B")
    assert chat.special_tokens == {"bos_token": "<|startoftext|>", "eos_token": "<end>"}
    (tmp_path / "chat_template.jinja").write_text("C")
    assert load_chat_templates(tmp_path).source() == "C"


def test_no_template(tmp_path):
    chat = load_chat_templates(tmp_path)
    with pytest.raises(ValueError, match="must have a chat template"):
        chat.render(QUESTION)


def test_refused(tmp_path):
    chat = load_chat_templates(write(tmp_path, chat_template="{{ raise_exception('roles must alternate') }}"))
    with pytest.raises(ValueError, match="refuses the messages: roles must alternate"):
        chat.render(QUESTION)
    inside = "{% for m in messages %}{% generation %}{% continue %}{% endgeneration %}{% endfor %}"
    for broken in ("{{ 1 / 0 }}", "{{ messages + 1 }}", "{% generation %}", "{% other %}", inside):
        with pytest.raises(ValueError, match="refuses the messages: "):
            load_chat_templates(write(tmp_path, chat_template=broken)).render(QUESTION)
    with pytest.raises(ValueError, match="messages must not be empty"):
        chat.render([])
    with pytest.raises(ValueError, match=r"must be one of \['default'\], got 'rag'"):
        chat.render(QUESTION, name="rag")
    with pytest.raises(ValueError, match="must keep the last message"):
        load_chat_templates(write(tmp_path, chat_template="nothing")).render(PREFIX, continue_final_message=True)
    with pytest.raises(ValueError, match="chat_template must be a text or a list"):
        load_chat_templates(write(tmp_path, chat_template=3))
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json: must hold JSON"):
        load_chat_templates(tmp_path)


def test_a_template_cannot_leave_its_sandbox(tmp_path):
    escape = "{{ messages.__class__.__mro__[1].__subclasses__() }}"
    with pytest.raises(ValueError, match=r"refuses the messages: .*unsafe"):
        load_chat_templates(write(tmp_path, chat_template=escape)).render(QUESTION)
