"""Published numbers stand beside the same data alone."""

import pytest
from conftest import ROOT
from evaluated import number_row

from raptide.errors import ConfigError
from raptide.evaluation.report.references import match_references, read_references

FILE = ROOT / "jobs/benchmarks/reference.yaml"


def row(kind, dataset, metric, digest="0" * 64, **fields):
    given = {"kind": kind, "dataset": dataset, "dataset_digest": digest}
    return number_row("runs/a", "task of mine", metric, 0.5, **given, **fields)


@pytest.fixture(scope="module")
def references():
    return read_references(FILE)


def test_the_shipped_file_holds_the_published_numbers(references):
    found = match_references(
        references,
        [row("variants", "ProteinGym", "spearman"), row("contacts", "CAMEO", "p@l/long")],
    )
    values = {(each.metric, each.model): each.value for each in found}
    assert values["spearman", "ESM-2 650M"] == 0.414
    assert values["spearman", "ESM-1v, five"] == 0.407
    assert values["p@l/long", "ESM-2 8M"] == 0.157
    assert {each.task for each in found} == {"task of mine"}
    assert all(each.source for each in found)


def test_all_but_ece_is_a_share_and_ece_lies_between_perfect_and_blind(references):
    for table in references.tables:
        for values in table.models.values():
            for metric, value in zip(table.metrics, values, strict=True):
                low, high = (1, 25) if metric == "ece" else (0, 1)
                assert value is None or low < value < high, (table.names, metric)


def test_capitals_of_a_name_do_not_matter_but_anything_else_does(references):
    assert match_references(references, [row("secondary-structure", "cb513", "q8")])
    for other in (
        row("secondary-structure", "CB513x", "q8"),
        row("secondary-structure", "structures_test", "q8"),
        row("secondary-structure", "CB513", "q4"),
        row("contacts", "CB513", "q8"),
        row("secondary-structure", "CB513", "q8", role="control"),
    ):
        assert not match_references(references, [other])


def test_an_average_over_files_goes_by_the_name_of_its_task(references):
    average = row("variants", "all", "spearman")
    assert not match_references(references, [average])
    assert len(match_references(references, [average | {"task": "proteingym"}])) == 14
    assert not match_references(references, [average | {"task": "proteingym", "dataset": "one"}])


def test_what_was_not_published_is_left_out(references):
    found = match_references(references, [row("variants", "proteingym", "mcc")])
    assert "ESM-1b" in {each.model for each in found}
    assert "CARP 38M" not in {each.model for each in found}


TABLE = """
tables:
  - kind: homology
    names: [mine]
    digests: [{digest}]
    metrics: [hit10, auc]
    source: a paper
    models:
      A: [0.5, {second}]
"""


def write(tmp_path, digest="f" * 64, second="0.9"):
    file = tmp_path / "reference.yaml"
    file.write_text(TABLE.format(digest=digest, second=second))
    return file


def test_the_same_data_under_another_name_count_by_their_digest(tmp_path):
    mine = read_references(write(tmp_path))
    found = match_references(mine, [row("homology", "else", "auc", "f" * 64)] * 2)
    assert [(each.dataset, each.model, each.value) for each in found] == [("else", "A", 0.9)]
    assert not match_references(mine, [row("homology", "else", "auc", "e" * 64)])


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("[0.5, 0.9]", "[0.5]", "A has 1 values for 2 metrics"),
        ("[0.5, 0.9]", "[0.5, much]", "tables.0.models.A.1"),
        ("source: a paper", "", "`tables.0.source` is required"),
        ("source: a paper", "source: a paper\n    nmes: [b]", "did you mean `names`?"),
        ("names: [mine]", "names: []", "tables.0.names"),
        ("tables:", "table:", "`tables` is required"),
    ],
)
def test_a_wrong_file_is_refused_in_one_sentence(tmp_path, old, new, said):
    file = write(tmp_path)
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))
    with pytest.raises(ConfigError) as caught:
        read_references(file)
    message = str(caught.value)
    assert said in message
    assert str(file) in message
    assert "\n" not in message


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="give an existing YAML file"):
        read_references(tmp_path / "none.yaml")
