"""Downloads from a local server that breaks connections, forgets ranges and sends damage."""

import gzip
import hashlib
import random
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from conftest import ROOT

from raptide.data.building import fetch as fetch_module
from raptide.data.building.fetch import fetch, find_file
from raptide.data.fasta import read_fasta
from raptide.errors import FetchError

NAME = "/uniref/uniref50/uniref50.fasta.gz"
FASTA = b"".join(b">UniRef50_P%d n=1\nMKLVWWFFYYARNDCQEGHI\n" % i for i in range(5000))
CONTENT = gzip.compress(FASTA, 1)


class Server(ThreadingHTTPServer):
    """Serves `files`; each request may be cut short or damaged by what `mishaps` says."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = {}
        self.listed = {}
        self.mishaps = []
        self.ranges = True
        self.requests = []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"

    def put(self, name, content, md5=None, size=None):
        folder, _, file = name.rpartition("/")
        self.files[name] = content
        self.listed.setdefault(folder, {})[file] = f"""<file name="{file}">
            <size>{len(content) if size is None else size}</size><verification>
            <hash type="md5">{md5 or hashlib.md5(content).hexdigest()}</hash>
            </verification></file>"""
        self.files[f"{folder}/RELEASE.metalink"] = f"""<?xml version="1.0"?>
            <metalink xmlns="http://www.metalinker.org/" version="3.0">
              <version>2026_04</version><files><file name="other"/>
              {"".join(self.listed[folder].values())}</files></metalink>""".encode()


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        server = self.server
        server.requests.append((self.path, self.headers.get("Range")))
        content = server.files.get(self.path)
        if content is None:
            return self.send_error(404)
        asked = re.match(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(asked[1]) if asked and server.ranges else 0
        self.send_response(206 if asked and server.ranges else 200)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        mishap = server.mishaps.pop(0) if server.mishaps and "metalink" not in self.path else None
        self.wfile.write(content[start:] if mishap is None else content[start : start + mishap])
        if mishap is not None:
            self.wfile.flush()
            self.connection.close()

    def do_HEAD(self):
        content = self.server.files.get(self.path)
        if content is None:
            return self.send_error(404)
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{hashlib.md5(content).hexdigest()}"')
        self.end_headers()

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(fetch_module, "FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(fetch_module, "LONGEST_PAUSE_S", 0.02)
    server = Server()
    server.put(NAME, CONTENT)
    yield server
    server.shutdown()


def downloads(server):
    return [asked for path, asked in server.requests if path == NAME]


def test_broken_connections_cost_no_byte_that_has_arrived(server, tmp_path):
    server.mishaps = [1000, 0, 5000]
    file = fetch(find_file(server.url + NAME), tmp_path)
    assert file.read_bytes() == CONTENT
    assert downloads(server) == ["bytes=0-", "bytes=1000-", "bytes=1000-", "bytes=6000-"]
    assert [path.name for path in tmp_path.iterdir()] == ["uniref50.fasta.gz"]


def test_a_server_without_ranges_starts_from_the_beginning(server, tmp_path):
    server.ranges = False
    server.mishaps = [3000]
    assert fetch(find_file(server.url + NAME), tmp_path).read_bytes() == CONTENT


def test_a_server_that_gives_nothing_is_given_up_and_gone_on_with_later(server, tmp_path):
    server.mishaps = [2000] + [0] * fetch_module.ATTEMPTS
    remote = find_file(server.url + NAME)
    assert remote.release == "2026_04"
    with pytest.raises(FetchError, match=r"goes on after 2,000 of [\d,]+ bytes"):
        fetch(remote, tmp_path)
    assert not (tmp_path / "uniref50.fasta.gz").exists()
    assert fetch(remote, tmp_path).read_bytes() == CONTENT
    assert downloads(server)[-1] == "bytes=2000-"
    before = len(downloads(server))
    fetch(remote, tmp_path)
    assert len(downloads(server)) == before, "what is there is not fetched again"


def test_a_wrong_checksum_leaves_nothing(server, tmp_path):
    server.put(NAME, CONTENT, md5="0" * 32)
    with pytest.raises(FetchError, match=f"arrived damaged: expected MD5 {'0' * 32}, found"):
        fetch(find_file(server.url + NAME), tmp_path)
    assert not list(tmp_path.iterdir())


def test_another_release_is_never_gone_on_with(server, tmp_path):
    server.mishaps = [2000] + [0] * fetch_module.ATTEMPTS
    with pytest.raises(FetchError):
        fetch(find_file(server.url + NAME), tmp_path)
    newer = gzip.compress(FASTA + b">new\nMK\n", 1)
    server.put(NAME, newer)
    assert fetch(find_file(server.url + NAME), tmp_path).read_bytes() == newer
    assert downloads(server)[-1] == "bytes=0-"
    assert [path.name for path in tmp_path.iterdir()] == ["uniref50.fasta.gz"]


@pytest.mark.parametrize("problem", ["absent", "garbled", "unlisted", "down"])
def test_a_metalink_that_says_nothing_is_an_error_in_one_sentence(server, problem):
    url = server.url + NAME
    metalink = NAME.rpartition("/")[0] + "/RELEASE.metalink"
    if problem == "absent":
        del server.files[metalink]
    elif problem == "garbled":
        server.files[metalink] = b"<metalink"
    elif problem == "unlisted":
        url = url.replace("uniref50.fasta", "uniref51.fasta")
    else:
        url = "http://127.0.0.1:9" + NAME
    with pytest.raises(FetchError, match=r"RELEASE.metalink (cannot be read|does not give)"):
        find_file(url)


def test_a_disk_that_is_too_small_is_found_before(server, tmp_path):
    server.put(NAME, CONTENT, size=1 << 60)
    with pytest.raises(FetchError, match="GB are still to come"):
        fetch(find_file(server.url + NAME), tmp_path)


def job(*arguments):
    return subprocess.run(
        [sys.executable, ROOT / "jobs/fetch_corpus.py", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_the_job_fetches_unpacks_and_says_what_comes_next(server, tmp_path):
    server.mishaps = [1000]
    done = job("uniref50", "--mirror", server.url, "--output", tmp_path, "--unpack")
    assert done.returncode == 0, done.stderr
    assert "UniProt release 2026_04" in done.stdout
    assert f"build_corpus.py --input {tmp_path}/uniref50.fasta --output" in done.stdout
    names = [name for batch in read_fasta(tmp_path / "uniref50.fasta") for name in batch.names]
    assert len(names) == 5000
    assert sorted(p.name for p in tmp_path.iterdir()) == ["uniref50.fasta", "uniref50.fasta.gz"]


def member(name, tag="member"):
    return (
        f'<{tag}><dbReference type="UniParc ID" id="y">'
        f'<property type="UniRef100 ID" value="UniRef100_{name}"/>'
        f'<property type="UniRef90 ID" value="UniRef90_{name[0]}"/></dbReference></{tag}>'
    )


XML = (
    '<?xml version="1.0" encoding="ISO-8859-1" ?><UniRef50 xmlns="http://uniprot.org/uniref">'
    f'<entry id="UniRef50_A">{member("A", "representativeMember")}{member("UPI01")}</entry>'
    f'<entry id="UniRef50_B">{member("UPI02", "representativeMember")}{member("UPI02")}</entry>'
    "</UniRef50>"
)


@pytest.mark.parametrize(
    ("source", "table", "expected"),
    [
        (
            "uniref50-members",
            "uniref50_members.tsv.gz",
            ["A\tUniRef100_A", "A\tUniRef100_UPI01", "B\tUniRef100_UPI02"],
        ),
        (
            "uniref50-members90",
            "uniref50_members90.tsv.gz",
            ["A\tUniRef90_A", "A\tUniRef90_U", "B\tUniRef90_U"],
        ),
    ],
)
def test_members_become_a_cluster_table_also_those_of_uniparc_alone(
    server, tmp_path, source, table, expected
):
    server.put("/uniref/uniref50/uniref50.xml.gz", gzip.compress(XML.encode()))
    done = job(source, "--mirror", server.url, "--output", tmp_path)
    assert done.returncode == 0, done.stderr
    lines = gzip.decompress((tmp_path / table).read_bytes()).decode().splitlines()
    assert lines == [f"UniRef50_{line}" for line in expected]
    assert f"--clusters {tmp_path}/{table} --unclustered drop" in done.stdout


def test_xml_that_is_cut_short_leaves_no_table(server, tmp_path):
    server.put("/uniref/uniref50/uniref50.xml.gz", gzip.compress(XML[:-20].encode()))
    done = job("uniref50-members", "--mirror", server.url, "--output", tmp_path)
    assert done.returncode == 1
    assert "uniref50_members.tsv.gz cannot be written (this is no whole XML" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["uniref50.xml.gz"]


def test_uniparc_comes_in_all_its_files_and_is_built_as_the_paper_did(server, tmp_path):
    folder = "/current_release/uniparc/fasta/active"
    for number in (1, 2, 10):
        text = f">UPI00000000{number:02} status=active\nMKLV\n".encode()
        server.put(f"{folder}/uniparc_active_p{number}.fasta.gz", gzip.compress(text))
    server.put(f"{folder}/README", b"no FASTA")
    done = job("uniparc", "--mirror", server.url, "--output", tmp_path, "--unpack")
    assert done.returncode == 0, done.stderr
    assert len(list(tmp_path.glob("uniparc_active_p*.fasta"))) == 3
    assert not (tmp_path / "README").exists()
    # 1 million of 250 million
    command = f"--input {tmp_path}/uniparc_active_p*.fasta --holdout-fraction 0.004 --output"
    assert command in done.stdout


def test_the_authors_lists_are_fetched_counted_and_gone_on_with(server, tmp_path):
    name = "uniref201803_ur50_valid_headers.txt.gz"
    rng = random.Random(1)
    names = [f"UniRef50_A0A{rng.getrandbits(40):010X}\n" for _ in range(3000)]
    server.files[f"/{name}"] = gzip.compress("".join(names).encode())
    server.mishaps = [500]
    done = job("heldout-ur50", "--mirror", server.url, "--output", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "3,000 names" in done.stdout
    assert f"--holdout-fraction 0 --holdout-clusters {tmp_path}/{name} " in done.stdout
    asked = [asked for path, asked in server.requests if path == f"/{name}"]
    assert asked == ["bytes=0-", "bytes=500-"]
    server.files[f"/{name}"] = server.files[f"/{name}"][:-500]
    damaged = job("heldout-ur50", "--mirror", server.url, "--output", tmp_path)
    assert damaged.returncode == 1
    assert "What arrived is no list of names" in damaged.stderr
    assert not list(tmp_path.iterdir())


def test_an_unknown_source_and_a_dead_server_are_told_in_one_sentence(tmp_path):
    unknown = job("uniref51", "--output", tmp_path)
    assert unknown.returncode == 2
    assert "invalid choice" in unknown.stderr
    dead = job("demo", "--mirror", "http://127.0.0.1:9", "--output", tmp_path)
    assert dead.returncode == 1
    assert dead.stderr.startswith("error: http://127.0.0.1:9/current_release/")
    assert len(dead.stderr.strip().splitlines()) == 1
