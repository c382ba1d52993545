"""What the columns of a row say together: its messages from wherever they stand, and what goes with them.

    messages (also conversations, conversation), or a question column with an answer column and an earlier history
    + system prompt in front    + tools or functions    + chat_template_kwargs, enable_thinking

Two columns that say the same are one; two that contradict each other make the row bad, by their names. What no rule
reads is named (``unused.py``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torchspec.data.messages import RowError, as_json, content_of, read_message, role_of, says, unfolded, words_of

MESSAGE_KEYS = ("conversations", "messages", "conversation")
SYSTEM_KEYS = ("system", "system_prompt", "system_message", "system_instruction")
QUESTION_KEYS = ("prompt", "instruction", "query", "question", "input")
"""Columns that ask: text, or messages (TRL); ``input`` beside ``instruction`` goes on with it (Alpaca)."""
ANSWER_KEYS = ("completion", "response", "output", "answer")
SWITCHES: dict[str, type] = {"enable_thinking": bool, "thinking": bool, "reasoning_effort": str}
"""Columns that are variables of chat templates, where they hold this type (as requests to a server have them)."""
TEMPLATE_KEYS = ("chat_template_kwargs", *SWITCHES)
TOOL_KEYS = ("tools", "functions")
_OURS = frozenset(
    "messages conversation conversations tools tokenize chat_template add_generation_prompt continue_final_message return_dict return_tensors "
    "return_assistant_tokens_mask padding truncation max_length tokenizer_kwargs".split()
)
"""Arguments of ``apply_chat_template`` that are no variables of a template."""


@dataclass(frozen=True)
class Turns:
    """Messages as a row gives them."""

    key: str
    """The column, as reports name it."""
    given: list[Any]
    columns: frozenset[str]
    """All columns that they come from."""


def find_turns(row: dict[str, Any], *, messages_key: str | None, need_answer: bool) -> Turns | None:
    """The row's messages, its system prompt among them; None where no column has any.

    Args:
        messages_key: the column that the user named: messages, or an answer beside a question column.
        need_answer: False also takes questions alone.

    Raises:
        RowError: columns that contradict each other, or hold something else.
    """
    there = [key for key in ((messages_key,) if messages_key else MESSAGE_KEYS) if row.get(key) is not None]
    if messages_key is None:  # a column of such a name that is no list is another's, where a list is there; a lone conversation may be a name
        full = [key for key in there if _is_list(row[key]) and row[key]]
        there = full or [key for key in there if key != "conversation" and (row[key] or not says(_question(row)))][:1]
    if messages_key and there and _is_answer(row[messages_key]):
        found = _asked(row, messages_key)
    elif there:
        lists = {key: _listed(row[key], key) for key in there}
        found = Turns(there[0], lists[there[0]], frozenset(there))
        for key in there[1:]:
            if _plain(lists[key]) != _plain(found.given):
                raise RowError(f"has {there[0]} and {key}, which differ: name one with data.messages_key")
        found = _answered(row, found)
    else:
        found = None if messages_key else _asked(row, None, need_answer=need_answer)
    return None if found is None else _with_system(row, found)


def _listed(given: Any, key: str) -> list[Any]:
    if isinstance(given, str) and _is_list(given):
        given = as_json(given, key)
    if isinstance(given, dict) and given.keys() & {"role", "from"}:
        given = _turned(given, key)
    if not isinstance(given, list) or not given:
        raise RowError(f"{key} is not a list of messages")
    return list(unfolded([as_json(one, f"{key}[{i}]") if isinstance(one, str) and one.lstrip().startswith("{") else one for i, one in enumerate(given)]))


def _turned(given: dict[str, Any], key: str) -> list[Any]:
    """Messages of an object of lists, as older ``datasets`` keep a list of objects: ``{from: [...], value: [...]}``."""
    lists = {name: value for name, value in given.items() if value is not None}
    if not all(isinstance(value, list) for value in lists.values()) or len({len(value) for value in lists.values()}) > 1:
        raise RowError(f"{key} is an object, not a list of messages, and its values are no lists of one length")
    return [dict(zip(lists, values, strict=True)) for values in zip(*lists.values(), strict=True)]


def _is_list(given: Any) -> bool:
    if isinstance(given, dict):
        return bool(given.keys() & {"role", "from"})
    return isinstance(given, list) or (isinstance(given, str) and given.lstrip().startswith("["))


def _plain(given: list[Any]) -> list[Any]:
    return [read_message(message, i, media="placeholder").message for i, message in enumerate(given)]


def _is_answer(given: Any) -> bool:
    """Whether a column holds no conversation but what answers another column."""
    if isinstance(given, str):
        return not _is_list(given)
    return isinstance(given, list) and bool(given) and isinstance(given[0], dict) and role_of(given[0], 0)[0] == "assistant"


# -- questions and answers in columns of their own


def _asked(row: dict[str, Any], answer_key: str | None, *, need_answer: bool = True) -> Turns | None:
    """Messages from a question column and an answer column; None where the row has not both (of prompts: no question)."""
    questions = {key: row[key] for key in QUESTION_KEYS if key != answer_key and _talks(row.get(key))}
    answers = {key: row[key] for key in (ANSWER_KEYS if answer_key is None else (answer_key,)) if isinstance(row.get(key), str) or _talks(row.get(key))}
    if len(answers) > 1:
        answers = {key: value for key, value in answers.items() if value} or answers
    if not questions or (need_answer and not answers):
        return None
    columns = {*questions, *answers}
    first = next(iter(questions))
    asked = questions.pop(first)
    more = questions.pop("input", None) if first == "instruction" else None
    for kind, others, one in (("questions", questions, asked), ("answers", answers, next(iter(answers.values()), None))):
        if any(other != one for other in others.values()):
            names = [first, *questions] if kind == "questions" else list(answers)
            raise RowError(f"has no messages, and two different {kind} ({', '.join(names)}): name the answer with data.messages_key, or leave one out")
    if more is not None:
        if not isinstance(asked, str) or not isinstance(more, str):
            raise RowError("has an instruction and an input that are not both text")
        asked = f"{asked}\n{more}"
    history = _history(row.get("history"))
    if history:
        columns.add("history")
    turns = [*history, *([{"role": "user", "content": asked}] if isinstance(asked, str) else _listed(asked, first))]
    for key, answer in list(answers.items())[:1]:
        turns += [{"role": "assistant", "content": answer}] if isinstance(answer, str) else _listed(answer, key)
    return Turns(next(iter(answers), first), turns, frozenset(columns))


def _answered(row: dict[str, Any], turns: Turns) -> Turns:
    """With the answer of a column of its own, where the messages are those of a prompt: without any answer, and a question last."""
    roles = [role_of(message, i)[0] for i, message in enumerate(turns.given) if isinstance(message, dict)]
    if "assistant" in roles or roles[-1:] != ["user"]:
        return turns
    answers = {key: row[key] for key in ANSWER_KEYS if key not in turns.columns and _talks(row.get(key))}
    if any(answer != next(iter(answers.values())) for answer in answers.values()):
        raise RowError(f"has messages without an answer, and two different answers ({', '.join(answers)}): leave one out")
    for key, answer in list(answers.items())[:1]:
        more = [{"role": "assistant", "content": answer}] if isinstance(answer, str) else _listed(answer, key)
        return Turns(turns.key, [*turns.given, *more], turns.columns | answers.keys())
    return turns


def _question(row: dict[str, Any]) -> Any:
    return next((row[key] for key in QUESTION_KEYS if _talks(row.get(key))), None)


def _talks(value: Any) -> bool:
    """Text, or a list of messages."""
    return (isinstance(value, str) and bool(value)) or (isinstance(value, list) and bool(value) and all(isinstance(one, dict) for one in value))


def _history(given: Any) -> list[dict[str, Any]]:
    """Earlier turns as pairs of question and answer (LLaMA-Factory, ms-swift)."""
    if not says(given):
        return []
    if not isinstance(given, list) or not all(isinstance(pair, list) and len(pair) == 2 and all(isinstance(one, str) for one in pair) for pair in given):
        raise RowError("history is not a list of pairs of question and answer")
    return [{"role": role, "content": words} for pair in given for role, words in zip(("user", "assistant"), pair, strict=True)]


# -- beside the messages


def _with_system(row: dict[str, Any], turns: Turns) -> Turns:
    there = {key: row[key] for key in SYSTEM_KEYS if key not in turns.columns and says(row.get(key))}
    if not there:
        return turns
    read = {key: read_message({"role": "system", "content": value}, 0, media="refuse").message for key, value in there.items()}
    first, *others = read
    for key in others:
        if words_of(read[key]) != words_of(read[first]):
            raise RowError(f"has two system prompts, {first} and {key}, which differ")
    given = turns.given
    role = role_of(given[0], 0)[0] if isinstance(given[0], dict) else ""
    same = role in ("system", "developer") and words_of(read_message(given[0], 0, media="placeholder").message).strip() == words_of(read[first]).strip()
    if role == "system" and not same:
        raise RowError(f"has two system prompts, {first} and message 0, which differ")
    if not same:
        given = [read[first], *given]
    return Turns(turns.key, given, turns.columns | set(there))


def tools_of(row: dict[str, Any]) -> list[dict[str, Any]] | None:
    """The row's tools in OpenAI's form, also from its older ``functions``, bare functions and Anthropic's.

    Raises:
        RowError: no list of objects, or two lists that differ.
    """
    found = {key: made for key in TOOL_KEYS if (made := _tools(row.get(key), key))}
    if len(found) == 2 and found["tools"] != found["functions"]:
        raise RowError("has tools and functions, which differ")
    return next(iter(found.values()), None)


def _tools(given: Any, key: str) -> list[dict[str, Any]]:
    if isinstance(given, str) and given.strip():
        given = as_json(given, key)
    if not given or (isinstance(given, str) and not given.strip()):
        return []
    if isinstance(given, dict):
        given = [given]
    if isinstance(given, list):
        given = [as_json(tool, key) if isinstance(tool, str) else tool for tool in given]
    if not isinstance(given, list) or not all(isinstance(tool, dict) for tool in given):
        raise RowError(f"{key} is not a list of objects")
    return [_tool(_without_nulls(tool)) for tool in given]


def _without_nulls(schema: Any) -> Any:
    """A tool without parameters that are null, which no JSON schema has: a table of many rows put them there."""
    if isinstance(schema, list):
        return [_without_nulls(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    shown = {key: _without_nulls(value) for key, value in schema.items()}
    if isinstance(listed := shown.get("properties"), dict):
        shown["properties"] = {name: value for name, value in listed.items() if value is not None}
    return shown


def _tool(tool: dict[str, Any]) -> dict[str, Any]:
    if "function" in tool or not isinstance(tool.get("name"), str) or tool.get("type") not in (None, "function"):
        return tool
    renamed = {("parameters" if key == "input_schema" else key): value for key, value in tool.items() if key != "type"}
    return {"type": "function", "function": renamed}


def template_args_of(row: dict[str, Any]) -> dict[str, Any]:
    """What the row tells the chat template.

    Raises:
        RowError: no object, or an argument that is no variable of a template.
    """
    given = row.get("chat_template_kwargs")
    if isinstance(given, str) and given.strip():
        given = as_json(given, "chat_template_kwargs")
    if not says(given):
        given = {}
    if not isinstance(given, dict):
        raise RowError(f"chat_template_kwargs is a {type(given).__name__}, not an object")
    if owned := sorted(_OURS & given.keys()):
        raise RowError(f"chat_template_kwargs sets {owned[0]}, which is no variable of a chat template")
    for key in switches_of(row):
        if given.get(key, row[key]) != row[key]:
            raise RowError(f"has {key} and chat_template_kwargs, which differ")
        given = {**given, key: row[key]}
    return dict(given)


def inside(row: Mapping[str, Any]) -> Iterator[str]:
    """Columns whose names mean something here, inside an object beside them (``metadata.system``, ``extra_body.chat_template_kwargs``)."""
    for name, value in row.items():
        if isinstance(value, dict) and name not in (*TEMPLATE_KEYS, *TOOL_KEYS, *MESSAGE_KEYS):
            yield from (f"{name}.{key}" for key in (*MESSAGE_KEYS, *SYSTEM_KEYS, *TOOL_KEYS, *TEMPLATE_KEYS) if says(value.get(key)))


def switches_of(row: Mapping[str, Any]) -> list[str]:
    """Columns that are variables of chat templates."""
    return [key for key, kind in SWITCHES.items() if isinstance(row.get(key), kind) and row[key] != ""]


def repeated(row: Mapping[str, Any], messages: tuple[dict[str, Any], ...]) -> set[str]:
    """Columns that say what messages beside them say: their first question, all before the last answer, the last answer."""
    if row.keys().isdisjoint((*QUESTION_KEYS, *ANSWER_KEYS)):
        return set()
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    asked = next((words_of(message).strip() for message in messages if message["role"] == "user"), None)
    answer = words_of(messages[answers[-1]]).strip() if answers else None
    before = [(m["role"], words_of(m).strip()) for m in messages[: answers[-1] if answers else len(messages)]]
    found = set()
    for key in (*QUESTION_KEYS, *ANSWER_KEYS):
        value = row.get(key)
        if isinstance(value, str) and value.strip() == (asked if key in QUESTION_KEYS else answer):
            found.add(key)
        elif isinstance(value, list) and value and all(isinstance(one, dict) for one in value):
            try:
                said = [(role_of(one, i)[0], str(content_of(one, i)).strip()) for i, one in enumerate(value)]
            except RowError:
                continue
            if said == before if key in QUESTION_KEYS else said == [("assistant", answer)]:
                found.add(key)
    return found
