"""File systems that stumble: what fails at first and works then, as it does on a network."""

import errno
import os

import pyarrow as pa
import pyarrow.fs
from pyarrow.fs import LocalFileSystem

import raptide.patience


def hurry(monkeypatch):
    """No pauses between tries; returns those that would have been, in seconds."""
    pauses = []
    monkeypatch.setattr(raptide.patience.time, "sleep", pauses.append)
    return pauses


def stumbling(action, number, times):
    """`action`, whose first calls fail with an error of the operating system.

    Args:
        number: of the error.
        times: how often it fails.
    """
    calls = []

    def act(*args, **kwargs):
        calls.append(args)
        if len(calls) <= times:
            raise OSError(number, os.strerror(number))
        return action(*args, **kwargs)

    return act


class Stumbling(pyarrow.fs.FileSystemHandler):
    """A folder of this machine whose every deed fails `times` times for each path, then works."""

    def __init__(self, times, error=errno.EIO, only=()):
        self.local, self.times, self.error, self.only = LocalFileSystem(), times, error, only
        self.seen = {}

    def stumble(self, deed, path):
        if self.only and deed not in self.only:
            return
        key = (deed, path.rpartition(".")[0] if "/partial/" in path else path)
        self.seen[key] = self.seen.get(key, 0) + 1
        if self.seen[key] <= self.times:
            raise OSError(self.error, os.strerror(self.error))

    def get_type_name(self):
        return "stumbling"

    def normalize_path(self, path):
        return path

    def get_file_info(self, paths):
        self.stumble("info", paths[0])
        return self.local.get_file_info(paths)

    def get_file_info_selector(self, selector):
        self.stumble("list", selector.base_dir)
        return self.local.get_file_info(selector)

    def create_dir(self, path, recursive):
        self.stumble("create_dir", path)
        self.local.create_dir(path, recursive=recursive)

    def delete_dir(self, path):
        self.stumble("delete_dir", path)
        self.local.delete_dir(path)

    def delete_dir_contents(self, path, missing_dir_ok=False):
        raise NotImplementedError

    delete_root_dir_contents = copy_file = open_append_stream = delete_dir_contents

    def delete_file(self, path):
        self.stumble("delete_file", path)
        self.local.delete_file(path)

    def move(self, source, target):
        self.stumble("move", target)
        self.local.move(source, target)

    def open_input_stream(self, path):
        self.stumble("open", path)
        return self.local.open_input_stream(path)

    def open_input_file(self, path):
        self.stumble("open", path)
        return pa.PythonFile(Breaking(open(path, "rb"), lambda: self.stumble("read", path)), "r")

    def open_output_stream(self, path, metadata):
        self.stumble("create", path)
        return pa.PythonFile(Breaking(open(path, "wb"), lambda: self.stumble("write", path)), "w")


DEEDS = ("info", "list", "create_dir", "delete_dir", "move", "open", "read", "create", "write")


class Breaking:
    """A file that may fail in the middle."""

    def __init__(self, file, stumble):
        self.file, self.stumble = file, stumble

    def read(self, *size):
        self.stumble()
        return self.file.read(*size)

    def write(self, data):
        self.file.write(bytes(data)[:3])
        self.stumble()
        return self.file.write(bytes(data)[3:]) + 3

    def __getattr__(self, name):
        return getattr(self.file, name)


def fill(disk):
    """Take all that is left."""
    with (disk / "ballast").open("wb", buffering=0) as file:
        while True:
            try:
                file.write(bytes(1024))
            except OSError:
                break
