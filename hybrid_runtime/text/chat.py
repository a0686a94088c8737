"""Renders a chat template: messages in, the prompt's text out.

Templates come with models, from anyone, so they are untrusted programs. A sandbox stops them from reaching Python but
not from running for ever, so they run in a separate process that can be killed: see `render_worker`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from functools import cache

from hybrid_runtime.errors import TemplateError
from hybrid_runtime.text.render_worker import RenderWorker


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: str
    content: str


def render_chat(
    template: str,
    messages: Sequence[Message | Mapping[str, object]],
    *,
    bos_token: str,
    eos_token: str,
    add_generation_prompt: bool = True,
    tools: Sequence[Mapping[str, object]] | None = None,
    time_limit_s: float = 1.0,
    **variables: object,
) -> str:
    """The prompt that `template` makes of `messages`; `variables` are passed on to the template as they are.

    A message is a `Message`, or a mapping where it needs more fields (tool_calls, tool_call_id, name). The text already
    holds the template's control tokens, BOS included: encode it with `add_special=False, parse_special=True`.
    """
    if not time_limit_s > 0:
        raise TemplateError(f"time_limit_s is {time_limit_s}; expected a number of seconds above 0")
    names = {
        **variables,
        "messages": [_message(message, idx) for idx, message in enumerate(messages)],
        "tools": None if tools is None else list(tools),
        "bos_token": bos_token,
        "eos_token": eos_token,
        "add_generation_prompt": add_generation_prompt,
    }
    job = _as_json({"template": template, "variables": names, "time_limit_s": time_limit_s})
    return _shared_worker().render(job, time_limit_s=time_limit_s)


@cache
def _shared_worker() -> RenderWorker:
    """One worker for the process, made at the first render: starting Python takes longer than most renders."""
    return RenderWorker()


def _message(message: Message | Mapping[str, object], idx: int) -> Mapping[str, object]:
    if isinstance(message, Message):
        return {"role": message.role, "content": message.content}
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise TemplateError(f"messages[{idx}]: found {message!r:.200}; expected a Message or a mapping with a role")
    return message


def _as_json(job: Mapping[str, object]) -> bytes:
    """The job as data: whatever is not data, a template has no business with."""
    try:
        return json.dumps(job, default=_plain).encode()  # ASCII, so that lone surrogates travel too
    except (TypeError, ValueError, RecursionError) as error:
        raise TemplateError(
            f"messages, tools or variables cannot be given to a chat template: {error}; "
            "use strings, numbers, lists and mappings with string keys"
        ) from error


def _plain(value: object) -> object:
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, Sequence):
        return list(value)
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    raise TypeError(f"{type(value).__name__} is not data")
