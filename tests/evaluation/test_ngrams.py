"""n-grams against the formula written down a second time, and counted the same from any source."""

import gzip
import json
import math
from collections import Counter, defaultdict

import numpy as np
import pytest
from draws import generator

from raptide.alphabet import decode_sequences, encode_residues
from raptide.data.corpus import Corpus
from raptide.data.fasta import ReadingRules, read_fasta
from raptide.data.streaming.rows import draw_members
from raptide.errors import FastaError, InputError
from raptide.evaluation import counting, ngrams
from raptide.evaluation.counting import CorpusText, FastaText, KeptCounts, count_ngrams
from raptide.evaluation.ngrams import LETTERS, NgramCounts, Ngrams, count_grams, smooth


def random_proteins(number=60, most=40, letters="ACDEX"):
    """Few letters of uneven shares, so that n-grams occur once, twice, often and never."""
    shares = np.array([0.6, 0.2, 0.1, 0.09, 0.01])
    lengths = generator().integers(1, most, number)
    return ["".join(generator().choice(list(letters), length, p=shares)) for length in lengths]


def counted(sequences):
    residues = np.concatenate([encode_residues(sequence) for sequence in sequences])
    return NgramCounts(count_grams(residues, np.array(list(map(len, sequences)))), {})


class KneserNey:
    """The formula with dictionaries, from all runs of letters after a `^` that begins a protein."""

    def __init__(self, sequences, order):
        self.order = order
        self.occurrences, self.before = Counter(), defaultdict(set)
        for text in ("^" + sequence for sequence in sequences):
            for length in range(1, order + 1):
                for start in range(len(text) - length + 1):
                    run = text[start : start + length]
                    self.occurrences[run] += run != "^"
                    if start:
                        self.before[run].add(text[start - 1])
        self.discounts = {}
        for length in range(1, order + 1):
            counts = Counter(
                self.count(run) for run in self.occurrences if len(run) == length and run != "^"
            )
            ones, twos = counts[1], counts[2]
            self.discounts[length] = ones / (ones + 2 * twos) if ones else 0.5

    def count(self, run):
        if len(run) == self.order or run.startswith("^"):
            return self.occurrences[run]
        return len(self.before[run])

    def p(self, letter, before):
        return self._p(letter, ("^" + before)[-(self.order - 1) :] if self.order > 1 else "")

    def _p(self, letter, history):
        shorter = self._p(letter, history[1:]) if history else 1 / 25
        counts = {each: self.count(history + each) for each in LETTERS}
        total = sum(counts.values())
        if not total:
            return shorter
        discount = self.discounts[len(history) + 1]
        left = discount * sum(count > 0 for count in counts.values())
        return max(counts[letter] - discount, 0) / total + left / total * shorter


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_probabilities_are_the_formulas(order):
    sequences = random_proteins()
    slow, fast = KneserNey(sequences, order), Ngrams(counted(sequences), order)
    for sequence in [*random_proteins(4), "A", "WAWAW", sequences[0]]:
        expected = [
            [math.log(slow.p(letter, sequence[:i])) for letter in LETTERS]
            for i in range(len(sequence))
        ]
        found = fast.log_p(encode_residues(sequence))
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
@pytest.mark.parametrize("letters", ["ACDEX", "AAAAA"])
def test_probabilities_sum_to_one_after_any_history(order, letters):
    p = smooth(counted(random_proteins(letters=letters)).table, order)
    assert p.shape == (26,) * (order - 1) + (25,)
    assert (p > 0).all()
    np.testing.assert_allclose(p.sum(-1), 1, rtol=0, atol=1e-12)


def test_nothing_counted_is_uniform():
    p = smooth(np.zeros(ngrams.SHAPE, np.int64), 4)
    np.testing.assert_allclose(p, 1 / 25, rtol=1e-12)


def test_counts_do_not_depend_on_what_is_in_memory_at_once(monkeypatch):
    sequences = random_proteins()
    table = counted(sequences).table
    expected = Counter()
    for text in ("^^^" + sequence for sequence in sequences):
        expected.update(text[i : i + 4] for i in range(len(text) - 3))
    at = {letter: i for i, letter in enumerate(LETTERS + "^")}
    assert {k: table[tuple(at[c] for c in k)] for k in expected} == dict(expected)
    assert table.sum() == sum(map(len, sequences)) == counted(sequences).letters.sum()
    for chunk in (1, 7, 100):
        monkeypatch.setattr(ngrams, "CHUNK", chunk)
        assert (counted(sequences).table == table).all()
    assert (sum(counted([sequence]).table for sequence in sequences) == table).all()


def test_a_file_is_whole_or_not_there(tmp_path, monkeypatch):
    counts = NgramCounts(counted(random_proteins()).table, {"source": {"a": 1}, "residues": 5})
    file = tmp_path / "deep/counts.ngrams"
    counts.save(file)
    loaded = NgramCounts.load(file)
    assert (loaded.table == counts.table).all()
    assert loaded.manifest == counts.manifest
    first = file.read_bytes()
    counts.save(file)
    assert file.read_bytes() == first

    def fail(descriptor):
        raise OSError("the disk is full")

    monkeypatch.setattr(ngrams.os, "fsync", fail)
    with pytest.raises(OSError, match="full"):
        counts.save(tmp_path / "deep/other")
    assert [each.name for each in file.parent.iterdir()] == ["counts.ngrams"]


