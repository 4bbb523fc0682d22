import bz2
import contextlib
import errno
import gzip
import lzma
import os
import random
import threading

import numpy as np
import pytest
from backports import zstd
from draws import generator, random_sequence
from hypothesis import given
from hypothesis import strategies as st
from stumbles import hurry, stumbling

from raptide.alphabet import RESIDUES, decode_residues, decode_sequences
from raptide.data import fasta_text
from raptide.data.building.membership import read_membership
from raptide.data.fasta import FLAWS, ReadingRules, locate, read_fasta
from raptide.data.fasta_text import FastaPart, split_fasta
from raptide.errors import FastaError, StorageStumbled
from raptide.patience import TRIES

PROTEINS = ">a first\nMKTLLILAVVAAALAQPWER\n>b\nGSHMLEDPVAFYWRKDEQ\n"


def read(path, **kwargs):
    """Every record as (name, description, letters)."""
    records = []
    for batch in read_fasta(path, **kwargs):
        letters = decode_sequences(np.frombuffer(batch.residues, np.uint8), batch.lengths)
        records += zip(batch.names, batch.descriptions, letters, strict=True)
    return records


@pytest.fixture
def write(tmp_path):
    def write(content, name="a.fasta"):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


@pytest.mark.parametrize(
    "compress", [bytes, gzip.compress, bz2.compress, lzma.compress, zstd.compress]
)
def test_compression_is_told_by_content(write, compress):
    assert read(write(compress(PROTEINS.encode()))) == [
        ("a", "first", "MKTLLILAVVAAALAQPWER"),
        ("b", "", "GSHMLEDPVAFYWRKDEQ"),
    ]


def test_lower_case_stops_j_and_line_breaks(write):
    assert read(write(">x\r\nmkt\r\n\r\nJl*\r\n")) == [("x", "", "MKTXL")]


@pytest.mark.parametrize("compress", [gzip.compress, bz2.compress, lzma.compress, zstd.compress])
def test_several_compressed_streams_in_one_file_are_all_read(write, compress):
    parts = PROTEINS.encode().partition(b">b")
    packed = compress(parts[0]) + compress(parts[1] + parts[2])
    assert [record[0] for record in read(write(packed))] == ["a", "b"]


names = st.text("abcXYZ0129_|.:", min_size=1)
sequences = st.text(RESIDUES[:25], min_size=1, max_size=200).filter(
    lambda s: sum(c in "ACGTUN" for c in s) < 0.9 * len(s)
)


