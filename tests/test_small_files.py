"""Small files on disks that are full, of writers that were killed."""

import errno
import json
import os
from pathlib import Path

import pytest
from storages import small_disk
from stumbles import fill, hurry, stumbling

from raptide.patience import TRIES
from raptide.small_files import LinesFile, read_lines, write_whole


@pytest.mark.parametrize("torn", [b"", b'{"step": 2, "lo', b"\0" * 40, b"3\n", b'{"step": 2}'])
def test_a_torn_end_costs_no_line_before_or_behind_it(tmp_path, torn):
    file = tmp_path / "lines.jsonl"
    file.write_bytes(b'{"step": 1}\n' + torn)
    lines = LinesFile(file, pytest.fail)
    lines.write({"step": 3})
    lines.write({"step": 4})
    lines.close()
    whole = [{"step": 2}] if torn.endswith(b"}") else []
    assert list(read_lines(file)) == [{"step": 1}, *whole, {"step": 3}, {"step": 4}]
    assert b"\n\n" not in file.read_bytes()
    assert list(read_lines(tmp_path / "none")) == []


def test_a_full_disk_loses_lines_says_so_once_and_goes_on_when_there_is_room(tmp_path):
    warnings = []
    with small_disk(tmp_path / "disk", 1) as disk:
        lines = LinesFile(disk / "lines.jsonl", warnings.append)
        lines.write({"step": 0})
        fill(disk)
        for step in range(1, 400):
            lines.write({"step": step, "text": "x" * 100})
        (disk / "ballast").unlink()
        lines.write({"step": 400})
        lines.close()
        steps = [line["step"] for line in read_lines(disk / "lines.jsonl")]
    (sentence,) = warnings
    assert sentence.endswith("loses lines (No space left on device); make room for it.")
    assert steps == [*range(len(steps) - 1), 400]
    assert len(steps) < 400


def test_a_small_file_is_replaced_whole_or_stays_as_it_was(tmp_path):
    with small_disk(tmp_path / "disk", 1) as disk:
        write_whole(disk / "run.json", "before")
        fill(disk)
        with pytest.raises(OSError, match="No space left"):
            write_whole(disk / "run.json", json.dumps(list(range(9999))))
        assert (disk / "run.json").read_text() == "before"
        assert {path.name for path in disk.iterdir()} == {"run.json", "ballast"}


def test_what_stumbles_is_written_at_a_later_try(tmp_path, monkeypatch):
    hurry(monkeypatch)
    monkeypatch.setattr(os, "fsync", stumbling(os.fsync, errno.EIO, TRIES - 1))
    write_whole(tmp_path / "a.json", "{}")
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_lines_are_read_patiently_to_their_end(tmp_path, monkeypatch):
    """Where opening succeeds and reading does not."""
    hurry(monkeypatch)
    file = tmp_path / "lines.jsonl"
    file.write_text("".join(f'{{"step": {number}}}\n' for number in range(200_000)))
    expected, opened = list(read_lines(file)), Path.open
    calls = []

    class Weak:
        def __init__(self, file):
            self._file = file

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self._file.close()

        def __getattr__(self, name):
            return getattr(self._file, name)

        def readlines(self, size):
            calls.append(size)
            if len(calls) % 2:
                raise OSError(errno.EIO, "Input/output error")
            return self._file.readlines(size)

    monkeypatch.setattr(Path, "open", lambda path, mode: Weak(opened(path, mode)))
    assert list(read_lines(file)) == expected
    assert len(calls) > 6
