"""Chat templates: what they see, what stops them, and that the next render works."""

from __future__ import annotations

import time
from dataclasses import dataclass
from datetime import datetime
from types import MappingProxyType

import pytest

from hybrid_runtime.errors import TemplateError
from hybrid_runtime.text.chat import Message, render_chat

HELLO = [Message("user", "hello")]


def render(template, messages=HELLO, **settings):
    return render_chat(template, messages, bos_token="<s>", eos_token="</s>", **settings)


def test_a_template_sees_messages_tokens_flags_tools_and_variables():
    template = (
        "{{ bos_token }}{% for m in messages %}{{ m.role }}:{{ m['content'] }}{{ eos_token }}{% endfor %}"
        "{{ add_generation_prompt }} {{ tools }} {{ thinking }}"
    )
    messages = [Message("system", "be brief"), {"role": "user", "content": "hi"}]
    assert render(template, messages, thinking="on") == "<s>system:be brief</s>user:hi</s>True None on"
    tools = [MappingProxyType({"name": "add"})]
    assert render("{{ tools[0].name }} {{ add_generation_prompt }}", tools=tools, add_generation_prompt=False) == (
        "add False"
    )


def test_mappings_pass_further_fields_on():
    messages = [MappingProxyType({"role": "assistant", "tool_calls": ({"function": {"name": "add"}},)})]
    template = "{{ messages[0].tool_calls[0].function.name }}{{ messages[0].content is defined }}"
    assert render(template, messages) == "addFalse"


def test_blocks_are_trimmed_as_published_templates_expect():
    template = "{% if true %}\n  a\n    {% if true %}\n  b\n    {% endif %}\n{% endif %}\nc"
    assert render(template) == "  a\n  b\nc"


def test_tojson_writes_what_models_were_trained_on():
    messages = [{"role": "user", "content": "<a href='x'>é & 日</a>"}]
    assert render("{{ messages[0].content | tojson }}", messages) == "\"<a href='x'>é & 日</a>\""
    assert render("{{ {'b': 1, 'a': [1, 2]} | tojson }}") == '{"b": 1, "a": [1, 2]}'
    assert render("{{ {'b': 1, 'a': 2} | tojson(indent=2, sort_keys=true) }}") == '{\n  "a": 2,\n  "b": 1\n}'


def test_safe_leaves_the_text_around_it_alone():
    messages = [{"role": "assistant", "arguments": {"a": "<b>"}}]
    assert render("""{{ '"x": ' + messages[0].arguments|tojson|safe + '"' }}""", messages) == '"x": {"a": "<b>"}"'


def test_break_continue_and_generation_blocks_are_known():
    skip, stop = "{% if i == 1 %}{% continue %}{% endif %}", "{% if i == 4 %}{% break %}{% endif %}"
    template = "{% for i in range(9) %}" + skip + stop + "{{ i }}{% endfor %}"
    assert render(template) == "023"
    assert render("{% generation %}a{{ eos_token }}{% endgeneration %}b") == "a</s>b"


def test_strftime_now_is_the_local_date():
    before, found, after = datetime.now(), render("{{ strftime_now('%Y-%m-%d') }}"), datetime.now()  # noqa: DTZ005
    assert found in {f"{before:%Y-%m-%d}", f"{after:%Y-%m-%d}"}


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("a\n{% if %}", "line 2: syntax error: Expected an expression"),
        ("{{ unclosed", "line 1: syntax error"),
        ("{% for x in [1] %}" * 40 + "{% endfor %}" * 40, "too many statically nested blocks"),
        ("{{ raise_exception('roles must\nalternate') }}", "failed: roles must alternate"),
        ("{{ raise_exception(7) }}", "failed: 7"),
        ("{{ absent.field.name }}", "'absent' is undefined"),
        ("{{ messages[0].content + 1 }}", "TypeError: can only concatenate str"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ 'x'|no_such_filter }}", "No filter named 'no_such_filter'"),
        ("{{ '%d' % 'x' }}", "TypeError"),
        ("{{ raise_exception('x' * 10**6) }}", " ..."),
    ],
    ids=["if", "open", "nested", "raised", "number", "undefined", "type", "zero", "filter", "format", "long"],
)
def test_a_failing_template_gives_one_clear_line(template, message):
    with pytest.raises(TemplateError, match="the chat template failed: ") as caught:
        render(template)
    line = str(caught.value)
    assert message in line
    assert "\n" not in line
    assert len(line) < 500


