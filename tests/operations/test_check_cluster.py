"""A cluster is looked at: the session's own for what goes right, made-up answers for the rest."""

import json
from types import SimpleNamespace

import pytest
import ray
from conftest import ROOT
from in_process import job_in_process
from ray.exceptions import GetTimeoutError

import check_cluster
from raptide.errors import ClusterError
from raptide.operations import check, outside, places
from raptide.operations.check import CheckOptions, Report
from raptide.operations.findings import Finding
from raptide.operations.places import Place
from raptide.storage import Storage


def node(number, host=None, cpus=4):
    return Place(f"id{number}", host or f"h{number}", f"10.0.0.{number}", (1, 2), cpus, 0, 0.0)


def bad(level="error"):
    return Finding(level, "n1", "disk", "/tmp has 1.0 GB free", "make room")


@pytest.mark.usefixtures("cluster")
def test_this_machine_is_looked_at_and_tried_out(tmp_path):
    done = job_in_process(
        *("check_cluster.py", "--json", "--disk-gb", "0", "--storage", tmp_path / "shared"),
        cwd=tmp_path,
    )
    report = json.loads(done.stdout)
    ((name, facts),) = report["nodes"].items()
    assert facts["versions"]["ray"] == ray.__version__
    assert report["measures"]["product_tflops"][name] > 0
    assert report["measures"]["on_node_gb_s"][name] > 0
    assert {each["check"] for each in report["findings"]} <= {"disk", "ulimits", "shm"}
    assert done.returncode == (0 if report["ok"] else 1)
    assert list((tmp_path / "shared").glob("raptide-check-*")) == [], "it leaves nothing behind"


@pytest.mark.usefixtures("cluster")
def test_the_short_form_refuses_a_run_with_the_first_error(tmp_path, capsys):
    with pytest.raises(ClusterError, match=r"not fit to train on: .*, where checkpoints pass, has"):
        check_cluster.refuse_unfit(str(tmp_path), 1e18)
    told = capsys.readouterr().err
    assert "Error: " in told
    assert "pairs of nodes" not in told


def test_a_recipe_runs_it_before_anything_is_made(corpus, tmp_path, monkeypatch):
    asked = []

    def unfit(options, say):
        asked.append(options)
        return Report(findings=[bad("warning"), bad(), bad()])

    monkeypatch.setattr(check_cluster, "check_cluster", unfit)
    done = job_in_process(
        *("pretrain_model.py", "--config", ROOT / "jobs/recipes/demo.yaml"),
        *("--output", tmp_path / "run", f"corpus={corpus.path}", "cluster.check_first=true"),
        *("cluster.workers=1", "cluster.device=cpu"),
        cwd=tmp_path,
    )
    assert done.returncode == 1
    lines = done.stderr.splitlines()
    assert lines[-1] == (
        "error: The cluster is not fit to train on: n1: /tmp has 1.0 GB free; make room (1 more "
        "above), or set cluster.check_first=false."
    )
    assert "warning: n1: /tmp has 1.0 GB free; make room." in lines
    assert not (tmp_path / "run").exists()
    (options,) = asked
    assert options.short
    assert options.storage == str(tmp_path / "run")
    assert options.disk_gb > 0


def test_the_report_for_people_ends_with_a_verdict():
    assert check_cluster.describe(Report()).startswith("Fit to train on: 0 errors, 0 warnings")
    text = check_cluster.describe(Report(findings=[bad(), bad("warning")]))
    assert "error: n1: /tmp has 1.0 GB free; make room." in text
    assert "Not fit to train on: 1 errors, 1 warnings" in text


def test_a_node_that_does_not_answer_is_a_finding_and_the_others_are_heard(monkeypatch):
    def get(task, timeout):
        if task == "silent":
            raise GetTimeoutError("…")
        return task

    monkeypatch.setattr(places, "ray", SimpleNamespace(get=get))
    tasks = {node(1): "fine", node(2): "silent", node(3): "too"}
    findings = []
    heard = dict(places.answers(tasks, findings, "it does not answer"))
    assert list(heard.values()) == ["fine", "too"]
    (one,) = findings
    assert (one.node, one.check) == (node(2).name, "answer")
    assert "within 180 s" in one.found


def test_nodes_of_one_machine_are_tried_one_after_the_other():
    nodes = [node(1, "a"), node(2, "b"), node(3, "a"), node(4, "a")]
    turns = [[place.id for place in turn] for turn in check._turns(nodes)]
    assert turns == [["id1", "id2"], ["id3"], ["id4"]]


def test_each_node_reaches_for_the_head_and_its_neighbours_but_not_for_itself():
    nodes = [node(n) for n in range(10)]
    hosts = {host for host, _ in check._ports_to_reach(nodes, 3)}
    assert hosts == {f"10.0.0.{n}" for n in (0, 4, 5, 6, 7)}
    assert check._ports_to_reach(nodes[:1], 0) == []
    assert {host for host, _ in check._ports_to_reach(nodes[:2], 0)} == {"10.0.0.1"}


def test_a_storage_that_is_not_shared_or_read_only_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    assert "cannot be written" in outside._write(Storage.of(tmp_path / "file/x"), "a/0")
    storage = Storage.of(tmp_path)
    assert outside._write(storage, "a/0") == ""
    assert outside._read(storage, "a/0") == ""
    assert outside._read(storage, "a/1") != ""
    (tmp_path / "a/0").write_text("of another node")
    assert outside._read(storage, "a/0") == "it holds something else"


@pytest.mark.parametrize(
    ("having", "login", "found"),
    [
        ([False, False], "broken", []),
        ([True, True], None, []),
        ([True, False], None, ["n1"]),
        ([True, True], "it belongs to nobody", ["cluster"]),
    ],
)
def test_all_nodes_have_a_wandb_key_that_works_or_none_has(monkeypatch, having, login, found):
    monkeypatch.setattr(outside, "has_wandb_key", lambda: any(having))
    monkeypatch.setattr(outside, "_refused_login", lambda: login)
    nodes = {f"n{i}": SimpleNamespace(has_wandb_key=has) for i, has in enumerate(having)}
    assert [each.node for each in outside.try_wandb(nodes)] == found


def test_with_an_address_the_check_is_a_job_of_that_cluster_and_stdout_is_json(monkeypatch, capsys):
    given = []

    def submit_and_follow(args, output):
        given.append(args)
        output.feed('  looking at 3 nodes\n(raylet) noise\n{"ok": false}\n')
        output.close()
        return 1

    monkeypatch.setattr(check_cluster, "submit_and_follow", submit_and_follow)
    command = ["check_cluster.py", "--address", "http://h:1", "--json", "--storage", "/s"]
    monkeypatch.setattr("sys.argv", command)
    with pytest.raises(SystemExit) as ended:
        check_cluster.main()
    assert ended.value.code == 1
    (args,) = given
    assert (args.address, args.name, args.job) == ("http://h:1", "check_cluster", "check_cluster")
    assert args.arguments == ["--disk-gb=20", "--storage=/s", "--json"]
    assert json.loads(capsys.readouterr().out) == {"ok": False}


def test_options_have_their_defaults():
    assert CheckOptions() == CheckOptions(None, 20.0, False)
