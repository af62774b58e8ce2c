"""Tables are read as their lines say; what fits no line is named; what pandas reads right stays the same."""

import csv
import gzip
import io
import string
from pathlib import Path

import numpy as np
import open_clip
import pandas as pd
import pytest
import torch
from cli import TINY, run_cli, run_forked
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from loaders import preprocess, tokenizer
from make_data import image_of, make_csv
from open_clip_train import data as openclip_data
from PIL import Image

from open_clip_train_fastclip import FastCLIPConfig, FastCLIPLoss, load_state, preflight, save_state
from open_clip_train_fastclip.data.rows import rows_identity
from open_clip_train_fastclip.errors import UserError
from open_clip_train_fastclip.openclip.tables import Columns, Table, TableDataset, read_table


def read(path, separator="\t") -> Table:
    return read_table(Columns(str(path), separator, "filepath", "title"))


def read_text(text, folder, separator="\t", name="t.csv") -> Table:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read(path, separator)


def rows_of(table):
    return list(zip(table.images, table.captions, strict=True))


def stock_rows(path, separator="\t"):
    """The rows as OpenCLIP reads them."""
    rows = openclip_data.CsvDataset(str(path), None, "filepath", "title", separator)
    return [(str(image), str(caption)) for image, caption in zip(rows.images, rows.captions, strict=True)]


TEXT = st.text(string.ascii_letters + " ,;\t\"'\n\r\\#éß漢\u2028", max_size=12)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(captions=st.lists(TEXT, min_size=1, max_size=6), separator=st.sampled_from("\t,;|"), other=st.booleans(),
       first=st.booleans(), terminator=st.sampled_from(["\n", "\r\n"]))  # fmt: skip
def test_what_is_quoted_as_it_should_be_is_read_as_by_pandas(captions, separator, other, first, terminator, tmp_path):
    captions = [caption + "." for caption in captions]  # not missing, no number
    names = ["filepath", *(["more"] if other else []), "title"][:: 1 if first else -1]
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, names, delimiter=separator, lineterminator=terminator, quoting=csv.QUOTE_ALL)
    writer.writeheader()
    writer.writerows(
        {"filepath": f"{n}.png", "title": caption} | ({"more": "x"} if other else {})
        for n, caption in enumerate(captions)
    )
    table = read_text(file.getvalue(), tmp_path, separator)
    assert rows_of(table) == [(f"{n}.png", caption) for n, caption in enumerate(captions)]
    assert all("lines like rows" in note for note in table.notes)
    assert rows_of(table) == stock_rows(tmp_path / "t.csv", separator)


ODD_AND_RIGHT = {
    "blank lines": "\nfilepath\ttitle\n\n1.png\ta\n  \n2.png\tb\n\n",
    "no line break at the end": "filepath\ttitle\n1.png\ta\n2.png\tb",
    "a byte order mark": "\ufefffilepath\ttitle\n1.png\ta\n2.png\tb\n",
    "a quoted header": '"filepath"\t"title"\n"1.png"\t"a"\n"2.png"\t"b"\n',
    "quotes inside a field": 'filepath\ttitle\n1.png\tthe "big" one\n2.png\t5" and 6"\n',
    "text behind a closed quote": 'filepath\ttitle\n1.png\t"big" one\n2.png\tb\n',
    "a caption of two lines": 'title\tfilepath\n"a b\nc"\t1.png\nb\t2.png\n',
    "a line of separators": "filepath\ttitle\turl\n1.png\ta\tx\n2.png\tb\ty\n\t\t\n",
    "an image of two lines": 'filepath\ttitle\n1.png\t"a, 1.png\nb, 2.png"\n2.png\tb\n',
    "columns that are not needed": "n\tfilepath\ttitle\turl\n1\t1.png\ta\thttp://x\n2\t2.png\tb\t\n",
    "spaces": "filepath\ttitle\n1.png\t a \n2.png\tb\n",
}


