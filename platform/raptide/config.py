"""Typed settings: a YAML file, `key=value` overrides on top, one clear error per bad field.

A file may build on another: `base: FILE`, relative to itself. Its own fields replace the base's,
section by section.

Values mean what people write: numbers are decimal (`0300` is 300, `1e3` is 1000, `1:30` is none),
and an override of a text field is that text to the last character, `#` and all.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from raptide.errors import ConfigError
from raptide.patience import patiently, reason_of


class Settings(BaseModel):
    """Base of every settings class: immutable, keyword-only, no unknown field."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


S = TypeVar("S", bound=Settings)


def load_settings(cls: type[S], path: str | Path, overrides: Iterable[str] = ()) -> S:
    """Read `path` as YAML, apply `a.b=value` overrides, and check the result against `cls`.

    Raises:
        ConfigError: a file is unreadable, an override is malformed, or a field is wrong.
    """
    return settle(cls, read_tree(path), overrides, source=str(path))


def settle(cls: type[S], tree: dict[str, Any], overrides: Iterable[str], *, source: str) -> S:
    """Put overrides on top of a mapping, which they change, and check the result against `cls`.

    Raises:
        ConfigError: an override is malformed, or a field is wrong.
    """
    for override in overrides:
        _apply(cls, tree, override)
    return parse_settings(cls, tree, source=source)


def read_tree(path: str | Path) -> dict[str, Any]:
    """A YAML file over the files it builds on, not checked against any class.

    Raises:
        ConfigError: a file is unreadable.
    """
    return _read_tree(Path(path), ())


def _read_tree(path: Path, above: tuple[Path, ...]) -> dict[str, Any]:
    """A YAML file over the files it builds on; `above` are those that build on it."""
    if path.resolve() in above:
        raise ConfigError(f"{path} builds on itself by way of its base; remove one `base:` line.")
    try:
        tree = _parse_yaml(patiently(path.read_text)) or {}
    except OSError as error:
        raise ConfigError(
            f"Cannot read the settings file {path}: {reason_of(error)}; give an existing YAML file."
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{path} is not valid YAML: {reason}.") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} must hold `field: value` lines, not a {type(tree).__name__}.")
    base = tree.pop("base", None)
    if base is None:
        return tree
    below = _read_tree(path.parent / str(base), (*above, path.resolve()))
    return merge(below, tree)


def merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """The fields of `above` in place of those of `below`, section by section; both stay."""
    merged = dict(below)
    for key, value in above.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge(merged[key], value) if both else value
    return merged


def parse_settings(cls: type[S], tree: dict[str, Any], *, source: str) -> S:
    """Check a plain mapping against `cls`; `source` is the place named in the error."""
    try:
        return cls.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(f"{source}: {_first_problem(cls, error)}") from None


def _apply(cls: type[BaseModel], tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not all(key.split(".")):
        raise ConfigError(
            f"An override has the form section.field=value, but {override!r} was given."
        )
    *sections, field = key.split(".")
    value = _parse_value(text, _annotation_at(cls, [*sections, field]))
    for section in sections:
        node = tree.setdefault(section, {})
        if not isinstance(node, dict):
            raise ConfigError(f"Override {override!r}: `{section}` is a value, not a section.")
        tree = node
    tree[field] = value


class _PlainLoader(yaml.SafeLoader):
    """YAML whose plain scalars are null, true, false, decimal numbers, or else text."""


_PlainLoader.yaml_implicit_resolvers = {}
for _tag, _pattern, _starts in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+", list("-+0123456789")),
    (
        "float",
        r"[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+)(?:[eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan",
        list("-+.0123456789"),
    ),
):
    _PlainLoader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), _starts
    )
_PlainLoader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(str(node.value), 10))


def _parse_yaml(text: str) -> Any:
    return yaml.load(text, Loader=_PlainLoader)


def _parse_value(text: str, annotation: Any) -> Any:
    """What the value of an override means for a field of this type."""
    if text.strip() in ("", "null", "~"):
        return None
    nested = text.lstrip().startswith(("[", "{")) and _takes(annotation, list, tuple, dict)
    inner = get_args(annotation) if get_origin(annotation) is tuple else ()
    numeric = any(_takes(each, int, float) for each in (annotation, *inner))
    textual = _takes(annotation, str) or not numeric
    if textual and annotation is not None and not nested:
        return text
    try:
        return _parse_yaml(text)
    except yaml.YAMLError:
        return text


def _takes(annotation: Any, *types: type) -> bool:
    """Whether a field of this type takes a value of one of some types."""
    if get_origin(annotation) is Literal:
        return any(isinstance(choice, types) for choice in get_args(annotation))
    if get_origin(annotation) in (Union, UnionType, Annotated):
        return any(_takes(each, *types) for each in get_args(annotation))
    plain = get_origin(annotation) or annotation
    return isinstance(plain, type) and issubclass(plain, types)


def _annotation_at(cls: type[BaseModel], path: list[str]) -> Any:
    """The type of a field, or None where there is no such field."""
    annotation: Any = cls
    for part in path:
        fields = [
            each.model_fields[part] for each in _classes_in(annotation) if part in each.model_fields
        ]
        if not fields:
            return None
        annotation = fields[0].annotation
    return annotation


def _classes_in(annotation: Any) -> list[type[BaseModel]]:
    """The settings that a field of this type may hold."""
    inner = (annotation, *get_args(annotation))
    return [each for each in inner if isinstance(each, type) and issubclass(each, BaseModel)]


def _first_problem(cls: type[BaseModel], error: ValidationError) -> str:
    """One sentence for the first of pydantic's complaints."""
    problem = error.errors(include_url=False)[0]
    path = [str(part) for part in problem["loc"]]
    field = ".".join(path) or "the whole file"
    if problem["type"] == "extra_forbidden":
        known = _fields_at(cls, path[:-1])
        close = difflib.get_close_matches(path[-1], known, n=1)
        near = close or _nearest_anywhere(cls, path[-1])
        hint = f"did you mean `{near[0]}`?" if near else f"known here: {', '.join(known)}."
        return f"there is no setting `{field}`; {hint}"
    if problem["type"] == "missing":
        return f"the setting `{field}` is required; add it, or give {field}=value."
    message = problem["msg"].removeprefix("Value error, ")
    if isinstance(problem["input"], dict):
        return f"`{field}`: {message}"
    value = re.sub(r"//[^/]*@", "//…@", repr(problem["input"]))  # a URI may hold keys
    return f"`{field}` is {value}: {message[:1].lower()}{message[1:]}."


def _nearest_anywhere(cls: type[BaseModel], name: str) -> list[str]:
    """The whole path of the field whose name is nearest, in whatever section it is."""
    paths = {path.rpartition(".")[2]: path for path in _paths_below(cls, "")}
    return [paths[each] for each in difflib.get_close_matches(name, paths, n=1)]


def _paths_below(cls: type[BaseModel], above: str) -> Iterator[str]:
    for name, field in cls.model_fields.items():
        yield above + name
        for each in _classes_in(field.annotation):
            yield from _paths_below(each, f"{above}{name}.")


def _fields_at(cls: type[BaseModel], path: list[str]) -> list[str]:
    for part in path:
        if part.isdigit():  # an item of the list before it
            continue
        field = cls.model_fields.get(part)
        below = _classes_in(field.annotation if field else None)
        if not below:
            return []
        cls = below[0]
    return list(cls.model_fields)
