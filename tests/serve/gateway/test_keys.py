import hashlib
import os
import subprocess
import sys
import threading
import time

import pytest
from conftest import ROOT

from raptide.errors import ConfigError
from serve.gateway import keys
from serve.gateway.deployment import check_ports
from serve.gateway.keys import KeyRing, Rate, make_key, parse_keys


@pytest.fixture
def at_once(monkeypatch):
    monkeypatch.setattr(keys, "LOOK_AGAIN_S", 0.0)
    monkeypatch.setattr(keys, "SETTLE_S", 0.0)
    monkeypatch.delenv(keys.ENVIRONMENT, raising=False)


def test_several_named_keys_with_rates_and_comments():
    (key, line), (_, other) = make_key("team-a"), make_key("notebook")
    found = parse_keys(f"# ours\n\n{line} 5000  # fast\n{other}\n", "keys")
    assert [(each.name, each.residues_per_minute) for each in found] == [
        ("team-a", 5000),
        ("notebook", None),
    ]
    assert found[0].digest == hashlib.sha256(key.encode()).digest()
    assert key not in line


@pytest.mark.parametrize("line", ["team-a", "a sha256:12", "a md5:" + "0" * 64, "rpt_secret"])
def test_a_wrong_line_is_named_and_not_repeated(line):
    with pytest.raises(ConfigError, match="keys, line 2: a key is") as caught:
        parse_keys(f"# head\n{line}\n", "keys")
    assert "rpt_secret" not in str(caught.value)


def test_keys_are_found_and_revoked_while_the_file_changes(tmp_path, at_once):
    (first, line), (second, other) = make_key("a"), make_key("b")
    file = tmp_path / "keys"
    file.write_text(f"{line}\n{other}\n")
    ring = KeyRing(file)
    assert (ring.find(first).name, ring.find(second).name) == ("a", "b")
    assert ring.find("rpt_wrong") is None
    assert ring.find("") is None
    file.write_text(f"{other}\n")
    assert ring.find(first) is None
    assert ring.find(second).name == "b"
    file.write_text("half a li")
    assert ring.find(second).name == "b", "a file that is being written locks nobody out"
    file.write_text("")
    assert ring.find(second) is None
    assert ring, "without any key left, keys are still asked for"


@pytest.mark.parametrize("cut", ["", "# empty so far\n", "one line", "not UTF-8"])
def test_a_file_that_is_being_rewritten_locks_nobody_out(tmp_path, at_once, monkeypatch, cut):
    monkeypatch.setattr(keys, "SETTLE_S", 0.3)
    (first, line), (second, other), (third, more) = map(make_key, "abc")
    file = tmp_path / "keys"
    file.write_text(f"{line}\n{other}\n")
    ring = KeyRing(file)
    assert ring.find(first)
    half = {"one line": f"{line}\n".encode(), "not UTF-8": b"\xff\xfe\x00"}
    file.write_bytes(half.get(cut, cut.encode()))
    assert ring.find(second).name == "b", "what is half written may be whole in a moment"
    file.write_text(f"{line}\n{other}\n{more}\n")
    assert ring.find(third).name == "c", "what has grown counts at once"
    file.write_text(f"{line}\n")
    assert ring.find(second)
    time.sleep(0.4)
    assert ring.find(second) is None, "what stays away was revoked"
    assert ring.find(first)


def test_a_watched_file_is_read_by_a_thread_of_its_own_and_holds_nobody_up(tmp_path, monkeypatch):
    monkeypatch.setattr(keys, "LOOK_AGAIN_S", 0.01)
    monkeypatch.setattr(keys, "SETTLE_S", 0.0)
    (first, line), (second, other) = make_key("a"), make_key("b")
    file = tmp_path / "keys"
    file.write_text(line)
    ring = KeyRing(file)
    reading, may_go_on = threading.Event(), threading.Event()
    read = keys._text_of

    def read_slowly(path):
        reading.set()
        assert may_go_on.wait(60)
        return read(path)

    monkeypatch.setattr(keys, "_text_of", read_slowly)
    ring.watch()
    file.write_text(f"{line}\n{other}\n")
    assert reading.wait(60)
    assert ring.find(first), "nobody waits for the file system"
    assert ring.find(second) is None
    may_go_on.set()
    until = time.monotonic() + 30
    while ring.find(second) is None:
        assert time.monotonic() < until
        time.sleep(0.01)


def test_keys_come_from_the_environment_too(tmp_path, at_once, monkeypatch):
    (first, line), (second, other) = make_key("a"), make_key("b")
    monkeypatch.setenv(keys.ENVIRONMENT, f"{line};{other} 60")
    ring = KeyRing(None)
    assert ring.find(first).name == "a"
    assert ring.find(second).residues_per_minute == 60
    monkeypatch.delenv(keys.ENVIRONMENT)
    assert not KeyRing(None)


def test_a_missing_file_is_an_error_at_the_start(tmp_path, at_once):
    with pytest.raises(ConfigError, match=r"no-keys cannot be read .*python -m serve\.keys"):
        KeyRing(tmp_path / "no-keys")


def test_a_rate_is_used_up_overdrawn_once_and_fills_again():
    rate = Rate(60_000)
    assert rate.take(59_000) == 0
    assert rate.take(2_000) == 0, "a request may overdraw what is left"
    wait_s = rate.take(1)
    assert 0.5 < wait_s < 1.5
    time.sleep(wait_s)
    assert rate.take(1) == 0


def test_a_key_is_made_on_the_command_line():
    command = [sys.executable, "-m", "serve.keys", "team-a"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "platform")}
    output = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    ).stdout
    line = next(line.strip() for line in output.splitlines() if "sha256:" in line)
    key = next(line.strip() for line in output.splitlines() if line.strip().startswith("rpt_"))
    assert parse_keys(line, "output")[0].digest == hashlib.sha256(key.encode()).digest()


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "127.8.8.8", None])
def test_the_loopback_needs_no_keys(host):
    check_ports(host, haproxy=False, grpc=False)


@pytest.mark.parametrize(
    ("host", "haproxy", "grpc", "why"),
    [
        ("0.0.0.0", False, False, "http_options.host is 0.0.0.0"),
        ("10.1.2.3", False, False, "http_options.host is 10.1.2.3"),
        ("::", False, False, "http_options.host is ::"),
        ("serve.example", False, False, "serve.example"),
        ("127.0.0.1", True, False, "HAProxy listens on every interface"),
        ("127.0.0.1", False, True, "gRPC listens on every interface"),
    ],
)
def test_off_the_loopback_keys_are_needed(host, haproxy, grpc, why):
    with pytest.raises(ConfigError, match=rf"API keys are needed, but .*{why}.*serve\.keys NAME"):
        check_ports(host, haproxy, grpc)