SANDBOX, RANGE, MEMORY, LONG = (
    "the sandbox forbids",
    "Range too big",
    "more memory than",
    "longer than the limit of 4 MiB",
)
TIME = "ran longer than its time limit of 0.4 s and was stopped"
MALICIOUS = {
    "attribute-walk": ("{{ ''.__class__.__mro__[1].__subclasses__() }}", SANDBOX),
    "globals-of-cycler": ("{{ cycler.__init__.__globals__.os.popen('id').read() }}", SANDBOX),
    "globals-of-template": ("{{ self.__init__.__globals__ }}", SANDBOX),
    "format-string": ("{{ '{0.append.__self__.__class__.__init__.__globals__}'.format(messages) }}", SANDBOX),
    "format-map": ("{{ '{a.__class__.__mro__}'.format_map({'a': 1}) }}", SANDBOX),
    "filter-attr": ("{{ (messages|attr('__class__')).__base__ }}", SANDBOX),
    "mutation": ("{{ messages.append(1) }}", SANDBOX),
    "namespace-dunder": ("{{ namespace(__init__=1) }}", SANDBOX),
    "code-object": ("{{ raise_exception.__code__.co_consts }}", SANDBOX),
    "import": ("{% import 'os' as os %}{{ os.system('id') }}", "no loader"),
    "include-file": ("{% include '/etc/passwd' %}", "no loader"),
    "big-range": ("{{ range(10**9)|list }}", RANGE),
    "nested-loops": ("{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}", TIME),
    "loops-that-write": ("{% for i in range(100000) %}{{ 'a' * 1000 }}{% endfor %}", LONG),
    "string-product": ("{{ 'x' * 10**9 }}", MEMORY),
    "string-product-5MB": ("{{ 'x' * (5 * 10**6) }}", LONG),
    "width": ("{{ '{:>1000000000}'.format('a') }}", MEMORY),
    "percent-width": ("{{ '%1000000000d' % 1 }}", MEMORY),
    "power": ("{{ 10 ** (10 ** 8) }}", TIME),
    "replace": ("{{ ('a' * 100000)|replace('a', 'b' * 100000) }}", MEMORY),
    "recursion": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "calls itself without an end"),
    "parentheses": ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "calls itself without an end"),
    "lorem-ipsum": ("{{ lipsum(n=100000) }}", TIME),
}


@pytest.mark.parametrize(("template", "message"), MALICIOUS.values(), ids=MALICIOUS.keys())
def test_a_malicious_template_is_stopped_and_the_next_render_works(template, message):
    render("")  # the worker stands ready, so that only the render is timed
    start = time.monotonic()
    with pytest.raises(TemplateError) as caught:
        render(template, time_limit_s=0.4)
    assert time.monotonic() - start < 0.4 + 1.0  # the limit, and room for a busy machine to kill and reap
    assert message in str(caught.value)
    assert render("{{ messages[0].content }}") == "hello"


def test_the_default_limit_is_one_second():
    render("")
    start = time.monotonic()
    with pytest.raises(TemplateError, match="time limit of 1 s"):
        render(MALICIOUS["nested-loops"][0])
    assert 1.0 <= time.monotonic() - start < 2.0


def test_output_up_to_four_mebibytes_is_kept():
    assert len(render("{{ 'x' * 4194304 }}")) == 4 << 20
    with pytest.raises(TemplateError, match=LONG):
        render("{{ 'x' * 4194305 }}")
    with pytest.raises(TemplateError, match=LONG):
        render("{{ 'é' * 2097153 }}")  # bytes count, not characters


@pytest.mark.parametrize("character", ["x", "é", "\ud800"], ids=["ascii", "two-bytes", "surrogate"])
def test_a_prompt_of_a_million_characters_is_rendered_quickly(character):
    content = character * 1_000_000
    render("")
    start = time.monotonic()
    assert render("{{ messages[0].content }}", [Message("user", content)]) == content
    assert time.monotonic() - start < 2.0


def test_too_large_a_job_is_refused():
    with pytest.raises(TemplateError, match="bytes as JSON; the limit for a chat template is 67108864 bytes"):
        render("", [Message("user", "x" * (64 << 20))])


def test_empty_template_and_empty_conversation_render_to_nothing():
    assert render("") == ""
    assert render("{% for m in messages %}{{ m.content }}{% endfor %}", []) == ""


@dataclass(frozen=True)
class Tool:
    name: str


class Opaque:
    """Something that is no data."""


@pytest.mark.parametrize(
    "variables",
    [{"tools": [Opaque()]}, {"documents": {1j}}, {"key": {(1, 2): 3}}],
    ids=["object", "set", "tuple-key"],
)
def test_what_is_no_data_is_refused(variables):
    with pytest.raises(TemplateError, match="cannot be given to a chat template: "):
        render("", **variables)


def test_dataclasses_travel_as_mappings():
    assert render("{{ tools[0].name }}", tools=[Tool("add")]) == "add"


def test_a_conversation_that_refers_to_itself_is_refused():
    message = {"role": "user"}
    message["self"] = message
    with pytest.raises(TemplateError, match="cannot be given to a chat template: Circular reference"):
        render("", [message])


@pytest.mark.parametrize("message", ["hello", {"content": "x"}, {"role": 7}], ids=["text", "no-role", "role-number"])
def test_a_message_needs_a_role(message):
    with pytest.raises(TemplateError, match=r"messages\[1\]: found"):
        render("", [*HELLO, message])


@pytest.mark.parametrize("limit", [0, -1, float("nan")])
def test_a_time_limit_is_a_number_above_zero(limit):
    with pytest.raises(TemplateError, match="time_limit_s is"):
        render("", time_limit_s=limit)
