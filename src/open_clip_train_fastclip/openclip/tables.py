"""Tables of images and captions, csv or tsv, read as their lines say, for training and for evaluation.

pandas, with which OpenCLIP reads them, takes captions like None or NA for missing and writes 'nan', makes numbers of
digits, joins lines from a quote that is not closed to the next one, and shifts the columns of lines that end in a
separator. Here a line that does not fit is named.
"""

import argparse
import csv
import functools
import itertools
import logging
import os
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
from pandas.io.common import get_handle
from torch.utils.data import Dataset
from torchvision.datasets.folder import is_image_file

from ..data.images import open_in_8_bits
from ..errors import UserError, named_line, one_line
from ..ranks import is_first_rank

LONGEST_FIELD = 2**31 - 1  # what the csv module takes at most; a column that is not used may hold whole images


@dataclass(frozen=True)
class Columns:
    """Which table, and which of its columns count, by the flags --csv-separator, --csv-img-key, --csv-caption-key."""

    path: str  # or address; what ends in .gz and the like is unpacked
    separator: str  # of one character; longer ones are regular expressions, as for pandas
    image: str
    caption: str

    @classmethod
    def of(cls, path: str, args: argparse.Namespace) -> "Columns":
        """Of a table that the flags of a run name."""
        return cls(path, args.csv_separator, args.csv_img_key, args.csv_caption_key)


@dataclass
class Table:
    """The rows of a table, in order, and what the user should know of it."""

    images: list[str] = field(default_factory=list)
    captions: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


class TableDataset(Dataset[tuple[Any, Any]]):
    """In place of OpenCLIP's CsvDataset: the same images and attributes, of a table that read_table() reads."""

    def __init__(self, columns: Columns, transforms: Callable[[Any], Any], tokenizer: Any):
        table = read_table(columns)
        for note in table.notes if is_first_rank() else ():
            logging.warning(note)
        self.path, self.images, self.captions = columns.path, table.images, table.captions
        self.transforms, self.tokenize = transforms, tokenizer

    def __len__(self) -> int:
        return len(self.captions)

    def __getitem__(self, row: int) -> tuple[Any, Any]:
        try:
            return self.transforms(open_in_8_bits(self.images[row])), self.tokenize([self.captions[row]])[0]
        except Exception as error:  # what an image library, a transform or a tokenizer raises is not one kind
            raise UserError(
                f"row {row + 1} of {self.path} ({self.images[row]}) cannot be read ({named_line(error)}): correct it "
                "or take it out"
            ) from None


def read_table(columns: Columns) -> Table:
    """The rows of a table. Raises UserError that names the file, and the line and what to do if a line does not fit.

    What was read last is kept, since a run checks a table before it builds anything and uses it later.
    """
    try:
        stat = os.stat(columns.path)
    except OSError:  # an address, or ~, which pandas knows
        return _read(columns, None)
    return _read(columns, (stat.st_size, stat.st_mtime_ns))


@functools.lru_cache(maxsize=2)  # training and evaluation
def _read(columns: Columns, stamp: tuple[int, int] | None) -> Table:
    path, limit = columns.path, csv.field_size_limit(LONGEST_FIELD)
    try:
        table = _by_lines(columns) if len(columns.separator) == 1 else _by_pattern(columns)
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file") from None
    except (OSError, EOFError, ValueError, ImportError, zlib.error, csv.Error) as error:
        raise UserError(f"{path} is no table ({one_line(error)}): check the file, or --csv-separator") from None
    finally:
        csv.field_size_limit(limit)
    if not table.images:
        raise UserError(f"{path} has no rows: check the file")
    if 2 * sum(map(is_image_file, table.captions)) > len(table.captions):
        table.notes.append(
            f"{path}: most captions, in the column {columns.caption!r} (--csv-caption-key), are names of images, like "
            f"{table.captions[0]!r}"
        )
    return table


@dataclass(frozen=True)
class _Record:
    """What the csv module takes for one row."""

    line: int  # its first one, from 1
    lines: list[str]
    fields: list[str]
    is_open: bool  # a quote is, at the end of the file


class _Lines:
    """The lines of a file, and those of them that belong to the record at which the csv reader is."""

    def __init__(self, file: Any):
        self._file = file
        self.record: list[str] = []
        self.ended_inside = False  # a record

    def __iter__(self) -> Iterator[str]:
        for line in self._file:
            self.record.append(line)
            yield line
        self.ended_inside = bool(self.record)


