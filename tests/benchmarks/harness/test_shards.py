"""Folders of data: what is ours is found, anything else is refused and left as it is."""

import pytest

from benchmarks.harness.shards import find_data
from open_clip_train_fastclip.errors import UserError


def is_wanted(info):
    return info["settings"] == 1


def test_what_is_wanted_is_found_and_nothing_is_none(tmp_path):
    (tmp_path / "dataset.json").write_text('{"settings": 1}')
    assert find_data(tmp_path, is_wanted) == {"settings": 1} and find_data(tmp_path / "none", is_wanted) is None


@pytest.mark.parametrize("content", ['{"settings": 2}', "{}", "[]", "3", '{"sett', ""])
def test_anything_else_is_refused_in_one_line_and_kept(content, tmp_path):
    (tmp_path / "dataset.json").write_text(content)
    with pytest.raises(UserError, match="exists and is not the data asked for: remove it$"):
        find_data(tmp_path, is_wanted)
    assert (tmp_path / "dataset.json").read_text() == content


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is not the data asked for"):
        find_data(tmp_path / "file", is_wanted)