def test_another_or_a_damaged_file_is_refused_in_a_sentence(tmp_path):
    file = tmp_path / "counts.ngrams"
    NgramCounts(counted(random_proteins()).table, {}).save(file)
    good = file.read_bytes()
    flipped = good[:-1] + bytes([good[-1] ^ 1])
    for bad in (
        b"",
        b"text",
        good[:-100],
        flipped,
        good.replace(b'version\\": 1', b'version\\": 9'),
    ):
        assert bad != good
        file.write_bytes(bad)
        with pytest.raises(InputError, match=r"holds no n-gram counts of version 1.*; count with"):
            NgramCounts.load(file)
    with pytest.raises(InputError, match="none holds no n-gram counts"):
        NgramCounts.load(tmp_path / "none")


@pytest.mark.parametrize("sampling", ["representatives", "members", "all"])
def test_a_corpus_is_counted_under_its_sampling(corpus, sampling):
    sequences = []
    for row in corpus.blocks("train"):
        block = corpus.read_block(row)
        every = decode_sequences(block.residues, np.diff(block.residue_splits))
        sequences += [every[i] for i in draw_members(block, sampling, 1, 0)]
    told = []
    counts = count_ngrams(CorpusText.of(corpus, "train", sampling), told.append)
    assert (counts.table == counted(sequences).table).all()
    residues = sum(map(len, sequences))
    assert sum(told) == counts.manifest["residues"] == residues
    assert counts.manifest["proteins"] == len(sequences)
    assert counts.manifest["source"]["corpus"] == corpus.digest


def test_files_are_counted_whole_or_in_parts_plain_or_compressed(
    cluster, proteome, tmp_path, monkeypatch
):
    whole = count_ngrams(FastaText.of([proteome], ReadingRules()))
    sequences = [
        sequence
        for batch in read_fasta(proteome)
        for sequence in decode_sequences(np.frombuffer(batch.residues, np.uint8), batch.lengths)
    ]
    assert (whole.table == counted(sequences).table).all()

    monkeypatch.setattr(counting, "TABLE_RESIDUES", 1000)
    packed = tmp_path / "packed.fasta.gz"
    packed.write_bytes(gzip.compress(proteome.read_bytes(), 1))
    text = FastaText.of([packed, proteome], ReadingRules())
    several = FastaText((text.parts[0]._replace(), *_parts(proteome)), text.rules, text.digests)
    assert several.stretches > 3
    assert (count_ngrams(several).table == 2 * whole.table).all()


def _parts(file):
    from raptide.data.fasta_text import split_fasta

    return split_fasta(file, part_bytes=200_000)


def test_a_record_that_is_no_protein_is_named_or_left_out(cluster, tmp_path):
    file = tmp_path / "a.fasta"
    file.write_text(">a\nMKLV\n>b\nMK1\n>c\nML*V\n")
    with pytest.raises(FastaError, match=r"a\.fasta:3: record 'b'") as caught:
        count_ngrams(FastaText.of([file], ReadingRules()))
    assert "\n" not in str(caught.value)
    rules = ReadingRules(bad_letters="drop", stop_codons="split")
    counts = count_ngrams(FastaText.of([file], rules))
    assert (counts.table == counted(["MKLV", "ML", "V"]).table).all()
    assert counts.manifest["source"]["rules"]["bad_letters"] == "drop"


def test_a_corpus_without_a_training_side_has_nothing_to_count(corpus):
    text = CorpusText(CorpusText.of(corpus, "train", "all").corpus, "train", "all", 0)
    with pytest.raises(InputError, match="the training side holds none; give more"):
        count_ngrams(text)


def test_counts_are_kept_by_the_digest_of_what_was_counted(corpus, tmp_path, monkeypatch):
    text = CorpusText.of(corpus, "train", "representatives")
    made = []
    monkeypatch.setattr(
        counting, "count_ngrams", lambda text: made.append(text) or count_ngrams(text)
    )
    first = KeptCounts(text, tmp_path).get()
    assert (KeptCounts(text, tmp_path).get().table == first.table).all()
    assert len(made) == 1, "kept counts were counted again"

    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:1000])
    assert (KeptCounts(text, tmp_path).get().table == first.table).all()
    assert len(made) == 2, "a damaged file was believed"

    moved = Corpus(corpus.files, corpus.manifest | {"digest": "f" * 64})
    others = [
        CorpusText.of(corpus, "train", "all"),
        CorpusText.of(corpus, "heldout", "representatives"),
        CorpusText.of(moved, "train", "representatives"),
    ]
    digests = {KeptCounts(each, tmp_path).digest for each in [text, *others]}
    assert len(digests) == 4
    assert json.dumps(first.manifest)
