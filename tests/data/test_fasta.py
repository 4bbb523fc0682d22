import bz2
import gzip
import lzma

import numpy as np
import pytest
from backports import zstd
from hypothesis import given
from hypothesis import strategies as st

from raptide.alphabet import RESIDUES, decode_sequences
from raptide.data.fasta import read_fasta
from raptide.errors import FastaError

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
        (b">a\rMK\r>b\rMK\r", ":1: lines end with CR alone"),
        (">a\nMKéL\n".encode(), ":1: record 'a': .*position 3 holds 'é'"),
        (b">a\nMK\n>b\n>c\nMK\n", ":3: the record 'b' has no residues"),
        (b">a\nMK\n>b\n", ":3: the record"),
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
