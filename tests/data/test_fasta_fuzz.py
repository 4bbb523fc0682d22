"""Anything at all in a FASTA file: each record is read as it stands, or a sentence says why not."""

import gzip
import re

import numpy as np
import pytest
from budgets import examples
from hypothesis import event, example, given
from hypothesis import strategies as st

from raptide.alphabet import RESIDUES, decode_sequences
from raptide.data.fasta import read_fasta
from raptide.data.fasta_text import FastaPart, split_fasta
from raptide.errors import FastaError

LETTERS = re.compile(rb"[A-Za-z]+\*?")
BLANKS = b" \t\r\n"


def read(parts):
    records = []
    for part in parts:
        for batch in read_fasta(part, batch_records=3):
            letters = decode_sequences(np.frombuffer(batch.residues, np.uint8), batch.lengths)
            records += zip(batch.names, letters, strict=True)
    return records


def plain_reading(content):
    """What the format says, without any library: the records, or None if a rule is broken."""
    if not content.startswith(b">"):
        return None
    records = []
    for block in re.split(rb"(?:^|\n)>", content)[1:]:
        header, _, lines = block.partition(b"\n")
        if b"\r" in header.rstrip(b"\r"):
            return None
        try:
            text = header.decode()
        except UnicodeDecodeError:
            text = header.decode("latin-1")
        words = re.split("[ \t\r\v\f]+", text.strip(" \t\r\v\f"))
        words = words if words[0] else []
        sequence = lines.translate(None, BLANKS)
        if not words or not LETTERS.fullmatch(sequence):
            return None
        letters = sequence.rstrip(b"*").decode().upper().replace("J", "X")
        records.append((words[0], letters))
    return records


protein = st.text("LVSERIDPKQFYMHWXBZO", min_size=1, max_size=80)  # never taken for nucleotides
tidy_line = st.one_of(protein.map(str.encode), st.sampled_from([b"mk LV\t", b"MKW\r", b"", b"J"]))
odd_line = st.one_of(
    st.sampled_from([b"", b" ", b"MK LV", b"mkwl", b"MKW*", b"*", b"MK\0W", b"MK1W", b"M-K", b">"]),
    st.sampled_from([b"MK>W", b"\xff\xfe", b"MKW\r", b"\rMKW", b"J", b"\t", b"MK\x0bW", b";x"]),
    st.binary(max_size=12).filter(lambda line: b"\n" not in line),
)
tidy_header = st.from_regex(rb"\A>[a-z0-9|_.]{1,8}( [ -~]{0,12})?\Z")
odd_header = st.sampled_from([b">", b"> ", b">a\xff b", b">a\tb", b">a>b", b">\xc2\xa0x"])


@st.composite
def contents(draw):
    """Mostly tidy records; in half of the files one to three lines are odd."""
    lines = []
    for _ in range(draw(st.integers(1, 8))):
        lines += [draw(tidy_header), draw(protein).encode()]
        lines += draw(st.lists(tidy_line, max_size=3))
    for _ in range(draw(st.integers(-3, 3))):
        place = draw(st.integers(0, len(lines)))
        lines.insert(place, draw(st.one_of(odd_line, odd_header)))
    newline = draw(st.sampled_from([b"\n", b"\n", b"\r\n"]))
    return newline.join(lines) + newline * draw(st.integers(0, 2))


@examples(500)
@given(contents(), st.integers(1, 60))
@example(b">a\r\nMKWL\r\n>b\r\nWWL\r\n", 5)
@example(b">a\nMK\n>", 4)
@example(b">a\nMKW\n>b\n>c\nMKW\n", 9)
@example(b">a\nMK\x0b\n", 5)
@example(b">a\nMK*\x0c\n", 5)
@example(b">a\nMK\x1c\x85\n", 5)
def test_every_record_is_read_as_it_stands_or_refused(tmp_path_factory, content, part_bytes):
    path = tmp_path_factory.getbasetemp() / "fuzz.fasta"
    path.write_bytes(content)
    expected = plain_reading(content)
    event("refused" if expected is None else "read")
    for parts in ([FastaPart(str(path))], split_fasta(path, part_bytes)):
        if expected is None:
            with pytest.raises(FastaError) as caught:
                read(parts)
            assert str(caught.value).startswith(f"{path}:")
            assert "\n" not in str(caught.value)
        else:
            assert read(parts) == expected


@examples(100)
@given(st.lists(protein, min_size=20, max_size=60), st.data())
def test_a_file_cut_in_the_middle_never_loses_a_record_in_silence(tmp_path_factory, proteins, data):
    path = tmp_path_factory.getbasetemp() / "cut.fasta.gz"
    text = "".join(f">r{number}\n{letters}\n" for number, letters in enumerate(proteins))
    packed = gzip.compress(text.encode())
    path.write_bytes(packed[: data.draw(st.integers(0, len(packed) - 1))])
    with pytest.raises(FastaError) as caught:
        read([FastaPart(str(path))])
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_record_of_forty_million_residues_is_one_record(tmp_path):
    path = tmp_path / "long.fasta"
    line = (RESIDUES[:20] * 3).encode() + b"\n"
    path.write_bytes(b">a\nMKWL\n>long one\n" + line * 666_667 + b">b\nWWL\n")
    for parts in ([FastaPart(str(path))], split_fasta(path, 1 << 20)):
        records = read(parts)
        assert [(name, len(letters)) for name, letters in records] == [
            ("a", 4),
            ("long", 40_000_020),
            ("b", 3),
        ]
        assert records[1][1] == RESIDUES[:20] * 2_000_001
