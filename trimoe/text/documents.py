"""What a text is made of: plain documents and conversations, and where one begins in a row of tokens."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from trimoe.errors import UserError, first_line, stop_if_told

START = 1 << 40  # added to a token's id where a document begins whose tokens must not see those before it
ROLES = {"human": "user", "gpt": "assistant", "function_call": "assistant", "observation": "tool", "function_response": "tool"}
LISTS = ("messages", "conversations", "conversation")
ASKED = {  # a question's field: the fields that its answer may have
    "instruction": ("output", "response"),
    "prompt": ("completion", "response", "chosen"),
}
KNOWN = "text, messages, conversations, instruction with output, prompt with completion or chosen"


@dataclass(frozen=True)
class Conversation:
    """Messages as a chat template takes them, with everything that a row says of each (reasoning, tool calls)."""

    messages: tuple[Mapping[str, Any], ...]
    tools: tuple[Any, ...] = ()

    def __len__(self) -> int:
        """Characters of the messages."""
        return sum(len(_words(message)) for message in self.messages)

    def plain(self) -> str:
        """The messages' texts, an empty line between, without who says them."""
        return "\n\n".join(words for message in self.messages if (words := _words(message)))

    def rendered(self, tokenizer: Any) -> str:
        """The text that the tokenizer's chat template makes of it; the plain one where it has no template."""
        if not getattr(tokenizer, "chat_template", None):
            return self.plain()
        try:
            made = tokenizer.apply_chat_template([dict(one) for one in self.messages], tools=list(self.tools) or None, tokenize=False)
        except Exception as error:  # templates raise what they like
            stop_if_told(error)
            shown = ", ".join(str(message.get("role")) for message in self.messages[:6])
            raise UserError(
                f"The tokenizer's chat template does not take a conversation of {shown} ({first_line(error)}); leave such rows out, or "
                "give their text in a field text."
            ) from None
        return str(made)


Document = str | Conversation


def _words(message: Mapping[str, Any]) -> str:
    """What a message says: its content, of several parts those that are text."""
    content = message.get("content")
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else []
    return "\n".join(str(part["text"]) for part in parts if isinstance(part, dict) and isinstance(part.get("text"), str))


# ---- one row


def document(row: Any, column: str | None, where: str) -> Document:
    """The document that a row of a file or a data set holds: of the field `column`, else of those that are known. Raises UserError, which
    begins with `where`, for a row without."""
    if not isinstance(row, Mapping):
        raise UserError(f'{where} is not a JSON object with a "text" field that holds text.')
    given = {str(name): value for name, value in row.items() if value is not None}
    if column is not None:
        if column not in row:
            raise UserError(f"{where} has no field {column!r}; its fields are: {_names(row)}.")
        value = given.get(column)
        found = value if isinstance(value, str) else _conversation(_messages(value), given)
        if found is None:
            raise UserError(f"{where}: its field {column!r} holds neither text nor messages.")
    else:
        found = _known(given)
    if found is None:
        fields = f" (its fields: {_names(row)})" if row else ""
        raise UserError(
            f'{where} is not a JSON object with a "text" field that holds text{fields}; what is read is {KNOWN}, or a field by its name '
            "after a #, as in FILE.jsonl#content."
        )
    _check(found, where)
    return found


def _names(row: Mapping[Any, Any]) -> str:
    """The names of a row's fields in one line, whatever they hold."""
    return ", ".join(" ".join(str(name).split()) for name in row)


def _known(given: Mapping[str, Any]) -> Document | None:
    if isinstance(given.get("text"), str):
        return str(given["text"])
    for name in LISTS:
        if name in given and (messages := _messages(given[name])):
            return _conversation(messages, given)
    for name, answers in ASKED.items():
        answer = next((given[one] for one in answers if one in given), None)
        if name in given and answer is not None:
            return _answered(given, given[name], answer, name)
    if (chosen := given.get("chosen")) is not None:  # a preferred conversation that holds its question, too
        return chosen if isinstance(chosen, str) else _conversation(_messages(chosen), given)
    return None


def _answered(given: Mapping[str, Any], asked: Any, answer: Any, name: str) -> Document | None:
    """A question and its answer: instructions are a conversation, prompts of plain text go on as they are."""
    if isinstance(asked, str) and isinstance(answer, str):
        if name == "prompt":
            return asked + answer
        more = next((given[one] for one in ("input", "context") if isinstance(given.get(one), str) and given[one].strip()), None)
        question = asked if more is None else f"{asked}\n\n{more}"
        return _conversation([{"role": "user", "content": question}, {"role": "assistant", "content": answer}], given)
    first = [{"role": "user", "content": asked}] if isinstance(asked, str) else _messages(asked)
    then = [{"role": "assistant", "content": answer}] if isinstance(answer, str) else _messages(answer)
    if first is None or then is None:
        return None
    said = [(message["role"], message.get("content")) for message in first]
    whole = [(message["role"], message.get("content")) for message in then[: len(first)]] == said
    return _conversation(then if whole else first + then, given)


def _messages(value: Any) -> list[dict[str, Any]] | None:
    """Messages with role and content, of those or of `from` and `value`; None for anything else."""
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        return None
    made = []
    for entry in value:
        if not isinstance(entry, Mapping):
            return None
        message = {str(name): part for name, part in entry.items() if part is not None}  # what columns fill up with nothing
        if isinstance(message.get("from"), str) and isinstance(message.get("value"), str):
            who, words = message.pop("from"), message.pop("value")
            message = {"role": ROLES.get(who, who), "content": words} | message
        role, content = message.get("role"), message.get("content", "")
        if not isinstance(role, str) or not isinstance(content, str | list):
            return None
        made.append({**message, "content": content})
    return made


def _conversation(messages: list[dict[str, Any]] | None, given: Mapping[str, Any]) -> Conversation | None:
    """With the row's system prompt and tools."""
    if messages is None:
        return None
    system, tools = given.get("system"), given.get("tools")
    if isinstance(system, str) and system.strip() and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system}, *messages]
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError):
            tools = None
    return Conversation(tuple(messages), tuple(tools) if isinstance(tools, list) else ())


def _check(found: Document, where: str) -> None:
    """Half a surrogate pair is no text."""
    try:
        (found if isinstance(found, str) else found.plain()).encode()
    except UnicodeEncodeError:
        raise UserError(f'{where} is not a JSON object with a "text" field that holds text: it has half a surrogate pair.') from None


# ---- rows of tokens


def unmarked(ids_BL: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Token ids without the marks of documents that begin, and each token's position in its document, int64 [B, L]; None for the positions
    where no document is kept apart from those before it."""
    starts_BL = ids_BL >= START
    if not bool(starts_BL.any()):
        return ids_BL, None
    place_L = torch.arange(ids_BL.shape[1], device=ids_BL.device)
    first_BL = torch.where(starts_BL, place_L, torch.zeros_like(place_L)).cummax(1)[0]
    return ids_BL % START, place_L - first_BL
