"""A benchmark's run: every subject asked once, nothing twice, whatever was killed in between."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from raptide.bulk.work import Model
from raptide.errors import InputError
from raptide.evaluation.cache import ResultCache
from raptide.evaluation.requests import Reading, Request
from raptide.evaluation.results import Measure
from raptide.evaluation.run import BUSY, answers, evaluate, result_key, rows_of
from raptide.evaluation.samples import mean_of
from raptide.evaluation.subjects.model import ModelSubject, random_weights
from raptide.evaluation.subjects.readers import HereReader
from raptide.evaluation.tasks.task import Outcome, TaskSettings


class ToySettings(TaskSettings):
    kind: str = "toy"
    test: dict[str, str]
    factor: float = 1.0


class Toy:
    """How long the vectors of some proteins are, on the average."""

    version = 1
    main_metric = "length"
    needs = ("mean",)
    random_weights = True
    how = "The mean length of the proteins' vectors."

    def __init__(self, settings):
        self.settings = settings
        self.measured = []
        self.proteins = {
            name: Path(file).read_text().split() for name, file in settings.test.items()
        }

    def files(self):
        return [Path(file) for file in self.settings.test.values()]

    def baselines(self):
        return [Planted("ones", 1.0)]

    def requests(self, subject):
        for proteins in self.proteins.values():
            for protein in proteins:
                yield Request(Reading("mean", subject.layers), protein)

    def measure(self, subject, readings):
        self.measured.append(subject.name)
        found = Outcome(notes=["nothing was left out"])
        for name, proteins in self.proteins.items():
            vectors = [
                readings.get(Request(Reading("mean", subject.layers), each)) for each in proteins
            ]
            lengths = [self.settings.factor * np.linalg.norm(each) for each in vectors]
            role = "main" if not found.measures else "more"
            found.measures.append(Measure("length", name, mean_of(lengths), role=role))
        return found


class Planted:
    """A subject whose vectors are known."""

    baseline, layers, kinds = True, 0, frozenset({"mean"})

    def __init__(self, name, value):
        self.name, self.value, self.digest = name, value, f"{value}"
        self.asked = 0

    @contextmanager
    def read(self, ask):
        self.asked += len(list(ask()))
        yield self

    def get(self, request):
        return np.array([self.value, 0.0], np.float32)


@pytest.fixture
def settings(tmp_path):
    files = {"one": ["MKTAYI", "GSHM", "MKTAYI"], "two": ["ACDEF", "GSHM"]}
    for name, proteins in files.items():
        (tmp_path / f"{name}.txt").write_text("\n".join(proteins))
    return ToySettings(name="toy", test={name: str(tmp_path / f"{name}.txt") for name in files})


@pytest.fixture
def model(bundle, tmp_path):
    return ModelSubject("model", Model.find(bundle), "fp32", HereReader(), tmp_path / "scratch")


def test_models_and_baselines_go_through_the_same_lines(settings, model, tmp_path):
    task = Toy(settings)
    findings = evaluate([task], [model], ResultCache(tmp_path / "cache"))
    assert [found.subject.name for found in findings.found] == ["model", "random-weights", "ones"]
    rows = rows_of(findings, "1")
    assert [(row["model"], row["dataset"], row["n"]) for row in rows] == [
        (name, dataset, n)
        for name in ("model", "random-weights", "ones")
        for dataset, n in (("one", 3), ("two", 2))
    ]
    assert all(row["value"] == row["low"] == row["high"] == 1.0 for row in rows[4:])
    assert rows[0]["dataset_digest"] != rows[1]["dataset_digest"]
    assert rows[0]["low"] <= rows[0]["value"] <= rows[0]["high"]
    assert not any((tmp_path / "cache").glob("read-*"))


def test_what_is_there_is_not_computed_again(settings, model, tmp_path):
    cache = ResultCache(tmp_path / "cache")
    first = evaluate([Toy(settings)], [model], cache)
    task = Toy(settings)
    second = evaluate([task], [model], cache)
    assert task.measured == []
    assert (first.computed, second.computed) == (3, 0)
    assert rows_of(first, "1") == rows_of(second, "1")


def test_whoever_is_killed_in_between_goes_on(settings, model, tmp_path, monkeypatch):
    cache = ResultCache(tmp_path / "cache")
    whole = rows_of(evaluate([Toy(settings)], [model], ResultCache(tmp_path / "other")), "1")

    class Dies(Toy):
        def measure(self, subject, readings):
            if subject.name == "random-weights":
                raise KeyboardInterrupt
            return super().measure(subject, readings)

    with pytest.raises(KeyboardInterrupt):
        evaluate([Dies(settings)], [model], cache)
    task = Toy(settings)
    rows = rows_of(evaluate([task], [model], cache), "1")
    assert task.measured == ["random-weights", "ones"]
    for one, other in zip(rows, whole, strict=True):
        assert {**one, "seconds": 0} == {**other, "seconds": 0}


@pytest.mark.parametrize("change", ["data", "settings", "version", "weights", "precision"])
def test_whatever_numbers_depend_on_makes_another_result(settings, model, change):
    task = Toy(settings)
    before = result_key(model, task, "digest")
    digest = "digest"
    if change == "data":
        digest = "other"
    elif change == "settings":
        task.settings = settings.model_copy(update={"factor": 2.0})
    elif change == "version":
        task.version = 2
    elif change == "weights":
        model.model = model.model.__class__(**{**vars(model.model), "digest": "0" * 64})
    else:
        model.precision = "bf16"
    assert result_key(model, task, digest) != before


def test_where_data_lie_and_what_a_task_is_called_makes_none(settings, model, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    files = {name: tmp_path / "elsewhere" / Path(file).name for name, file in settings.test.items()}
    for name, file in files.items():
        file.write_bytes(Path(settings.test[name]).read_bytes())
    moved = settings.model_copy(
        update={"name": "other", "test": {name: str(file) for name, file in files.items()}}
    )
    cache = ResultCache(tmp_path / "cache")
    evaluate([Toy(settings)], [model], cache)
    assert evaluate([Toy(moved)], [model], cache).computed == 0


def test_tests_that_trade_names_trade_results(settings, model, tmp_path):
    cache = ResultCache(tmp_path / "cache")
    one, two = settings.test.values()
    swapped = settings.model_copy(update={"test": {"two": one, "one": two}})
    for each in (settings, swapped):
        findings = evaluate([Toy(each)], [model], cache, baselines=False)
        rows = rows_of(findings, "1")
        assert {row["dataset"]: row["n"] for row in rows} == {
            name: len(Path(file).read_text().split()) for name, file in each.test.items()
        }


def test_data_that_go_while_models_are_read_keep_the_digest_they_had(settings, model, tmp_path):
    class Loses(Toy):
        def measure(self, subject, readings):
            for file in self.files():
                file.unlink()
            return super().measure(subject, readings)

    cache = ResultCache(tmp_path / "cache")
    whole = rows_of(evaluate([Toy(settings)], [model], cache, baselines=False), "1")
    task = Loses(settings)
    task.version = 2
    rows = rows_of(evaluate([task], [model], cache, baselines=False), "1")
    assert [{**row, "seconds": 0} for row in rows] == [{**row, "seconds": 0} for row in whole]


class Column(Planted):
    baseline, kinds = False, frozenset({"scores"})


def test_predictions_that_fit_nothing_are_refused(settings, model, tmp_path):
    cache, task = ResultCache(tmp_path / "cache"), Toy(settings)
    with pytest.raises(InputError, match="no task that was chosen is of kind variants"):
        evaluate([task], [model], cache, others=[Column("esm", 1.0)])
    task.needs = ("mean|scores",)
    evaluate([task], [model], cache, others=[Column("esm", 1.0)], baselines=False)
    with pytest.raises(InputError, match="'model' names a model and a column"):
        evaluate([task], [model], cache, others=[Column("model", 1.0)])


def test_subjects_are_asked_what_they_can_give(settings):
    task = Toy(settings)
    subject = Planted("p", 1.0)
    assert answers(subject, task)
    task.needs = ("mean|hits", "residues")
    assert not answers(subject, task)
    task.needs = ("hits|mean",)
    assert answers(subject, task)


def test_two_at_once_on_one_cache_read_a_subject_one_after_the_other(settings, model, tmp_path):
    cache = ResultCache(tmp_path / "cache")
    reading, waited, firsts = threading.Event(), threading.Event(), []

    class Slow(Toy):
        def measure(self, subject, readings):
            reading.set()
            waited.wait(20)
            return super().measure(subject, readings)

    first = threading.Thread(
        target=lambda: firsts.append(evaluate([Slow(settings)], [model], cache, baselines=False))
    )
    first.start()
    assert reading.wait(20)
    second = evaluate(
        [Toy(settings)], [model], cache, lambda line: BUSY in line and waited.set(), baselines=False
    )
    waited.set()
    first.join()
    assert (firsts[0].computed, second.computed) == (1, 0)
    assert rows_of(firsts[0], "1") == rows_of(second, "1")
    assert not model.scratch.exists()
    assert not any(cache.folder.glob("*.lock"))


def test_random_weights_are_made_beside_another_process_that_makes_them(model, tmp_path):
    made = random_weights(model, tmp_path / "one")
    folder = Path(made.model.path)
    partial = folder.with_name(f"{folder.name}.partial")
    folder.rename(partial)  # the other one is not done yet
    again = random_weights(model, tmp_path / "one")
    assert again.digest == made.digest
    assert partial.exists(), "what another process writes is left alone"
    assert {path.name for path in folder.parent.iterdir()} == {folder.name, partial.name}


def test_random_weights_of_each_precision_are_read_in_a_folder_of_their_own(model, tmp_path):
    single = random_weights(model, tmp_path)
    model.precision = "bf16"
    assert random_weights(model, tmp_path).scratch != single.scratch


def test_a_model_that_can_be_asked_nothing_is_told(settings, model, tmp_path):
    task = Toy(settings)
    task.needs = ("hits",)
    with pytest.raises(InputError, match=r"model can be asked none of the tasks.*toy"):
        evaluate([task], [model], ResultCache(tmp_path / "cache"))
