"""A captions file, CSV or JSONL, to rows that can be used, with everything that cannot be counted by kind.

A file of a million captions has a few bad lines whatever its origin, so a bad line is never an error here; a file that
cannot be what it is named for, without its columns or in another encoding, always is. Every line is checked before the
run starts, as a caption that is missed at step 90 000 is missed too late.
"""

import csv
import io
import json
import posixpath
from collections.abc import Iterator
from typing import Any, NamedTuple

from input_pipeline.errors import DecodeError, UserError
from input_pipeline.sources.base import to_text
from input_pipeline.sources.problems import Problems
from input_pipeline.sources.records import Fields

UTF16 = (b"\xff\xfe", b"\xfe\xff")
ENCODING = "expected UTF-8: save it as UTF-8 (in Excel: CSV UTF-8)"
MALFORMED, UNDECODABLE, EMPTY, EQUAL = "malformed rows", "rows that are not UTF-8", "rows without text", "equal rows"


class Row(NamedTuple):
    """file_name: of the image, relative to the captions file's folder. label: a class name; "": none."""

    file_name: str
    text: str
    label: str


def read_rows(data: bytes, name: str, fields: Fields) -> tuple[list[Row], Problems]:
    """The rows of a captions file, named for messages, in its order; no two are equal and none has an empty text.

    Raises UserError for a file in another encoding or without the columns, with those that it has.
    """
    if data.startswith(UTF16):
        raise UserError(f"{name} is UTF-16; {ENCODING}")
    problems = Problems()
    read = _csv_records if name.lower().endswith(".csv") else _json_records
    columns, records = read(data.removeprefix(b"\xef\xbb\xbf"), problems)
    text = _text_column(columns, name, fields, problems)
    rows, seen = [], set()
    for line, found in records:
        try:
            caption = to_text(found.get(text), f"line {line}")
        except DecodeError as error:
            problems.add(MALFORMED, str(error))
            continue
        file_name = _string(found.get("file_name"))
        label = _string(found.get(fields.label)) if fields.label else ""
        if not file_name:
            problems.add(MALFORMED, f"line {line} (no file_name)")
        elif not all(map(_is_unicode, (file_name, caption, label))):
            problems.add(UNDECODABLE, f"line {line}")
        elif not caption:
            problems.add(EMPTY, f"line {line} ({file_name})")
        elif (row := Row(posixpath.normpath(file_name), caption, label))[:2] in seen:
            problems.add(EQUAL, f"line {line} ({file_name})")
        else:
            seen.add(row[:2])
            rows.append(row)
    return rows, problems


def _csv_records(data: bytes, problems: Problems) -> tuple[list[str], list[tuple[int, dict[str, str]]]]:
    """Columns, and line numbers with fields; bytes that are no UTF-8 become surrogates and spoil only their own row."""
    lines = _csv_lines(io.StringIO(data.decode("utf-8", "surrogateescape"), newline=""), problems)
    header, records = [name.strip() for name in next(lines, (1, []))[1]], []
    for number, row in lines:
        if len(row) > len(header):
            problems.add(MALFORMED, f"line {number} ({len(row)} columns, expected {len(header)}: quotes?)")
        elif any(row):
            records.append((number, dict(zip(header, row, strict=False))))
    return header, records


def _csv_lines(file: io.StringIO, problems: Problems) -> Iterator[tuple[int, list[str]]]:
    """The rows that can be read, by the number of their last line."""
    lines = csv.reader(file)
    while True:
        try:
            row = next(lines)
        except StopIteration:
            return
        except csv.Error as error:
            problems.add(MALFORMED, f"line {lines.line_num} ({error})")
            continue
        yield lines.line_num, row


def _json_records(data: bytes, problems: Problems) -> tuple[list[str], list[tuple[int, dict[str, Any]]]]:
    """Fields that occur, and line numbers with fields."""
    records = []
    for number, line in enumerate(data.split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            found = json.loads(line.decode())
        except UnicodeDecodeError:
            problems.add(UNDECODABLE, f"line {number}")
            continue
        except (ValueError, RecursionError) as error:
            problems.add(MALFORMED, f"line {number} ({error})")
            continue
        if isinstance(found, dict):
            records.append((number, found))
        else:
            problems.add(MALFORMED, f"line {number} (no JSON object)")
    return list(dict.fromkeys(key for _, found in records for key in found)), records


def _text_column(columns: list[str], name: str, fields: Fields, problems: Problems) -> str:
    """The column of the text. Raises UserError where one that is needed is missing."""
    text = next((column for column in fields.texts if column in columns), None)
    named = fields.label if fields.label != "label" else ""  # the default label is one that a file may have
    if text is not None and "file_name" in columns and (not named or named in columns):
        return text
    wanted = " and ".join(["file_name", " or ".join(fields.texts), *([named] if named else [])])
    listed = ", ".join(columns).encode("utf-8", "replace").decode() or "none"
    raise UserError(
        f"{name} has the columns {listed}: expected {wanted}"
        f"{'; '.join(['', *problems.lines()])}. Set data.text_field or data.label_field, or rename the file if it does "
        "not hold captions"
    )


def _string(value: object) -> str:
    return "" if value is None else str(value).strip()


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
