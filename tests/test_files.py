"""Files that are whole or not there."""

import threading

import pytest

from dapo.files import write_whole


def test_what_cannot_be_written_leaves_what_was_there(tmp_path):
    path = tmp_path / "new" / "record.json"
    write_whole(path, "first")
    write_whole(path, "second")
    with pytest.raises(UnicodeEncodeError):
        write_whole(path, "third \ud800")
    assert path.read_text() == "second"
    assert list(path.parent.iterdir()) == [path]


def test_several_writers_and_a_reader_never_see_a_part(tmp_path):
    path = tmp_path / "record.json"
    texts = {letter * 200_000 for letter in "abcd"}
    write_whole(path, "a" * 200_000)
    writers = [threading.Thread(target=lambda t=text: [write_whole(path, t) for _ in range(20)]) for text in texts]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        assert path.read_text() in texts
    assert list(tmp_path.iterdir()) == [path]
