"""From a YAML file and `key=value` overrides to plain dictionaries, and from pydantic's complaints to ours.

Habits of YAML 1.1 that bite are taken away. `1e-3` is a number here (YAML says string), `2026-01-31` is text, as in a
directory's name (YAML says date), and a key that is written twice is an error (YAML keeps the last, silently). Tags are
refused, and names for whole sections: with ten of them a short file stands for more than any memory holds.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, ClassVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from ldt_schedules.errors import ConfigError

_MAX_DEPTH = 16
_LARGEST = 2**63


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: ClassVar = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    _depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        if getattr(event, "tag", None) is not None:
            raise _bad(f"the tag {event.tag} has no place here; write the value alone, text in quotes", event)
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            raise _bad(f"sections and lists are nested deeper than {_MAX_DEPTH} levels", event)
        node = super().compose_node(parent, index)
        self._depth -= 1
        if isinstance(node, yaml.ScalarNode) and "\0" in node.value:
            raise _bad("a NUL character, which no name of a file may have", event)
        if isinstance(event, yaml.AliasEvent) and not isinstance(node, yaml.ScalarNode):
            raise _bad(f"*{event.anchor} stands for a section or a list; write it out", event)
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise _bad("a section or a list cannot be a key", key)
            if key.value in seen:
                raise _bad(f"key {key.value!r} appears twice", key)
            seen.add(key.value)
        mapping: dict[Any, Any] = super().construct_mapping(node, deep)
        return mapping

    def number(self, node: yaml.ScalarNode) -> int | float:
        """Whatever YAML takes for a number. It counts in twos, eights, sixteens and sixties, too."""
        whole = node.tag.endswith(":int")
        try:
            value: int | float = self.construct_yaml_int(node) if whole else self.construct_yaml_float(node)
        except ValueError:
            raise _bad(f"{node.value[:40]!r} is no number", node) from None
        if not -_LARGEST < value < _LARGEST:
            raise _bad(f"{node.value[:40]!r} is larger than any number of a config, or no number", node)
        return value


def _bad(problem: str, at: yaml.Node | yaml.Event) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=at.start_mark)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9][0-9_]*(?:\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.number)
_Loader.add_constructor("tag:yaml.org,2002:float", _Loader.number)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a file.

    Raises:
        ConfigError: no such file, not text, not YAML (with the line), or not a mapping.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"config file {path} does not exist{_neighbours(path)}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"config file {path} is not text; a YAML file is needed") from None
    except OSError as error:
        raise ConfigError(f"config file {path} cannot be read: {error.strerror}") from None
    try:
        content = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"config file {path}{_yaml_place(error)}") from None
    if not isinstance(content, dict):
        found = "nothing" if content is None else f"a {type(content).__name__}"
        raise ConfigError(f"config file {path} holds {found}; sections such as `model:` and `train:` are needed")
    return {key: {} if value is None and key != "layers" else value for key, value in content.items()}


def apply_overrides(content: dict[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """A copy of `content` with each `section.key=value` set; the value is read as YAML.

    Raises:
        ConfigError: an override without `=`, with an unreadable value, or through a key that is no section.
    """
    content = _copy(content)
    for override in overrides:
        key, equals, text = override.partition("=")
        parts = key.strip().split(".")
        if not equals or not all(parts):
            raise ConfigError(f"override {override!r} is not of the form section.key=value (train.iterations=5)")
        try:
            value = yaml.load(text, _Loader)
        except yaml.YAMLError as error:
            raise ConfigError(f"override {override!r}: the value is not YAML{_yaml_place(error)}") from None
        target = content
        for depth, part in enumerate(parts[:-1], 1):
            target = target.setdefault(part, {})
            if not isinstance(target, dict):
                raise ConfigError(f"override {override!r}: {'.'.join(parts[:depth])} is a value, not a section")
        target[parts[-1]] = value
    return content


def _copy(value: Any) -> Any:
    return {key: _copy(inner) for key, inner in value.items()} if isinstance(value, dict) else value


def _yaml_place(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    problem = getattr(error, "problem", None) or str(error)
    return f", line {mark.line + 1}, column {mark.column + 1}: {problem}" if mark else f": {problem}"


def _neighbours(path: Path) -> str:
    there = sorted(other.name for other in path.parent.glob("*.y*ml")) if path.parent.is_dir() else []
    close = difflib.get_close_matches(path.name, there, n=1, cutoff=0.5)
    return f"; did you mean {path.parent / close[0]}?" if close else ""


def keys_of(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every dotted key of a config model, leaves only."""
    for name, field in model.model_fields.items():
        if _is_section(field.annotation):
            yield from keys_of(field.annotation, f"{prefix}{name}.")  # type: ignore[arg-type]
        else:
            yield prefix + name


def explain(error: ValidationError, model: type[BaseModel]) -> str:
    """All of pydantic's findings, one line each: the key, what was given, what is allowed."""
    return "\n".join(dict.fromkeys(_explain_one(dict(finding), model) for finding in error.errors()))


def _explain_one(finding: dict[str, Any], model: type[BaseModel]) -> str:
    loc = [str(part) for part in finding["loc"]]
    key = ".".join(loc)
    section = _section_at(model, loc[:-1])
    if finding["type"] == "extra_forbidden":
        return _unknown_key(loc, section, model)
    # Pydantic writes "Value error, ..." around what our own validators raise.
    message: str = finding["msg"].removeprefix("Value error, ")
    if finding["type"] == "invalid_key":
        return f"{key} is not a key: keys are words ({_listed(section.model_fields)})"
    if not loc:
        return message
    if finding["type"] in ("model_type", "model_attributes_type"):
        inner = _section_at(model, loc)
        return f"{key}: given {finding['input']!r}, but it is a section with the keys {_listed(inner.model_fields)}"
    field = section.model_fields.get(loc[-1])
    meaning = f" ({field.description})" if field is not None and field.description else ""
    return f"{key}: given {finding['input']!r}; {re.sub('^(Input|Value|String) should', 'it must', message)}{meaning}"


def _unknown_key(loc: list[str], section: type[BaseModel], model: type[BaseModel]) -> str:
    place = ".".join(loc[:-1])
    hint = f"; did you mean {nearest}?" if (nearest := _nearest_key(loc, section, model)) else ""
    where = f"allowed in {place}" if place else "allowed at the top"
    return f"unknown key {'.'.join(loc)}{hint} ({where}: {_listed(section.model_fields)})"


def _nearest_key(loc: list[str], section: type[BaseModel], model: type[BaseModel]) -> str | None:
    """The key that was meant: a similar one of the same section, or the same one of another section."""
    *path, name = loc
    elsewhere = {key.rpartition(".")[2]: key for key in keys_of(model)}
    if name in elsewhere:
        return elsewhere[name]
    close = difflib.get_close_matches(name, section.model_fields, n=1, cutoff=0.6)
    if close:
        return ".".join([*path, close[0]])
    close = difflib.get_close_matches(name, elsewhere, n=1, cutoff=0.75)
    return elsewhere[close[0]] if close else None


def _section_at(model: type[BaseModel], loc: list[str]) -> type[BaseModel]:
    for part in loc:
        field = model.model_fields.get(part)
        # A section that may be left out is one of several types.
        choices = [] if field is None else [field.annotation, *get_args(field.annotation)]
        section = next(filter(_is_section, choices), None)
        if section is None:
            return model
        model = section  # type: ignore[assignment]
    return model


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names)