@pytest.mark.parametrize("text", ODD_AND_RIGHT.values(), ids=ODD_AND_RIGHT)
def test_odd_tables_that_pandas_reads_right(text, tmp_path):
    table = read_text(text, tmp_path)
    stock = [row for row in stock_rows(tmp_path / "t.csv") if row != ("nan", "nan")]
    assert rows_of(table) == stock and table.notes == []


def test_their_identity_stays_the_same(tmp_path):
    path = make_csv(tmp_path)
    stock = openclip_data.CsvDataset(path, None, "filepath", "title")
    ours = TableDataset(Columns(path, "\t", "filepath", "title"), None, None)
    assert rows_identity(ours) == rows_identity(stock)


def test_a_state_of_captions_that_pandas_has_changed_is_of_other_data(tmp_path):
    loss = FastCLIPLoss(FastCLIPConfig(loss="fastclip-v1", num_samples=2))
    for *captions, is_same in (
        ("a", "b", True), ("001", "b", True), ("12", "3", True),
        ("001", "2", False), ("NA", "b", False), ("", "b", False),
    ):  # fmt: skip
        path = tmp_path / "t.csv"
        path.write_text("filepath\ttitle\n1.png\t{}\n2.png\t{}\n".format(*captions))
        ours = TableDataset(Columns(str(path), "\t", "filepath", "title"), None, None)
        stock = openclip_data.CsvDataset(str(path), None, "filepath", "title")
        save_state(loss, tmp_path / "state", 1, data=rows_identity(stock))
        if is_same:
            load_state(loss, tmp_path / "state", rows_identity(ours))
        else:
            with pytest.raises(UserError, match="other training data .* --fastclip-fresh-state"):
                load_state(loss, tmp_path / "state", rows_identity(ours))


def test_captions_are_text(tmp_path):
    captions = ["None", "NA", "null", "N/A", "nan", "", "007", "1e3", "TRUE", "-"]
    text = "filepath,title\n" + "".join(f"{n:03}.png,{caption}\n" for n, caption in enumerate(captions))
    assert rows_of(read_text(text, tmp_path, ",")) == [(f"{n:03}.png", text) for n, text in enumerate(captions)]
    assert read_text("filepath,title\n007,1.0\n", tmp_path, ",", "numbers.csv").captions == ["1.0"]


LINES = ["filepath\ttitle", *(f"/d/{n}.png\tbox {n}" for n in range(2, 9))]  # line n has image n
QUOTES = {  # the line at which the quote opens, and what some lines are instead
    "to the next quote": (4, {4: '/d/4.png\t"a box', 7: '/d/7.png\t"another box'}),
    "to a quote at a line's end": (4, {4: '/d/4.png\t"a box', 6: '/d/6.png\tof 6"'}),
    "to the next line's end": (4, {4: '/d/4.png\t"a box', 5: '/d/5.png\tof 6"'}),
    "to the end of the file": (4, {4: '/d/4.png\t"a box'}),
    "in the last line": (8, {8: '/d/8.png\t"a box'}),
    "before the image": (4, {1: "title\tfilepath", 4: '"a box\t/d/4.png', 5: 'a box of 6"\t/d/5.png'}),
    "to a row of another ending": (4, {4: 'a.jpg\t"a box', 5: 'b.png\tof 6"'}),
    "to a row of another folder": (4, {4: 'x/4\t"a box', 5: "/d/5.webp\tbox", 6: '/e/6.jpg\tof 6"'}),
    "after a field of two lines": (6, {4: '/d/4.png\t"two\nlines"', 5: '/d/5.png\t"a box', 6: '/d/6.png\t6"'}),
}


@pytest.mark.parametrize(("line", "changes"), QUOTES.values(), ids=QUOTES)
def test_a_quote_that_is_not_closed_is_named_with_its_line(line, changes, tmp_path):
    lines = [changes.get(n, text) for n, text in enumerate(LINES, 1)]
    with pytest.raises(UserError, match=rf"t\.csv, line {line}: a quote .* is not closed"):
        read_text("\n".join(lines) + "\n", tmp_path)


