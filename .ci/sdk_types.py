"""Strict validators made of the anthropic SDK's own request types.

The SDK's TypedDicts are made for type checkers: pydantic would take unknown keys, look into an
`Iterable` only when somebody iterates, and name every member of a union in its complaint. `strict`
rebuilds a type so that unknown keys are refused at any depth, lists are lists, and a union of
blocks is told apart by its `type`, as the API does it.
"""

from __future__ import annotations

import collections.abc
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from anthropic.types import message_count_tokens_params, message_create_params
from anthropic.types.anthropic_beta_param import AnthropicBetaParam
from anthropic.types.beta import message_count_tokens_params as beta_count_tokens_params
from anthropic.types.beta import message_create_params as beta_create_params
from pydantic import BaseModel, ConfigDict, Discriminator, Tag, TypeAdapter, ValidationError
from typing_extensions import Required, TypedDict, get_type_hints, is_typeddict

HEADER_FIELDS = ("betas", "user_profile_id", "workspace_id")  # parameters that travel as headers
SAMPLING = ("temperature", "top_p", "top_k")  # gone from the SDK's types, see messages_rules
ITERABLES = (collections.abc.Iterable, collections.abc.Sequence, list)

_rebuilt: dict[Any, Any] = {}


def strict(hint: Any) -> Any:
    """The same type, closed to unknown keys and with real lists."""
    if is_typeddict(hint):
        return strict_typed_dict(hint)
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Union:
        return strict_union([a for a in arguments if not file_like(a)])
    if origin in ITERABLES:
        return list[strict(arguments[0])]
    if origin is Required:
        return Required[strict(arguments[0])]
    return hint


def file_like(hint: Any) -> bool:
    """Conveniences of the SDK that never go over the wire: open files and answer models."""
    if isinstance(hint, type):
        return issubclass(hint, BaseModel) or hint.__name__ == "PathLike"
    if get_origin(hint) in (Annotated, Union):
        return file_like(get_args(hint)[0])
    return "IO" in str(get_origin(hint))


def strict_typed_dict(hint: Any) -> Any:
    """A closed copy of a TypedDict; copies are kept, so that each is made once."""
    if hint not in _rebuilt:
        hints = get_type_hints(hint, include_extras=True)
        fields = {k: strict(v) for k, v in hints.items() if k not in HEADER_FIELDS}
        copy = TypedDict(hint.__name__, fields, total=False)  # type: ignore[misc]
        allow = getattr(hint, "__pydantic_config__", {}).get("extra") == "allow"
        copy.__pydantic_config__ = ConfigDict(extra="allow" if allow else "forbid", strict=True)
        _rebuilt[hint] = copy
    return _rebuilt[hint]


def strict_union(members: list[Any]) -> Any:
    """A union whose TypedDict members are found by their tag (`role`, `type`)."""
    plain = [strict(m) for m in members if not is_typeddict(m)]
    groups: dict[str, list[Any]] = {}
    for member in (m for m in members if is_typeddict(m)):
        for tag in tags(member):
            groups.setdefault(tag, []).append(strict(member))
    if len(groups) > 1 and "" not in groups:
        tagged = [Annotated[Union[tuple(group)], Tag(tag)] for tag, group in groups.items()]
        plain.append(Annotated[Union[tuple(tagged)], Discriminator(tag_of)])
    else:
        plain += [copy for group in groups.values() for copy in group]
    return Union[tuple(plain)]


def tags(hint: Any) -> list[str]:
    hints = get_type_hints(hint)
    for key in ("role", "type"):
        found = [v for v in literal_values(hints.get(key)) if v is not None]
        if found:
            return found
    return [""]


def literal_values(hint: Any) -> list[Any]:
    if get_origin(hint) is Literal:
        return list(get_args(hint))
    return [v for argument in get_args(hint) for v in literal_values(argument)]


def tag_of(value: Any) -> str | None:
    if not isinstance(value, dict):
        return None
    return value.get("role") or value.get("type") or "custom"


def complaint(error: ValidationError) -> str:
    """One line in the API's manner: `messages.0.content.0.text.text: Field required`."""
    first = min(error.errors(), key=lambda e: -len(e["loc"]))
    path = [str(part) for part in first["loc"] if not str(part).startswith(("list[", "tagged-"))]
    message = first["msg"]
    if first["type"] == "extra_forbidden":
        message = "Extra inputs are not permitted"
    return f"{'.'.join(path)}: {message}"


BETAS = set(literal_values(AnthropicBetaParam))
CREATE = TypeAdapter(strict(message_create_params.MessageCreateParamsBase))
COUNT = TypeAdapter(strict(message_count_tokens_params.MessageCountTokensParams))
BETA_CREATE = TypeAdapter(strict(beta_create_params.MessageCreateParamsBase))
BETA_COUNT = TypeAdapter(strict(beta_count_tokens_params.MessageCountTokensParams))


def type_error(body: dict[str, Any], *, count: bool, beta: bool) -> str | None:
    """What the SDK's types have against this body, or None."""
    adapter = (BETA_COUNT if beta else COUNT) if count else (BETA_CREATE if beta else CREATE)
    checked = {k: v for k, v in body.items() if k not in SAMPLING and k != "stream"}
    try:
        adapter.validate_python(checked, strict=True)
    except ValidationError as error:
        return complaint(error)
    return None
