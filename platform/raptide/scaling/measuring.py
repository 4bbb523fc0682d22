"""What the runs of a study have come to: each model and n-gram asked the same, a row a subject."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from raptide.bulk.work import Model
from raptide.data.corpus import Corpus
from raptide.evaluation.benchmark import Benchmark
from raptide.evaluation.cache import Measured, ResultCache
from raptide.evaluation.counting import CorpusText, KeptCounts
from raptide.evaluation.ngrams import MOST_ORDER
from raptide.evaluation.run import Finding, evaluate
from raptide.evaluation.samples import Sample
from raptide.evaluation.subjects.model import ModelSubject
from raptide.evaluation.subjects.ngrams import LetterBaseline, ngram, unigram
from raptide.evaluation.subjects.readers import Reader
from raptide.evaluation.tasks.perplexity import PerplexitySettings, PerplexityTask
from raptide.evaluation.tasks.task import Task
from raptide.model.families import count_parameters
from raptide.scaling.cost import epoch_tokens, flops_of
from raptide.scaling.study import PlannedRun, Study
from raptide.scaling.training import Ending
from raptide.storage import is_uri
from raptide.training.planning.recipe import Recipe
from raptide.training.result import RunResult, read_result

HELDOUT = "heldout"
"""Name of the task that every subject is asked."""

Say = Callable[[str], None]


@dataclass
class Point:
    """A model, or an n-gram, on the curves of a study."""

    facts: dict[str, Any]
    """What it is and has seen, by the names of `table.COLUMNS`."""

    ece: Measured | None = None
    ece_masked: Measured | None = None
    bench: dict[str, Measured] = field(default_factory=dict)
    """Main metrics of the benchmark, `TASK/METRIC`."""

    @property
    def kind(self) -> str:
        return self.facts["kind"]

    @property
    def sample(self) -> Sample | None:
        """What the ECE on masked residues is computed from, a protein each."""
        return self.ece_masked.measure.sample if self.ece_masked else None


def measure(
    study: Study,
    tasks: Sequence[Task],
    endings: Sequence[Ending],
    cache: ResultCache,
    reader: Reader,
    say: Say,
) -> list[Point]:
    """Ask every finished run, and n-grams of each of the data, as far as it is not kept. Ray must
    be running.

    Args:
        tasks: those of `tasks_of`.
    """
    points: dict[int, Point] = {}
    models: list[ModelSubject] = []
    for ending in endings:
        if not ending.problem:
            result = read_result(ending.folder, ending.run.recipe)
            subject = _subject(ending.run.name, result, cache, reader, say)
            models.append(subject)
            points[id(subject)] = Point(_facts(ending.run, result, subject.model.digest))
    grams = list(_grams(study, cache)) if study.settings.ngrams else []
    points |= {id(subject): Point(facts) for subject, facts in grams}
    others = [subject for subject, _ in grams]
    findings = evaluate(tasks, models, cache, say, baselines=False, others=others)
    for finding in findings.found:
        _add(points[id(finding.subject)], finding)
    return list(points.values())


def tasks_of(study: Study, scratch: Path) -> list[Task]:
    """What every model of a study is asked, with its data.

    Args:
        scratch: where what is made of data alone is kept.

    Raises:
        InputError: the held-out proteins or the benchmark's data are not there.
    """
    corpus = study.heldout_corpus
    heldout = PerplexityTask(
        PerplexitySettings(
            name=HELDOUT,
            corpus=corpus if is_uri(corpus) else Path(corpus).resolve(),
            sampling=study.runs[0].recipe.stream.sampling,
            most_proteins=study.settings.heldout_proteins,
        ),
        scratch,
    )
    if study.benchmark is None:
        return [heldout]
    only = list(study.settings.tasks) or None
    return [heldout, *Benchmark.load(study.benchmark, only).make(scratch)]


def _subject(
    name: str, result: RunResult, cache: ResultCache, reader: Reader, say: Say
) -> ModelSubject:
    model = Model.find(result.bundle)
    scratch = cache.folder / f"read-{model.digest[:16]}-fp32"
    return ModelSubject(name, model, "fp32", reader, scratch, say=say)


def _facts(run: PlannedRun, result: RunResult, digest: str) -> dict[str, Any]:
    recipe = run.recipe
    return _of_recipe(recipe) | {
        "name": run.name,
        "kind": "lstm" if recipe.model.blind else "transformer",
        "model": run.model,
        "data": run.data,
        "seed": run.seed,
        "family": recipe.model.family,
        "layers": recipe.model.layers,
        "width": recipe.model.width,
        "parameters": count_parameters(recipe.model),
        "steps": result.step,
        "tokens": result.tokens,
        "flops": flops_of(recipe, result.tokens),
        "tokens_per_s": result.tokens_per_s,
        "run_ece": result.heldout_ece.all_chosen,
        "run_ece_masked": result.heldout_ece.masked_only,
        "weights": digest,
        "checkpoint": str(result.checkpoint),
    }


def _of_recipe(recipe: Recipe) -> dict[str, Any]:
    return {
        "corpus": ", ".join(share.path for share in recipe.corpus),
        "sampling": recipe.stream.sampling,
        "fraction": recipe.stream.fraction,
        "epoch_tokens": epoch_tokens(recipe),
    }


def _grams(study: Study, cache: ResultCache) -> Iterator[tuple[LetterBaseline, dict[str, Any]]]:
    """Unigram to 4-gram of each of the data; mixtures of corpora have none."""
    recipes: Mapping[str, Recipe] = {run.data: run.recipe for run in study.runs}
    for data, recipe in recipes.items():
        if len(recipe.corpus) > 1:
            continue
        corpus, stream = Corpus.open(recipe.corpus[0].path), recipe.stream
        text = CorpusText.of(corpus, "train", stream.sampling, stream.fraction)
        kept = KeptCounts(text, cache.folder)
        subjects = [unigram(kept.digest, kept.get)]
        subjects += [ngram(order, kept.digest, kept.get) for order in range(2, MOST_ORDER + 1)]
        seen = _of_recipe(recipe) | {"kind": "n-gram", "family": "n-gram", "data": data}
        for subject in subjects:
            yield subject, seen | {"model": subject.name, "name": f"{subject.name}--{data}"}


def _add(point: Point, finding: Finding) -> None:
    """What a task has found of a subject."""
    task = finding.task.settings.name
    if task == HELDOUT:
        found = {each.measure.metric: each for each in finding.result.measured}
        point.ece, point.ece_masked = found["ece"], found["ece-masked"]
        return
    for each in finding.result.measured:
        if each.measure.role == "main":
            point.bench[f"{task}/{each.measure.metric}"] = each
