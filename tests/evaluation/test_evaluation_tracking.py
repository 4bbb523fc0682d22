"""An evaluation in W&B, offline."""

import json

import pytest
from evaluated import OTHER, TRAINED, small_content
from offline_wandb import read_runs, records

from evaluation_tracking import log_evaluation, metrics_of_tasks
from raptide.evaluation.report.page import write_page


@pytest.fixture(scope="module")
def logged(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tracked")
    output = folder / "my evaluation"
    output.mkdir()
    write_page(small_content(), output / "report.html")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        log_evaluation(output, small_content())
    return folder, output


def test_each_model_is_a_run_with_its_metrics_of_tasks(logged):
    folder, _ = logged
    runs = {run[1]["weights"]: run for run in read_runs(folder / "wandb")}
    assert len(runs) == 2
    _, config, history, _ = runs["ab" * 32]
    assert config["lineage"]["step"] == 1200
    assert history[-1]["bench/structure/test/q8"] == 0.52
    assert history[-1]["bench/structure/test/q8/low"] == 0.51
    assert history[-1]["numbers/_type"] == "table-file"
    assert runs["cd" * 32][2][-1]["bench/structure/test/q8"] == 0.5


def test_its_table_holds_the_model_and_the_baselines(logged):
    folder, _ = logged
    tables = [json.loads(f.read_text()) for f in folder.rglob("media/table/*.json")]
    assert len(tables) == 2
    for table in tables:
        models = {row[table["columns"].index("model")] for row in table["data"]}
        assert {"uniform", "one-hot", "blosum62"} < models
        assert len(models & {TRAINED, OTHER}) == 1


def test_what_was_written_is_an_artifact_beside_the_model(logged):
    folder, output = logged
    files = sorted(folder.glob("wandb/offline-run-*/run-*.wandb"))
    assert len(files) == 2
    for file in files:
        logged = [r.artifact for r in records(file) if r.WhichOneof("record_type") == "artifact"]
        made = {artifact.type: artifact for artifact in logged}
        evaluation = made["evaluation"]
        assert evaluation.name == "evaluation-small-my-evaluation"
        assert [entry.path for entry in evaluation.manifest.contents] == ["report.html"]
        assert json.loads(evaluation.metadata)["folder"] == output.as_uri()
        assert made["model"].name.startswith("model-")


def test_what_is_no_number_has_no_curve():
    content = small_content()
    for row in content.rows:
        row["low"] = float("nan")
    metrics = metrics_of_tasks(content, content.models[0])
    assert metrics["bench/variants/test/spearman"] == 0.4
    assert not [name for name in metrics if name.endswith("/low")]