@pytest.mark.parametrize(
    ("text", "separator", "captions"),
    [
        (
            'filepath,title\nimg/1.jpg,"see\nimg/2.jpg, and more"\nimg/2.jpg,two\n',
            ",",
            ["see\nimg/2.jpg, and more", "two"],
        ),
        ('filepath\ttitle\nid1\t"one\nid2\ttwo"\nid3\t3\n', "\t", ["one\nid2\ttwo", "3"]),
        ('title\tfilepath\n"a\tb\nc"\t1.png\n', "\t", ["a\tb\nc"]),
    ],
)
def test_a_field_whose_lines_may_be_rows_is_told(text, separator, captions, tmp_path):
    table = read_text(text, tmp_path, separator)
    assert table.captions == captions
    assert len(table.notes) == 1 and "1 quoted fields hold lines like rows, line 2 is the first" in table.notes[0]


@pytest.mark.parametrize("separator", [",", "\t"])
@pytest.mark.parametrize("index", [[0, 1, 2], ["a", "b", "c"]])
def test_a_first_column_without_a_name(index, separator, tmp_path):
    """pandas takes it for the index."""
    captions = ["one", 'two"\nlines', "1, 2\t3"]
    rows = pd.DataFrame({"filepath": ["1.png", "2.png", "3.png"], "title": captions}, index=index)
    rows.to_csv(tmp_path / "t.csv", sep=separator, index_label=False)
    table = read(tmp_path / "t.csv", separator)
    assert (
        rows_of(table) == stock_rows(tmp_path / "t.csv", separator) == list(zip(rows.filepath, captions, strict=True))
    )
    assert len(table.notes) == 1 and "the first column has no name" in table.notes[0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("filepath,title,url\n0,1.png,a,x\n2.png,b,y\n", "line 3 has 3 fields and the header 4"),
        ("filepath,title\nx1,a, b\nx2,c\n", "line 3 has 2 fields and the header 3 with the first, which has no name"),
        ('filepath,title\n0,1.png,"a\n1,2.png,b"\n', "line 2: a quote opens a field"),
        ("filepath,title\n1.png,a\n2.png,a, b\n", "line 3 has 3 fields and the header 2"),
        ("filepath,title\n1.png,a,b\n2.png,c,d\n", "line 2 has 3 fields and the header 2"),
        ("filepath,title\n1.png,a\n\n2.png\n", "line 4 has 1 fields and the header 2"),
        ("filepath,title\n1.png,a\n,b\n", "line 3 names no image"),
        ("filepath,title\n1.png,caf\xe9\n".encode("latin-1"), "line 2: the caption is not UTF-8"),
        ("filepath,caption\n1.png,a\n", "has no column 'title' .--csv-caption-key.; it has 'filepath', 'caption'"),
        ("filepath,title\n\n", "has no rows"),
        ("", "is no table .it is empty.: check the file"),
        ("\n , \n", "is no table .it is empty.: check the file"),
        ("filepath,title\n1.png,a\n".encode("utf-16"), "has no column 'filepath'"),
    ],
)
def test_lines_that_do_not_fit_are_named(text, message, tmp_path):
    with pytest.raises(UserError, match=rf"t\.csv.*{message}"):
        read_text(text, tmp_path, ",")


def test_separators_at_the_ends_of_lines(tmp_path):
    """Without a name in the header pandas takes the first column for an index."""
    table = read_text("filepath,title\n1.png,a\n2.png,b,\n3.png,c,,\n", tmp_path, ",")
    assert rows_of(table) == [("1.png", "a"), ("2.png", "b"), ("3.png", "c")]
    assert len(table.notes) == 1 and "2 lines end in a separator too many, line 3 is the first" in table.notes[0]


