"""FASTA files as sources: positions, subsets, and records that are none."""

import bz2
import gzip
import hashlib
import lzma
import re
import sys

import pytest
from budgets import examples
from hypothesis import given
from hypothesis import strategies as st

from raptide.bulk import units
from raptide.bulk.sources.fasta import REASONS, FastaFile
from raptide.bulk.sources.find import LENIENT, find_sources
from raptide.data import fasta_text
from raptide.data.fasta import EMPTY
from raptide.errors import FastaError
from raptide.storage import Storage

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

COMPRESSIONS = {"": bytes, "gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}
COMPRESSIONS["zst"] = zstd.compress


class Plain:
    def tokens(self, residues):
        return residues + 2

    def output_bytes(self, residues):
        return residues * 0 + 8


def parse(data):
    """Byte, line, name and letters of each record, the slow way."""
    found, byte, number = [], 0, 1
    for line in data.split(b"\n"):
        if line.startswith(b">"):
            try:
                header = line[1:].decode()
            except UnicodeDecodeError:
                header = line[1:].decode("latin-1")
            words = re.split(r"[ \t\r\v\f]+", header.lstrip(" \t\r\v\f"))
            found.append([byte, number, words[0], ""])
        elif found:
            found[-1][3] += line.decode().strip(" \r")
        byte += len(line) + 1
        number += 1
    return found


headers = st.one_of(
    st.just(b""),
    st.sampled_from(
        [b"NA", b"007", b"a/b'\"\\c", b"x>y z", b">>", b" late", b"\xe9t\xe9 d", b"a\tb"]
    ),
    st.text("ab>|;,.é\u2028 ", max_size=8).map(str.encode),
)
lines = st.lists(st.text("MKLVAGX", max_size=9).map(str.encode), max_size=4)
files = st.tuples(
    st.lists(st.tuples(headers, lines), min_size=1, max_size=25),
    st.sampled_from([b"\n", b"\r\n"]),
    st.booleans(),
)


def text_of(records, end, whole):
    text = b"".join(end.join([b">" + header, *lines, b""]) for header, lines in records)
    return text if whole else text[: -len(end)]


@examples(150)
@given(files, st.sampled_from(list(COMPRESSIONS)), st.integers(1, 60), st.data())
def test_positions_and_any_units_records_are_those_of_a_plain_parser(
    tmp_path, monkeypatch, file, compression, piece, data
):
    monkeypatch.setattr(fasta_text, "PIECE_BYTES", piece)
    monkeypatch.setattr(units, "LEAST_TOKENS", 20)
    text = text_of(*file)
    packed = COMPRESSIONS[compression](text)
    (tmp_path / "f").write_bytes(packed)
    source = FastaFile(Storage.of(tmp_path), "f", LENIENT)
    survey = source.survey(3, Plain())
    expected = parse(text)
    assert survey.digest == hashlib.sha256(packed).hexdigest()
    assert survey.records == len(expected)
    firsts = [unit.first for unit in survey.units]
    assert firsts == [
        0,
        *(sum(u.records for u in survey.units[: i + 1]) for i in range(len(firsts) - 1)),
    ]
    for unit in survey.units:
        assert [unit.start, unit.line] == expected[unit.first][:2]
        held = expected[unit.first : unit.first + unit.records]
        assert unit.residues == sum(len(each[3]) for each in held)
        assert unit.source == 3
    assert survey.units[-1].stop == len(text)

    chosen = data.draw(st.sets(st.sampled_from(range(len(survey.units)))))
    some = [survey.units[index] for index in sorted(chosen)]
    read = (
        [records for part in source.stretches(some) for records in source.read(part)]
        if some
        else []
    )
    for unit, records in zip(some, read, strict=True):
        held = expected[unit.first : unit.first + unit.records]
        assert records.ids == [each[2] for each in held]
        assert records.items == [each[3] for each in held]
        assert records.lines == [each[1] for each in held]
        assert records.lengths == [len(each[3]) for each in held]
        assert records.flaws == ["" if each[3] else REASONS[EMPTY] for each in held]


def test_names_of_100_kb_and_letters_that_are_none(tmp_path):
    name = "x" * 100_000
    text = f">{name}\nMKLV\n>stop\nMK*V\n>end\nMKV*\n>bad\nM1\n>na\n{'ACGT' * 9}\n>low\nmk lv\n"
    (tmp_path / "a.fasta").write_text(text)
    (source,) = find_sources([tmp_path])
    survey = source.survey(0, Plain())
    (records,) = source.read(survey.units)
    assert records.ids == [name, "stop", "end", "bad", "na", "low"]
    assert records.items == ["MKLV", "", "MKV", "", "", "MKLV"]
    assert [flaw.split(":")[0] for flaw in records.flaws] == [
        *("", "stop codon", "", "bad letters", "nucleotides", "")
    ]
    assert records.lines == [1, 3, 5, 7, 9, 11]


def test_a_file_that_is_none_or_shrinks_is_named(tmp_path):
    (tmp_path / "empty.fasta").write_text("")
    (tmp_path / "half.fasta.gz").write_bytes(gzip.compress(b">a\nMK\n" * 9)[:-9])
    (tmp_path / "mac.fasta").write_bytes(b">a\rMK\r>b\rMK\r")
    messages = ("the file is empty", "ends in the middle", "lines end with CR alone")
    for name, message in zip(sorted(tmp_path.iterdir()), messages, strict=True):
        (source,) = find_sources([name])
        with pytest.raises(FastaError, match=f"{re.escape(str(name))}.*{message}"):
            source.survey(0, Plain())
    file = tmp_path / "shrinks.fasta.gz"
    file.write_bytes(gzip.compress(b">a\nMK\n" * 9000))
    (source,) = find_sources([file])
    survey = source.survey(0, Plain())
    file.write_bytes(gzip.compress(b">a\nMK\n"))
    with pytest.raises(FastaError, match="has become shorter"):
        list(source.read(survey.units[-1:]))
