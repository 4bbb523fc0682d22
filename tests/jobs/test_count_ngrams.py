"""jobs/count_ngrams.py: what it counts, says, and refuses."""

import re

import pytest
from in_process import job_in_process

from raptide.evaluation.counting import CorpusText, count_ngrams
from raptide.evaluation.ngrams import NgramCounts

JOB = "count_ngrams.py"


def test_a_corpus_is_counted_and_its_held_out_side_predicted(corpus, tmp_path):
    arguments = ["--corpus", corpus.path, "--output", "deep/mine.ngrams"]
    done = job_in_process(JOB, *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    file = tmp_path / "deep/mine.ngrams"
    expected = count_ngrams(CorpusText.of(corpus, "train", "representatives"))
    found = NgramCounts.load(file)
    assert (found.table == expected.table).all()
    assert found.manifest == expected.manifest
    assert f"{expected.manifest['residues']:,} residues counted" in done.stdout
    ece = dict(re.findall(r"(\d)-gram +([\d.]+)", done.stdout))
    assert list(ece) == ["1", "2", "3", "4"]
    assert 16 < float(ece["3"]) < float(ece["2"]) < float(ece["1"]) < 18
    assert [each.name for each in file.parent.iterdir()] == ["mine.ngrams"]

    again = job_in_process(JOB, *arguments, cwd=tmp_path)
    assert again.returncode == 2
    assert "is there already; give --replace to replace it" in again.stderr
    replaced = job_in_process(JOB, *arguments, "--replace", "--sampling", "all", cwd=tmp_path)
    assert replaced.returncode == 0
    assert NgramCounts.load(file).manifest["source"]["sampling"] == "all"


def test_files_are_counted_and_others_predicted(cluster, tmp_path):
    (tmp_path / "a.fasta").write_text(">a\nMKLV\n>b\nMK1\n")
    (tmp_path / "b.fasta").write_text(">c\nACDE\n")
    arguments = ["--fasta", "a.fasta", "b.fasta", "--output", "x"]
    arguments += ["--bad-letters", "drop", "--test", "b.fasta"]
    done = job_in_process(JOB, *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "x: 2 proteins, 8 residues counted" in done.stdout
    assert "ECE over 1 proteins that were not counted, 4 residues" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--fasta", "a.fasta"], "a.fasta:3: record 'b'"),
        (["--fasta", "none"], "none is not there"),
        (["--corpus", "."], "holds no finished corpus"),
        (["--fasta", "a.fasta", "--sampling", "all"], "--sampling draws from clusters"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(arguments, message, cluster, tmp_path):
    (tmp_path / "a.fasta").write_text(">a\nMKLV\n>b\nMK1\n")
    done = job_in_process(JOB, *arguments, "--output", "x", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert [each.name for each in tmp_path.iterdir()] == ["a.fasta"]