def test_fields_that_nobody_needs_may_be_missing(tmp_path):
    table = read_text("filepath,title,url\n1.png,a,x\n2.png,b\n", tmp_path, ",")
    assert rows_of(table) == stock_rows(tmp_path / "t.csv", ",") == [("1.png", "a"), ("2.png", "b")]
    assert "1 lines have fewer fields than the header, line 3 is the first" in table.notes[0]
    assert rows_of(read_text(",filepath,title,url\n0,1.png,a\n1,2.png,b,x\n", tmp_path, ",")) == rows_of(table)


def test_a_caption_column_of_paths(tmp_path):
    table = read_text("filepath,title\n1.png,/d/1.PNG\n2.png,/d/2.jpg\n3.png,a\n", tmp_path, ",")
    assert "'title' (--csv-caption-key), are names of images, like '/d/1.PNG'" in table.notes[0]


@pytest.mark.parametrize("separator", ["\\t", "::", r"\s*;\s*"])
def test_separators_of_several_characters(separator, tmp_path):
    """pandas takes them for patterns."""
    written = {"\\t": "\t", "::": "::", r"\s*;\s*": " ; "}[separator]
    lines = ["filepath", "title"], ["1.png", "None"], ["2.png", "007"], ["3.png", "c"]
    text = "".join(written.join(line) + "\n" for line in lines)
    table = read_text(text, tmp_path, separator)
    assert rows_of(table) == [("1.png", "None"), ("2.png", "007"), ("3.png", "c")]
    for line, message in (("4.png", "row 4 has fewer"), (written.join(["4.png", "d", "e"]), "is no table")):
        with pytest.raises(UserError, match=message):
            read_text(f"{text}{line}\n", tmp_path, separator, "bad.csv")


def test_places_that_pandas_knows(tmp_path, monkeypatch):
    text = b"filepath\ttitle\n1.png\tNA\n"
    (tmp_path / "t.csv.gz").write_bytes(gzip.compress(text))
    pd.DataFrame({"filepath": ["1.png"], "title": ["NA"]}).to_csv(tmp_path / "t.csv.zip", sep="\t", index=False)
    (tmp_path / "t.csv").write_bytes(text)
    monkeypatch.setenv("HOME", str(tmp_path))
    for path in (tmp_path / "t.csv.gz", tmp_path / "t.csv.zip", "~/t.csv", f"file://{tmp_path}/t.csv"):
        assert rows_of(read(path)) == [("1.png", "NA")], path
    with pytest.raises(UserError, match="is no table"):
        read_text(text, tmp_path, name="no.csv.gz")
    with pytest.raises(UserError, match="there is no such file"):
        read(tmp_path / "nothing.csv")


def test_a_table_that_has_changed_is_read_again(tmp_path):
    assert len(read_text("filepath\ttitle\n1.png\ta\n", tmp_path).images) == 1
    assert len(read_text("filepath\ttitle\n1.png\ta\n2.png\tb\n", tmp_path).images) == 2


def test_the_data_set_is_openclips(tmp_path):
    path = make_csv(tmp_path, rows=5)
    stock = openclip_data.CsvDataset(path, preprocess, "filepath", "title", tokenizer=tokenizer)
    ours = TableDataset(Columns(path, "\t", "filepath", "title"), preprocess, tokenizer)
    assert len(ours) == len(stock) == 5
    for (image, text), (same_image, same_text) in zip(stock, ours, strict=False):
        assert torch.equal(image, same_image) and torch.equal(text, same_text)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "LA", "1"])
def test_its_images_are_transformed_in_their_own_mode(mode, tmp_path):
    """OpenCLIP resizes before it converts."""
    noise = Image.fromarray(np.random.default_rng(1).integers(0, 256, (40, 50, 3), np.uint8))
    noise.convert(mode).save(tmp_path / "1.tiff")
    path = tmp_path / "t.csv"
    path.write_text(f"filepath\ttitle\n{tmp_path}/1.tiff\tpicture number 1\n")
    transform = open_clip.image_transform(32, is_train=False)
    stock = openclip_data.CsvDataset(str(path), transform, "filepath", "title", tokenizer=tokenizer)
    ours = TableDataset(Columns(str(path), "\t", "filepath", "title"), transform, tokenizer)
    assert torch.equal(ours[0][0], stock[0][0])


