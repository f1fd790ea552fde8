"""Where the text comes from: a file, or what every machine has, the sources of Python's own library.

Documents are read one by one, so that a file need not fit into memory as text.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from ldt_schedules.errors import ConfigError

STDLIB_MAX_BYTES = 8_000_000
"""Of the library's roughly 12 MB; more would only make the start slower."""

_SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
_BLOCK_BYTES = 1 << 20


def documents(path: str | None) -> Iterator[str]:
    """Each document of `data.path`: the lines of a .jsonl file, the whole of any other, a source file of the library.

    Raises:
        ConfigError: as `check_text_file`; a .jsonl line that is no object with a text (with its number).
    """
    if path is None:
        yield from (text for _, text in library_sources())
        return
    file = Path(path)
    if is_jsonl(file):
        check_readable(file)
        yield from _jsonl_texts(file)
    else:
        check_text_file(file)
        yield file.read_text(encoding="utf-8")


def is_jsonl(file: Path) -> bool:
    return file.suffix.lower() in (".jsonl", ".ndjson")


def check_readable(file: Path) -> None:
    """Raises ConfigError unless `file` is a file with something in it that this process may read."""
    try:
        with file.open("rb") as stream:
            empty = not stream.read(1)
    except FileNotFoundError:
        raise ConfigError(f"data.path {file} does not exist; give a text or .jsonl file, or null") from None
    except IsADirectoryError:
        raise ConfigError(f"data.path {file} is a directory; give one text or .jsonl file") from None
    except OSError as error:
        raise ConfigError(f"data.path {file} cannot be read: {error.strerror}") from None
    if empty:
        raise ConfigError(f"data.path {file} is empty; give a file with text")


def check_text_file(file: Path, *, max_bytes: int | None = None) -> None:
    """Make sure that a file is UTF-8 text, one block at a time.

    Args:
        max_bytes: look at the beginning only.

    Raises:
        ConfigError: missing, unreadable, empty, a NUL byte, or bytes that are no UTF-8 (with the line).
    """
    check_readable(file)
    decoder = codecs.getincrementaldecoder("utf-8")()
    done, line, blank = 0, 1, True
    with file.open("rb") as stream:
        while block := stream.read(_BLOCK_BYTES):
            if b"\0" in block:
                raise _not_text(file, line + block[: block.index(b"\0")].count(b"\n"), "a NUL byte")
            try:
                decoder.decode(block)
            except UnicodeDecodeError as error:
                line += error.object[: error.start].count(b"\n")
                raise _not_text(file, line, "bytes that are no UTF-8") from None
            blank = blank and not block.strip()
            line += block.count(b"\n")
            done += len(block)
            if max_bytes is not None and done >= max_bytes:
                return
    if decoder.getstate()[0]:
        raise _not_text(file, line, "half a character at its end")
    if blank:
        raise ConfigError(f"data.path {file} holds nothing but white space; give a file with text")


def _not_text(file: Path, line: int, why: str) -> ConfigError:
    return ConfigError(f"data.path {file} is not text: {why} in line {line}; give a UTF-8 text or .jsonl file")


def _jsonl_texts(file: Path) -> Iterator[str]:
    with file.open("rb") as stream:
        for number, raw in enumerate(stream, 1):
            if raw.strip():
                yield _text_of_line(file, number, raw)


def _text_of_line(file: Path, number: int, raw: bytes) -> str:
    try:
        entry = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError:
        raise _not_text(file, number, "bytes that are no UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"data.path {file}, line {number}: not JSON ({error}); one object a line is needed") from None
    text = entry.get("text") if isinstance(entry, dict) else None
    if not isinstance(text, str):
        keys = f"an object with the keys {', '.join(entry) or '(none)'}" if isinstance(entry, dict) else "no object"
        raise ConfigError(f'data.path {file}, line {number}: {keys}; an object with a string "text" is needed')
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise ConfigError(
            f"data.path {file}, line {number}: the text has half a surrogate pair; whole Unicode characters are needed"
        ) from None
    return text


def library_sources() -> Iterator[tuple[Path, str]]:
    """The library's .py files with their paths inside it, up to `STDLIB_MAX_BYTES`.

    They come in the order of a hash of their names: the same everywhere, and mixed, so that neither the cap nor
    the validation part (the end of the corpus) falls on one package.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    names = [file.relative_to(root) for file in root.rglob("*.py")]
    names = [name for name in names if not _SKIPPED & set(name.parts)]
    total = 0
    for name in sorted(names, key=lambda name: hashlib.sha256(name.as_posix().encode()).digest()):
        try:
            text = (root / name).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue  # a few sources declare another encoding; one file more or less changes nothing
        total += len(text)
        if total > STDLIB_MAX_BYTES:
            return
        yield name, text
    if not total:
        raise ConfigError(f"this Python has no library sources in {root}; set data.path to a text file")
