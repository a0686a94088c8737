"""Published chat templates: Mistral's against the published prompts, all against transformers' own rendering."""

from __future__ import annotations

import html
import importlib
import json

import pytest
from real.data import shared_data

from hybrid_runtime.errors import TemplateError
from hybrid_runtime.text.chat import Message, render_chat
from hybrid_runtime.text.load import load_tokenizer_file

MISTRAL = ("v1", "v1_spm", "v2_spm", "v3", "v3_spm", "v7", "v7_spm")
LLAMACPP = (
    "Qwen-Qwen2.5-7B-Instruct",
    "NousResearch-Hermes-2-Pro-Llama-3-8B-tool_use",
    "Mistral-Small-3.2-24B-Instruct-2506",
)
TURNS = [
    Message("system", "Answer briefly."),
    Message("user", "Who are you?"),
    Message("assistant", "A model."),
    Message("user", "Really <b>?</b> Is that 'all' & everything?"),
    Message("assistant", "Yes."),
    Message("user", "Grüße 日本 🦙"),
]
TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds <two> numbers & returns 'them'",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "number", "description": "é"}},
            "required": ["a"],
        },
    },
}


def template(relative):
    return shared_data(f"chat_templates/{relative}.jinja").read_text(encoding="utf-8")


def sample(name):
    return json.loads(shared_data(f"tokenizers/mistral/samples/{name}/sample.json").read_text())


def published(name, version):
    """The published prompt; it shows spaces and line ends as the pieces do."""
    text = shared_data(f"tokenizers/mistral/samples/{name}/text_{version}.txt").read_text()
    return text.replace("▁", " ").replace("<0x0A>", "\n")


def rendered(name, template_name, conversation):
    return render_chat(
        template(f"mistral-common/{template_name}"),
        conversation["messages"],
        bos_token="<s>",
        eos_token="</s>",
        tools=conversation["tools"] or None,
    )


def with_arguments_as_objects(conversation):
    """Tool calls whose arguments are JSON values: templates write those, but copy strings as they are."""
    content = json.loads(json.dumps(conversation))
    for message in content["messages"]:
        for call in message.get("tool_calls") or []:
            call["function"]["arguments"] = json.loads(call["function"]["arguments"])
    return content


def replaced_once(text, old, new):
    assert text.count(old) == 1
    return text.replace(old, new)


@pytest.mark.parametrize(
    ("name", "template_name", "version"),
    [
        ("no_tools", "v1_spm", "v1"),
        ("no_tools", "v2_spm", "v2"),
        ("no_tools", "v3_spm", "v3"),
        ("no_tools", "v7_spm", "v3"),  # without tools and system messages, version 7 writes what version 3 does
        ("parallel_calls", "v3_spm", "v3"),
    ],
)
def test_mistral_templates_write_the_published_prompts(name, template_name, version):
    assert rendered(name, template_name, sample(name)) == published(name, version)


def weather_result():
    """The sample's second tool result: JSON in a string."""
    return sample("get_weather_full")["messages"][-1]["content"]


@pytest.mark.parametrize(("template_name", "version"), [("v2_spm", "v2"), ("v3_spm", "v3")])
def test_the_weather_sample_differs_only_in_how_a_tool_result_is_quoted(template_name, version):
    """mistral-common parses a JSON tool result and writes it as JSON; the template passes on the string it is."""
    as_json, as_string = json.dumps(json.loads(weather_result())), json.dumps(weather_result())
    expected = replaced_once(published("get_weather_full", version), as_json, as_string)
    conversation = with_arguments_as_objects(sample("get_weather_full"))
    found = rendered("get_weather_full", template_name, conversation)
    assert found == expected
    # transformers 5.23 writes &#34; for quotes beside `tojson|safe`; apart from that it renders the same
    text, names = template(f"mistral-common/{template_name}"), {"bos_token": "<s>", "eos_token": "</s>"}
    assert html.unescape(by_transformers(text, conversation["messages"], tools=conversation["tools"], **names)) == found


def test_the_parallel_sample_of_v2_differs_only_in_how_results_are_grouped():
    """mistral-common writes the results of parallel calls as one list; the template writes a list for each."""
    expected = replaced_once(
        published("parallel_calls", "v2"),
        '"Email sent to finance1@company.com"}, {"name"',
        '"Email sent to finance1@company.com"}][/TOOL_RESULTS][TOOL_RESULTS] [{"name"',
    )
    assert rendered("parallel_calls", "v2_spm", sample("parallel_calls")) == expected