def make_deep_table(folder, bits):
    folder.mkdir()
    lines = ["filepath\ttitle"]
    for n in range(16):
        grey = np.asarray(image_of(31 * n).convert("L"))
        Image.fromarray(grey if bits == 8 else grey.astype(np.uint16) * 257).save(folder / f"{n}.png")
        lines.append(f"{folder}/{n}.png\tpicture number {n}")
    (folder / "t.csv").write_text("\n".join(lines))
    return folder / "t.csv"


def test_images_of_16_bits_give_the_tensors_of_those_of_8(tmp_path):
    columns = (Columns(str(make_deep_table(tmp_path / str(bits), bits)), "\t", "filepath", "title") for bits in (8, 16))
    eight, sixteen = (TableDataset(each, open_clip.image_transform(32, is_train=False), tokenizer) for each in columns)
    assert all(torch.equal(eight[n][0], sixteen[n][0]) for n in range(16))
    assert len({float(eight[n][0].mean()) for n in range(16)}) > 8


def good_and_bad(folder, flag, word, instead):
    """Flags of a good table and, for one of them, of one with another word in it; the path of that one."""
    good, bad = make_csv(folder, rows=16), folder / "bad.csv"
    bad.write_text(Path(good).read_text().replace(word, instead))
    return ["--train-data", good, "--val-data", good, flag, bad], bad


@pytest.mark.parametrize("loss", ["clip", "fastclip-v3"])
@pytest.mark.parametrize("flag", ["--train-data", "--val-data"])
def test_a_bad_table_ends_every_loss_before_it_begins(flag, loss, tmp_path):
    data, bad = good_and_bad(tmp_path, flag, "picture number 3", '"picture number 3')
    flags = [*TINY, "--loss", loss, *data, "--logs", tmp_path / "logs", "--name", "run"]
    run = run_cli(flags, tmp_path / "out", ranks=2)
    complaints = [line for output in run.output for line in output.splitlines() if "error" in line]
    assert run.codes == [2, 2] and len(complaints) == 1 and "Traceback" not in str(run), run
    assert f"{flag} {bad}, line 5: a quote" in complaints[0] and not (tmp_path / "logs").exists()
    found = run_forked(preflight.main, (["--", *map(str, [*TINY, "--loss", loss, *data])],), tmp_path / "out")
    assert found.codes == [2] and f"{flag} {bad}, line 5" in found.output[0], found


@pytest.mark.parametrize("loss", ["clip", "fastclip-v3"])
@pytest.mark.parametrize("flag", ["--train-data", "--val-data"])
def test_an_image_that_cannot_be_read_is_named_for_every_loss(flag, loss, tmp_path):
    data, bad = good_and_bad(tmp_path, flag, "/3.png", "/missing.png")
    run = run_cli([*TINY, "--loss", loss, *data, "--logs", tmp_path / "logs", "--name", "run"], tmp_path / "out")
    assert run.codes == [2] and "Traceback" not in str(run), run
    assert f"row 4 of {bad} ({tmp_path}/missing.png) cannot be read (FileNotFoundError" in run.output[0], run


def test_what_should_be_known_of_a_table_is_a_warning(tmp_path):
    path = Path(make_csv(tmp_path, rows=16))
    path.write_text(path.read_text().replace("number 3\n", "number 3\t\n"))
    flags = [*TINY, "--loss", "fastclip-v3", "--train-data", path, "--logs", tmp_path / "logs", "--name", "run"]
    run = run_cli(flags, tmp_path / "out", ranks=2)
    assert run.ok and str(run).count("WARNING") >= 1, run
    assert sum("WARNING" in line and "line 5 is the first" in line for line in str(run).splitlines()) == 1, run
