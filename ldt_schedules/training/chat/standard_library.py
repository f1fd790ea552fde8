"""Conversations that every machine has: questions about the functions of Python's library, answered by its docstrings.

    user       What does textwrap.dedent do?
    assistant  Remove any common leading whitespace from every line in `text`.
    user       How is it called?
    assistant  textwrap.dedent(text)

The sources are parsed, never imported.
"""

from __future__ import annotations

import ast
import warnings
from collections.abc import Iterator
from itertools import islice

from ldt_schedules.training.chat.samples import Message, Sample
from ldt_schedules.training.corpus import library_sources

MAX_CONVERSATIONS = 1500
"""About half of what can be found; enough for an example, and read in two or three seconds."""

_LONGEST_ANSWER, _LONGEST_ARGUMENTS = 120, 60
"""Characters: answers of a sentence or two, which a small model can learn."""

_Function = ast.FunctionDef | ast.AsyncFunctionDef


def library_conversations(count: int = MAX_CONVERSATIONS) -> tuple[Sample, ...]:
    """The first `count`, in the order of `library_sources`: the same on every machine with the same Python."""
    return tuple(islice(_conversations(), count))


def _conversations() -> Iterator[Sample]:
    for path, text in library_sources():
        module = ".".join(path.with_suffix("").parts).removesuffix(".__init__")
        for name, function in _documented(_parsed(text), module):
            yield Sample(_messages(name, function), path, function.lineno)


def _parsed(text: str) -> ast.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of escapes that another Python will not like
        try:
            return ast.parse(text)
        except SyntaxError:  # a template of a source, not one
            return ast.Module([], [])


def _documented(parent: ast.Module | ast.ClassDef, name: str) -> Iterator[tuple[str, _Function]]:
    """The public functions and methods with a docstring, and what they are called from outside."""
    for node in parent.body:
        if not isinstance(node, _Function | ast.ClassDef) or node.name.startswith("_"):
            continue
        full = f"{name}.{node.name}"
        if isinstance(node, ast.ClassDef):
            yield from _documented(node, full)
        elif 0 < len(_first_paragraph(node)) <= _LONGEST_ANSWER:
            yield full, node


def _messages(name: str, function: _Function) -> tuple[Message, ...]:
    """The second question is there where the answer says something: where there are arguments, a few."""
    talk = [("user", f"What does {name} do?"), ("assistant", _first_paragraph(function))]
    arguments = ast.unparse(function.args)
    if arguments not in ("", "self", "cls") and len(arguments) <= _LONGEST_ARGUMENTS:
        talk += [("user", "How is it called?"), ("assistant", f"{name}({arguments})")]
    return tuple(Message(role, (text,)) for role, text in talk)


def _first_paragraph(function: _Function) -> str:
    """Of the docstring, on one line; nothing where there is none."""
    paragraphs = (ast.get_docstring(function) or "").split("\n\n")
    return " ".join(paragraphs[0].split())