@pytest.mark.parametrize(
    ("name", "template_name", "version", "file"),
    [
        ("no_tools", "v1_spm", "v1", "tokenizer.model.v1"),
        ("no_tools", "v3_spm", "v3", "mistral_instruct_tokenizer_240323.model.v3"),
        ("parallel_calls", "v3_spm", "v3", "hf-Mistral-7B-v0.3/tokenizer.json"),
    ],
)
def test_a_rendered_conversation_gives_the_published_ids(name, template_name, version, file):
    tokenizer = load_tokenizer_file(shared_data(f"tokenizers/mistral/{file}"))
    prompt = rendered(name, template_name, sample(name))
    expected = json.loads(shared_data(f"tokenizers/mistral/samples/{name}/tokens_{version}.json").read_text())["tokens"]
    assert tokenizer.encode(prompt, add_special=False, parse_special=True) == expected


@pytest.mark.parametrize("template_name", ["v1", "v1_spm"])
def test_a_template_that_knows_no_tools_says_so(template_name):
    with pytest.raises(TemplateError, match="failed: Unexpected role 'tool' after role 'assistant'"):
        rendered("parallel_calls", template_name, sample("parallel_calls"))


def by_transformers(text, messages, **settings):
    """transformers' rendering, with the names that its tokenizers pass."""
    utils = importlib.import_module("transformers.utils.chat_template_utils")
    (prompt,), _ = utils.render_jinja_template([messages], chat_template=text, **settings)
    return prompt


@pytest.mark.parametrize(
    ("name", "template_name"),
    [("no_tools", name) for name in MISTRAL]  # version 1 knows no tools
    + [(name, later) for name in ("get_weather_full", "parallel_calls") for later in MISTRAL[2:]],
)
def test_mistral_templates_render_as_transformers_does(name, template_name):
    conversation = sample(name)
    expected = by_transformers(
        template(f"mistral-common/{template_name}"),
        conversation["messages"],
        tools=conversation["tools"] or None,
        add_generation_prompt=True,
        bos_token="<s>",
        eos_token="</s>",
    )
    assert rendered(name, template_name, conversation) == expected


@pytest.mark.parametrize("add_generation_prompt", [True, False], ids=["prompt", "no-prompt"])
@pytest.mark.parametrize(
    ("name", "tools"), [(LLAMACPP[0], None), (LLAMACPP[2], None), *((name, [TOOL]) for name in LLAMACPP)]
)
def test_llamacpp_templates_render_as_transformers_does(name, add_generation_prompt, tools):
    text = template(f"llamacpp/{name}")
    settings = {"tools": tools, "add_generation_prompt": add_generation_prompt, "bos_token": "<s>", "eos_token": "</s>"}
    found = render_chat(text, TURNS, **settings)
    assert found == by_transformers(text, [{"role": m.role, "content": m.content} for m in TURNS], **settings)
    assert all(found.count(message.content) == 1 for message in TURNS)
    assert (TOOL["function"]["description"] in found) == (tools is not None)


def test_hermes_needs_tools_here_as_in_transformers():
    text = template(f"llamacpp/{LLAMACPP[1]}")
    with pytest.raises(TemplateError, match="TypeError: 'NoneType' object is not iterable"):
        render_chat(text, TURNS, bos_token="<s>", eos_token="</s>")
    with pytest.raises(TypeError, match="'NoneType' object is not iterable"):
        by_transformers(text, [{"role": "user", "content": "hi"}], bos_token="<s>", eos_token="</s>")


def test_qwen_writes_chatml():
    expected = "".join(f"<|im_start|>{turn.role}\n{turn.content}<|im_end|>\n" for turn in TURNS)
    found = render_chat(template(f"llamacpp/{LLAMACPP[0]}"), TURNS, bos_token="", eos_token="<|im_end|>")
    assert found == f"{expected}<|im_start|>assistant\n"


def test_mistral_small_writes_its_control_tokens_around_each_turn():
    found = render_chat(template(f"llamacpp/{LLAMACPP[2]}"), TURNS, bos_token="<s>", eos_token="</s>")
    system, *others = [turn.content for turn in TURNS]
    turns = "".join(f"[INST]{text}[/INST]" if idx % 2 == 0 else f"{text}</s>" for idx, text in enumerate(others))
    assert found == f"<s>[SYSTEM_PROMPT]{system}[/SYSTEM_PROMPT]{turns}"