def _by_lines(columns: Columns) -> Table:
    table, path = Table(), columns.path
    surplus: list[int] = []  # lines
    missing: list[int] = []
    like_rows: list[int] = []
    # paths may be of any bytes
    with get_handle(path, "r", encoding="utf-8-sig", errors="surrogateescape", compression="infer") as handles:
        records = _records(handles.handle, columns.separator)
        names = _names(records, columns)
        first = next(records, None)
        unnamed = ""
        if first and _has_index(first.fields, names):
            names, unnamed = ["", *names], " with the first, which has no name"
            table.notes.append(f"{path}: the first column has no name and is taken for the numbers of the rows")
        image, caption = _places(columns, names)
        for record in itertools.chain([first] if first else [], records):
            line, fields = record.line, record.fields
            if _looks_like_rows(record, columns, image, len(names)):
                like_rows.append(line)
            needed = len(names) if unnamed else max(image, caption) + 1
            if len(fields) < needed or any(fields[len(names) :]):
                raise UserError(
                    f"{path}, line {line} has {len(fields)} fields and the header {len(names)}{unnamed}: give every "
                    f"column a name, and put a field that holds the separator {columns.separator!r} in quotes"
                )
            if len(fields) != len(names):
                (surplus if len(fields) > len(names) else missing).append(line)
            _append(table, f"{path}, line {line}", fields[image], fields[caption])
    for lines, what in (
        (surplus, "lines end in a separator too many, line {} is the first; all is read"),
        (missing, "lines have fewer fields than the header, line {} is the first; image and caption are there"),
        (like_rows, "quoted fields hold lines like rows, line {} is the first: see that no quote is left open there"),
    ):
        if lines:
            table.notes.append(f"{path}: {len(lines):,} {what.format(lines[0])}")
    return table


def _records(file: Any, separator: str) -> Iterator[_Record]:
    """The records of a file but for blank lines and those of separators alone."""
    lines = _Lines(file)
    reader = csv.reader(lines, delimiter=separator)
    for fields in reader:
        record, lines.record = lines.record, []
        if "".join(fields).strip(" \t") or lines.ended_inside:
            yield _Record(reader.line_num - len(record) + 1, record, fields, lines.ended_inside)


def _names(records: Iterator[_Record], columns: Columns) -> list[str]:
    header = next(records, None)
    if header is None:
        raise UserError(f"{columns.path} is no table (it is empty): check the file")
    _looks_like_rows(header, columns, 0, len(header.fields))
    return header.fields


def _has_index(fields: list[str], names: list[str]) -> bool:
    """Whether the first row begins with a number or name of itself, as pandas' to_csv(index_label=False) or R write it.

    Otherwise a field more than in the header is of a separator in the caption or at the line's end.
    """
    return len(fields) == len(names) + 1 and bool(fields[-1]) and not is_image_file(fields[0])


def _looks_like_rows(record: _Record, columns: Columns, image: int, width: int) -> bool:
    """Whether a record of several lines may be rows that a quote has joined. Raises UserError if it is taken for them.

    It is if something follows the closing quote, which began another field, or if more than one of the lines has the
    fields of a row, an image among them. A field that begins with a space is how a sentence goes on.
    """
    if len(record.lines) == 1 and not record.is_open:
        return False
    kind = _folder_and_ending(record.fields[image]) if len(record.fields) > image else set()
    rows = [row for row in (line.split(columns.separator) for line in record.lines) if len(row) >= width]
    joined = 0
    for row in rows:
        name = row[image].strip('"\r\n')
        has_image = is_image_file(name) or not kind.isdisjoint(_folder_and_ending(name))
        joined += len(row) == width and has_image and not any(field.startswith(" ") for field in row)
    if record.is_open or joined > 1 or not _is_strict(record.lines, columns.separator):
        raise UserError(
            f"{columns.path}, line {record.line}: a quote opens a field there and is not closed in it: take the quote "
            'or the line breaks out, or put the field in quotes and write "" for each quote inside'
        )
    return len(rows) > 1


def _is_strict(lines: list[str], separator: str) -> bool:
    try:
        list(csv.reader(lines, delimiter=separator, strict=True))
    except csv.Error:
        return False
    return True


def _folder_and_ending(path: str) -> set[str]:
    return {os.path.dirname(path), os.path.splitext(path)[1]} - {""}


def _by_pattern(columns: Columns) -> Table:
    rows = pd.read_csv(
        columns.path, sep=columns.separator, engine="python", dtype=str, na_filter=False,
        encoding_errors="surrogateescape",
    )  # fmt: skip
    names, table = list(rows.columns), Table()
    image, caption = (names[place] for place in _places(columns, names))
    if not isinstance(rows.index, pd.RangeIndex):
        raise UserError(f"{columns.path} has more fields in its lines than in its header: give every column a name")
    for number, pair in enumerate(zip(rows[image].tolist(), rows[caption].tolist(), strict=True), 1):
        if not all(isinstance(value, str) for value in pair):
            raise UserError(f"{columns.path}, row {number} has fewer fields than the header: complete it")
        _append(table, f"{columns.path}, row {number}", *pair)
    return table


def _places(columns: Columns, names: list[str]) -> tuple[int, int]:
    for option, column in (("--csv-img-key", columns.image), ("--csv-caption-key", columns.caption)):
        if column not in names:
            raise UserError(
                f"{columns.path} has no column {column!r} ({option}); it has {', '.join(map(repr, names[:8]))}: "
                f"name the right one, or its separator with --csv-separator"
            )
    return names.index(columns.image), names.index(columns.caption)


def _append(table: Table, where: str, image: str, caption: str) -> None:
    if not image:
        raise UserError(f"{where} names no image: complete it, or take it out")
    try:
        caption.encode()
    except UnicodeError:
        raise UserError(f"{where}: the caption is not UTF-8: convert the table, as with iconv -t UTF-8") from None
    table.images.append(image)
    table.captions.append(caption)
