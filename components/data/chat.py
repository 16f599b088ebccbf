"""Chats to text by a checkpoint's own template, in pieces: what the model is given, and what it is to say.

The text is what transformers' ``apply_chat_template`` renders (jinja2, in the same sandbox), with one exception:
``strftime_now`` is not offered, so that a template which writes today's date when it can (Llama 3.2) writes its fixed one, and
a run's data do not change overnight.
"""

import json
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment


class Turn(NamedTuple):
    """What the model is given, from the end of the turn before, and what it is to say."""

    prompt: str
    reply: str


class ChatTemplate:
    """A checkpoint's ``chat_template``.

    Args:
        source: jinja2.
        variables: what the template may name, such as ``bos_token``; its ``eos_token`` ends replies that the template
            leaves without an end.
        special_tokens: texts of all special tokens; the first one behind a reply is the end of its turn.

    Raises:
        ValueError: ``source`` is not a template.
    """

    def __init__(self, source: str, *, variables: Mapping[str, Any], special_tokens: Collection[str]) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise ValueError(f"the chat template cannot be read ({error}); correct it") from error
        self._variables = dict(variables)
        longest_first = sorted(special_tokens, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

    def render(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = False) -> str:
        """The text of a chat; ``add_generation_prompt`` ends it where the assistant is to speak.

        Raises:
            ValueError: the template refuses the chat.
        """
        try:
            return self._template.render(
                messages=messages,
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._variables,
            )
        except (jinja2.TemplateError, TypeError) as error:
            raise ValueError(f"the chat template refuses this chat ({error}); correct its messages") from error

    def turns(self, messages: list[dict[str, Any]], *, learn_from: Literal["last", "all"] = "last") -> list[Turn]:
        """A chat that ends with the assistant, cut into prompts and replies.

        The prompts and replies up to a prompt's end are together what its reply is generated from,
        ``render(messages[:i], add_generation_prompt=True)``. A reply ends with its turn's end token; what the template writes
        behind that belongs to the next prompt, or is left out.

        Args:
            messages: dicts with ``role`` and ``content``, both text.
            learn_from: the ``"last"`` reply (all before it is prompt), or ``"all"`` of them.

        Raises:
            ValueError: the chat is no such list, or the template does not render a reply behind its prompt.
        """
        replies = _assistant_messages(messages)
        turns: list[Turn] = []
        done = ""
        for number in replies if learn_from == "all" else replies[-1:]:
            prompt = self.render(messages[:number], add_generation_prompt=True)
            whole = self.render(messages[: number + 1])
            if not prompt.startswith(done):
                raise ValueError(
                    f"the chat template rewrites what was said before message {number}; set learn_from: last"
                )
            if not whole.startswith(prompt):
                raise ValueError(
                    f"the chat template does not put message {number} behind its own prompt for it; use another template"
                )
            reply = self._through_its_end(
                whole[len(prompt) :], messages[number]["content"].strip(), last=number == replies[-1]
            )
            turns.append(Turn(prompt=prompt[len(done) :], reply=reply))
            done = prompt + reply
        return turns

    def _through_its_end(self, text: str, content: str, *, last: bool) -> str:
        start = text.find(content)
        if start < 0:
            raise ValueError(f"the chat template changes the reply {content[:40]!r}; use another template")
        end = start + len(content)
        if stop := self._special.search(text, end):
            return text[: stop.end()]
        return text[:end] + (self._variables.get("eos_token", "") if last else "")


def _assistant_messages(messages: Any) -> list[int]:
    remedy = 'a chat is a list of {"role": ..., "content": ...}, both text'
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"there are no messages; {remedy}")
    for number, message in enumerate(messages):
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise ValueError(f"message {number} has no role or no text; {remedy}")
    if messages[-1]["role"] != "assistant":
        raise ValueError(f"the last message is the {messages[-1]['role']}'s; a chat ends with what the assistant says")
    return [number for number, message in enumerate(messages) if message["role"] == "assistant"]


class _Generation(Extension):
    """``{% generation %}`` marks what the assistant says for transformers; here it changes nothing."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _to_json(value: Any, **options: Any) -> str:
    return json.dumps(value, **{"ensure_ascii": False, **options})  # jinja2's own filter escapes HTML


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)