@given(st.lists(st.tuples(names, sequences), min_size=1, max_size=20), st.integers(1, 70))
def test_records_come_back_as_written(tmp_path_factory, records, width):
    path = tmp_path_factory.mktemp("fasta") / "x.fasta"
    with path.open("w") as file:
        for name, letters in records:
            lines = [letters[i : i + width] for i in range(0, len(letters), width)]
            file.write(f">{name} text\n" + "\n".join(lines) + "\n")
    assert read(path, batch_records=3) == [(name, "text", letters) for name, letters in records]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", ":1: the file is empty"),
        (b"hello\n>a\nMK\n", ":1: text before the first > line .'hello'."),
        (b"\n\n>a\nMK\n", ":1: a blank line before the first > line"),
        (b"\xef\xbb\xbf>a\nMK\n", ":1: the file starts with a byte-order mark"),
        (b">a\rMK\r>b\rMK\r", ":1: a header holds a CR, so lines end with CR alone"),
        (">a\nMKéL\n".encode(), ":1: record 'a': .*position 3 holds 'é'"),
        (b">a\nMK\n>b\n>c\nMK\n", ":3: the record 'b' has no residues"),
        (b">a\nMK\n>b c\n", ":3: the record 'b' has no residues"),
        (b">a\nMK\n>b\n*\n", ":3: the record 'b' has no residues"),
        (b">a\nMK\n>\nMK\n", ":3: a record needs a name"),
        (b">a\nMK\n>b\nMKL\nM1K\n", ":3: record 'b': .*position 5 holds '1'"),
        (b">a\nM-K\n", ":1: record 'a': .*position 2 holds '-'"),
        (b">a\nMK\0L\n", "the character 0x00"),
        (b">a\nACGTACGTNNACGTACGTACGTTTTA\n", ":1: these are nucleotides"),
        (b"@read\nACGT\n+\nIIII\n", ":1: this is FASTQ"),
        (bytes(range(256)), ":1: this is a binary file"),
        (gzip.compress(PROTEINS.encode() * 5000)[:-40], "cut short|damaged|decompressed"),
    ],
)
def test_what_is_no_protein_fasta_gets_one_sentence_with_file_and_line(write, content, message):
    path = write(content)
    with pytest.raises(FastaError, match=message) as caught:
        read(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_and_a_missing_file_are_refused(tmp_path):
    with pytest.raises(FastaError, match="is a folder"):
        read(tmp_path)
    with pytest.raises(FastaError, match="not there"):
        read(tmp_path / "none")


def test_a_header_that_is_not_utf8_is_read(write):
    assert read(write(b">a\xff b\nMKL\n"))[0][2] == "MKL"


def outcome(path, **rules):
    """(name, letters, flaw) of each record under some rules."""
    records = []
    for batch in read_fasta(path, rules=ReadingRules(**rules)):
        ends = np.cumsum(batch.lengths)
        flaws = [FLAWS[flaw] for flaw in batch.flaws]
        for name, end, length, flaw in zip(batch.names, ends, batch.lengths, flaws, strict=True):
            residues = np.frombuffer(batch.residues, np.uint8)[end - length : end]
            records.append((name, "" if flaw else decode_residues(residues), flaw))
    return records


def in_parts(path, part_bytes):
    return [each for part in split_fasta(path, part_bytes) for each in read(part)]


@pytest.mark.parametrize("at", [0, 1, 40, 99])
def test_a_cr_in_a_header_is_refused_with_its_line_in_every_part(write, at):
    records = [f">r{n}\n{'MKWLV' * 9}\n" for n in range(100)]
    records[at] = f">r{at}\rMKWLVMKWLV\rMK\nGSH\n"
    path = write("".join(records))
    for part_bytes in (1 << 20, 700):
        with pytest.raises(FastaError, match=rf":{2 * at + 1}: a header holds a CR"):
            in_parts(path, part_bytes)


def test_a_cr_at_the_end_of_headers_and_within_sequences_is_white_space(write):
    assert read(write(b">a x\r\nMK\rLV\r\n>b\r\r\nMKW\r")) == [("a", "x", "MKLV"), ("b", "", "MKW")]


@pytest.mark.parametrize("name", ["a.fasta", "a.fasta.gz", "a.fasta.xz", "a.bz2", "a.zst"])
@pytest.mark.parametrize(
    "compress", [bytes, gzip.compress, bz2.compress, lzma.compress, zstd.compress]
)
def test_a_name_says_nothing_about_compression(write, compress, name):
    assert [record[0] for record in read(write(compress(PROTEINS.encode()), name))] == ["a", "b"]


SKIPPABLE = b"\x5a\x2a\x4d\x18" + (5).to_bytes(4, "little") + b"12345"


@pytest.mark.parametrize(
    "content",
    [
        gzip.compress(PROTEINS.encode()) + b"\0" * 700,
        lzma.compress(PROTEINS.encode()) + b"\0" * 512,
        gzip.compress(b"") + b"\0\0" + gzip.compress(PROTEINS.encode()),
        SKIPPABLE + zstd.compress(PROTEINS.encode()) + SKIPPABLE,
        SKIPPABLE + zstd.compress(PROTEINS[:30].encode()) + zstd.compress(PROTEINS[30:].encode()),
    ],
)
def test_padding_empty_members_and_skippable_frames_are_passed_over(write, content):
    assert [record[0] for record in read(write(content))] == ["a", "b"]


def zstd_with_checksum(content):
    """As the command writes it; without one, zstd cannot know what letters were."""
    return zstd.compress(content, options={zstd.CompressionParameter.checksum_flag: 1})


@pytest.mark.parametrize(
    "compress", [gzip.compress, bz2.compress, lzma.compress, zstd_with_checksum]
)
@pytest.mark.parametrize("change", ["tail", "cut", "flipped", "other"])
def test_damage_to_a_compressed_file_is_one_sentence(write, compress, change):
    letters = "".join(generator().choice(list("MKWLVSERTI"), 60_000))
    content = bytearray(compress(f">a\n{letters}\n".encode()))
    if change == "tail":
        content += b"something else"
    elif change == "cut":
        del content[len(content) // 2 :]
    elif change == "flipped":
        content[len(content) // 2] ^= 0x10
    else:
        content += b">b\nMKWLV\n"
    path = write(bytes(content))
    with pytest.raises(FastaError) as caught:
        read(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_headers_that_are_no_utf8_stay_different(write):
    path = write(b">caf\xe9 x\nMKL\n>caf\xe8 x\nMKV\n>caf\xc3\xa9 y\nMKI\n")
    (batch,) = read_fasta(path)
    assert batch.names == ["café", "cafè", "café"]  # Latin-1, Latin-1, UTF-8
    assert batch.latin1.tolist() == [True, True, False]


def test_only_blanks_end_a_name(write):
    assert read(write(">a\u00a0b\tc d\nMKL\n".encode())) == [("a\u00a0b", "c d", "MKL")]


def test_stops_are_refused_dropped_or_split(write):
    path = write(">a\nMKLV\n>b x\nMKW*WWL.\n>c\nMKV**\n>d\n**\n>e\nMM1\n")
    with pytest.raises(FastaError, match=r":3: record 'b'.*position 4 holds '\*'.*--stop-codons"):
        outcome(path)
    with pytest.raises(FastaError, match=r":9: record 'e'.*position 3 holds '1'.*--bad-letters"):
        outcome(path, stop_codons="drop")
    stop, bad = ("", "stop_codon"), ("", "bad_letters")
    assert outcome(path, stop_codons="drop", bad_letters="drop") == [
        ("a", "MKLV", ""),
        *(("b", *stop), ("c", *stop), ("d", *stop), ("e", *bad)),
    ]
    assert outcome(path, stop_codons="split", bad_letters="drop") == [
        ("a", "MKLV", ""),
        *(("b/1-3", "MKW", ""), ("b/5-7", "WWL", ""), ("c", "MKV", "")),
        *(("d", *stop), ("e", *bad)),
    ]


SEQRES = (
    ">1a_A mol:na length:12 DNA\nCGCAAATTTGCG\n>1b_A mol:protein length:9 X\nGAGAGAGAGA\n"
    ">1c_A mol:protein\nMKWLV\n"
)


def test_nucleotides_are_refused_dropped_or_let_in(write):
    path = write(SEQRES)
    with pytest.raises(FastaError, match=r":1: this chain is of nucleotides.*--nucleotides drop"):
        outcome(path)
    flaws = [flaw for *_, flaw in outcome(path, nucleotides="drop")]
    assert flaws == ["nucleotides", "", ""]
    assert [flaw for *_, flaw in outcome(path, nucleotides="keep")] == ["", "", ""]
    late = write(">p\nMKWLVSERTI\n" * 5000 + SEQRES, "late.fasta")
    with pytest.raises(FastaError, match=":10001: this chain is of nucleotides"):
        outcome(late)


@pytest.mark.parametrize("letters", ["GA" * 30, "N" * 40])
def test_a_protein_that_looks_like_dna_can_be_let_in(write, letters):
    path = write(f">poly\n{letters}\n")
    with pytest.raises(FastaError, match="keep to take them for proteins"):
        outcome(path)
    assert outcome(path, nucleotides="keep") == [("poly", letters, "")]


def test_the_place_of_a_record_is_found_again(write):
    rules = ReadingRules(stop_codons="split")
    path = write(">a\nMK\nLV\n>b\nMK*WW\n>c\nMK\n")
    assert [locate(FastaPart(str(path)), index, rules) for index in range(4)] == [
        *(("a", 1), ("b/1-2", 4), ("b/4-5", 4), ("c", 6))
    ]


@pytest.mark.parametrize("piece_bytes", [1, 2, 3, 7, 20, 64])
@pytest.mark.parametrize("compress", [bytes, gzip.compress])
def test_records_are_whole_wherever_pieces_end(write, monkeypatch, piece_bytes, compress):
    monkeypatch.setattr(fasta_text, "PIECE_BYTES", piece_bytes)
    lengths = generator().integers(1, 40, 60)
    expected = [(f"r{n}", f"caf\xe9 > {n}", "W" * int(size)) for n, size in enumerate(lengths)]
    text = "".join(f">{name} {rest}\r\n{letters}\n\n" for name, rest, letters in expected)
    path = write(compress(text.encode("latin-1")))
    assert read(path) == expected
    (tmp := path.with_name("bad.fasta")).write_bytes(compress((text + ">x\nM1\n").encode()))
    with pytest.raises(FastaError, match=r":181: record 'x'"):
        read(tmp)


@pytest.fixture
def through_pipe(tmp_path):
    """A named pipe that gives some bytes, in pieces of random sizes."""
    threads = []

    def through_pipe(content, sizes=(1, 2, 5000)):
        pipe = tmp_path / f"pipe{len(threads)}"
        os.mkfifo(pipe)

        def write():
            with contextlib.suppress(BrokenPipeError), pipe.open("wb", buffering=0) as file:
                start = 0
                while start < len(content):
                    size = rng.choice(sizes)
                    file.write(content[start : start + size])
                    start += size

        rng = random.Random(int(generator().integers(2**31)))
        threads.append(threading.Thread(target=write))
        threads[-1].start()
        return pipe

    yield through_pipe
    for thread in threads:
        thread.join(10)


@pytest.mark.parametrize(
    "compress", [bytes, gzip.compress, bz2.compress, lzma.compress, zstd.compress]
)
def test_a_pipe_is_read_once_and_told_by_its_first_bytes(write, through_pipe, compress):
    pipe = through_pipe(compress(PROTEINS.encode()), sizes=(1, 2))
    assert read(pipe) == read(write(PROTEINS))


def test_errors_in_a_pipe_name_the_line_as_in_a_file(write, through_pipe, monkeypatch):
    monkeypatch.setattr(fasta_text, "PIECE_BYTES", 512)
    rng = generator()
    for damage in ("MK1LV", "", "MK*LV"):
        records = [
            f">r{number}\n" + "\n".join(random_sequence(rng.integers(1, 40)) for _ in range(3))
            for number in range(400)
        ]
        bad = int(rng.integers(100, 400))
        records[bad] = f">bad\n{damage}"
        text = ("\n".join(records) + "\n").encode()
        file = write(text)
        with pytest.raises(FastaError) as of_file:
            read(file, batch_records=7)
        pipe = through_pipe(text)
        with pytest.raises(FastaError) as of_pipe:
            read(pipe, batch_records=7)
        assert str(of_pipe.value) == str(of_file.value).replace(str(file), str(pipe))
        assert "bad" in str(of_pipe.value)


@pytest.mark.parametrize("content", [b"", b"@read\nACGT\n", b"\n>a\nMK\n", gzip.compress(b"x\n")])
def test_what_is_no_fasta_is_refused_in_a_pipe_too(write, through_pipe, content):
    file = write(content)
    with pytest.raises(FastaError) as of_file:
        read(file)
    pipe = through_pipe(content)
    with pytest.raises(FastaError) as of_pipe:
        read(pipe)
    assert str(of_pipe.value) == str(of_file.value).replace(str(file), str(pipe))


def test_an_endless_pipe_takes_bounded_memory(tmp_path):
    record = b">a x\n" + b"MKLVWWFFYY" * 10 + b"\n"
    os.mkfifo(tmp_path / "pipe")

    def write():
        with contextlib.suppress(BrokenPipeError), (tmp_path / "pipe").open("wb") as file:
            while True:
                file.write(record * 1000)

    threading.Thread(target=write, daemon=True).start()
    stream = fasta_text.FastaStream(tmp_path / "pipe")
    batches = read_fasta(stream)
    for _ in range(100):
        next(batches)
        assert len(stream._lines) <= 2 * fasta_text.PIECE_BYTES // len(record) + 4096
    batches.close()
    assert stream.line_of(100 * 4096) == 2 * 100 * 4096 + 1


def test_a_file_that_is_needed_twice_is_no_pipe(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "-"):
        with pytest.raises(FastaError, match="can be read only once, but a FASTA file is read twi"):
            split_fasta(path)


@pytest.mark.parametrize("compress", [gzip.compress, bytes], ids=["gzip", "plain"])
def test_a_file_system_that_stumbles_is_asked_again_from_where_it_was(write, monkeypatch, compress):
    """Each of the file's reads fails at first, on a handle that is of no use any more."""
    pauses, text = (
        hurry(monkeypatch),
        "".join(f">r{n}\n{random_sequence(900)}\n" for n in range(5000)),
    )
    path = write(compress(text.encode()), "a.fasta")
    expected, asked, readv = read(path), [], os.readv

    def stumble(file, buffers):
        asked.append(os.lseek(file, 0, os.SEEK_CUR))
        if asked.count(asked[-1]) < TRIES:
            raise OSError(errno.ESTALE, "Stale file handle")
        return readv(file, buffers)

    monkeypatch.setattr(os, "readv", stumble)
    assert read(path) == expected
    assert len(set(asked)) > 2
    assert len(pauses) == (TRIES - 1) * len(set(asked))


def test_what_stumbles_on_is_no_fault_of_the_file(write, monkeypatch):
    """Else a build would give up what it has done."""
    hurry(monkeypatch)
    path = write(gzip.compress(PROTEINS.encode()), "a.fasta.gz")
    monkeypatch.setattr(os, "readv", stumbling(os.readv, errno.EIO, 10**6))
    with pytest.raises(StorageStumbled, match=r"a\.fasta\.gz cannot be read \(Input/output error"):
        read(path)
    with pytest.raises(StorageStumbled, match=r"a\.fasta\.gz cannot be read \(Input/output error"):
        list(read_membership(path))
    monkeypatch.setattr(os, "readv", stumbling(os.readv, errno.EACCES, 10**6))
    with pytest.raises(FastaError, match=r"cannot be opened \(Permission denied\)"):
        read(path)
