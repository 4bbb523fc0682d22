"""A run at a URI: what every machine finds there, and what becomes of it when a node goes."""

import contextlib
import json
import os
import shutil
import signal
import threading
import time

import pytest
import storages
from conftest import ROOT
from in_process import job_in_process
from lone_worker import run_here
from small_runs import EVERY, STEPS, as_recipe, losses, make_recipe, run_to_the_end
from stumbles import hurry
from training_processes import training_processes

from raptide.errors import ConfigError, RaptideError
from raptide.kept import CACHE
from raptide.training.checkpoints.checkpoint import find_bundle_at
from raptide.training.checkpoints.owned import Storage, begin_attempt
from raptide.training.mirror import Mirror, mirrored, refuse_copy, refuse_two_storages
from raptide.training.run_folder import delete_run, load_resumed
from raptide.training.sender import Sender
from raptide.training.watching.audit import audited_steps


@pytest.fixture(scope="module")
def s3():
    with storages.bucket("mirror") as uri:
        yield uri


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """From now on this process is one of another machine, which knows nothing of any run."""

    def move(name):
        monkeypatch.setenv(CACHE, str(tmp_path / name))

    return move


def mirror_of(uri):
    with mirrored(uri) as mirror:
        return mirror


def info_of(uri, run_id="one"):
    return json.dumps({"wandb_run_id": run_id, "checkpoints": uri}) + "\n"


def put(mirror, **files):
    for name, text in files.items():
        path = mirror.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        mirror.send(str(path.relative_to(mirror.folder)))


def names(mirror):
    return sorted(
        str(file.relative_to(mirror.folder)) for file in mirror.folder.rglob("*") if file.is_file()
    )


def test_what_is_fetched_is_what_is_there(s3, elsewhere):
    elsewhere("one")
    uri = s3.format("runs/fetched")
    one = mirror_of(uri)
    assert one.folder.name == "fetched"
    assert not one.folder.exists()
    put(one, **{"run.json": info_of(uri), "metrics.jsonl": "1\n"})
    one.storage.write("stray.bin", lambda file: file.write(b"not ours"))
    put(one, **{"audit/rank-00000.jsonl": "2\n", "wandb/run-1/files/x.txt": "3"})
    one.storage.write("step-00000005-000001-aa/model/config.json", lambda file: file.write(b"{}"))
    elsewhere("two")
    two = mirror_of(uri)
    assert two.folder != one.folder
    assert names(two) == ["run.json"], "a long run's files are many, and may not be needed"
    two.fetch_all()
    found = ["audit/rank-00000.jsonl", "metrics.jsonl", "run.json", "wandb/run-1/files/x.txt"]
    assert names(two) == found, "checkpoints stay where they are"
    before = {name: (two.folder / name).stat().st_ino for name in found}
    put(one, **{"metrics.jsonl": "1\n2\n"})
    one.storage.delete("audit/rank-00000.jsonl")
    two.fetch()
    assert (two.folder / "metrics.jsonl").read_text() == "1\n"
    two.fetch_all()
    assert (two.folder / "metrics.jsonl").read_text() == "1\n2\n"
    assert names(two) == found[1:]
    assert {name: (two.folder / name).stat().st_ino for name in found[1:]} == {
        name: before[name] for name in found[1:]
    }, "a lock on a file would be lost"


def test_what_is_no_run_is_refused_and_what_is_half_of_one_is_not(s3, elsewhere):
    elsewhere("one")
    uri = s3.format("runs/other")
    Storage.at(uri).write("letters.txt", lambda file: file.write(b"mine"))
    with pytest.raises(ConfigError, match=r"holds something, but no run \(no run.json\)"):
        mirror_of(uri)
    half = s3.format("runs/half")
    Storage.at(half).write("recipe.yaml", lambda file: file.write(b"name: x"))
    Storage.at(half).write("run.json.1234.partial", lambda file: file.write(b"{"))
    assert not mirror_of(half).folder.exists()
    with pytest.raises(ConfigError, match="must hold no keys"):
        mirror_of("s3://AKIA:secret@mirror/runs/x")


def test_a_run_has_one_storage(corpus, s3, elsewhere):
    elsewhere("one")
    tree = make_recipe(corpus)
    tree["checkpoint"]["storage"] = s3.format("elsewhere")
    with pytest.raises(ConfigError, match="leave one of the two out"):
        refuse_two_storages(as_recipe(tree), mirror_of(s3.format("runs/one")))


def test_a_rank_keeps_what_goes_on_from_what_was_sent_and_nothing_else(s3, tmp_path):
    uri = s3.format("runs/own")
    there, here = Mirror(uri, tmp_path / "there"), Mirror(uri, tmp_path / "here")
    put(there, **{"metrics.jsonl": "1\n2\n"})
    for local, expected in (("1\n2\n3\n", "1\n2\n3\n"), ("1\n", "1\n2\n"), ("1\n9\n9\n", "1\n2\n")):
        (tmp_path / "here").mkdir(exist_ok=True)
        (tmp_path / "here/metrics.jsonl").write_text(local)
        (tmp_path / "here/audit").mkdir(exist_ok=True)
        (tmp_path / "here/audit/rank-00000.jsonl").write_text("of a run before it was replaced")
        here.fetch_own("metrics.jsonl", "audit/rank-00000.jsonl")
        assert (tmp_path / "here/metrics.jsonl").read_text() == expected
        assert not (tmp_path / "here/audit/rank-00000.jsonl").exists()


def test_a_storage_that_fails_is_told_of_once_and_gets_everything_later(s3, tmp_path, monkeypatch):
    hurry(monkeypatch)
    mirror, told = Mirror(s3.format("runs/late"), tmp_path / "run"), []
    put(mirror, **{"metrics.jsonl": "1\n"})
    attempt = begin_attempt(mirror.storage).name
    sender = Sender(
        mirror, attempt, ["metrics.jsonl", "hangs/*"], told.append, large=["wandb/**/*"]
    )
    sender.send()
    with monkeypatch.context() as patch:
        patch.setattr(Storage, "write", fail)
        (mirror.folder / "metrics.jsonl").write_text("1\n2\n")
        for _ in range(3):
            sender.send()
    (sentence,) = told
    assert "will be later" in sentence
    (mirror.folder / "hangs").mkdir()
    (mirror.folder / "hangs/empty.txt").touch()  # of a rank that has not hung
    (mirror.folder / "hangs/hung.txt").write_text("stack")
    (mirror.folder / "wandb/run-1/files").mkdir(parents=True)
    (mirror.folder / "wandb/run-1/files/run.txt").write_text("x")
    (mirror.folder / "wandb/latest-run").symlink_to("run-1")
    sender.send()
    assert mirror.storage.names("wandb", folders=True) == [], "large files hold nobody up"
    sender.close()
    assert mirror.storage.names("wandb", folders=True) == ["run-1"]
    assert mirror.storage.read("wandb/run-1/files/run.txt") == b"x"
    assert mirror.storage.read("metrics.jsonl") == b"1\n2\n"
    assert mirror.storage.names("hangs") == ["hung.txt"]
    assert len(told) == 1


def fail(*_):
    raise OSError("connection reset")


def test_who_has_been_superseded_sends_nothing(s3, tmp_path):
    """Not even what it wrote before, once it wakes."""
    uri, told = s3.format("runs/zombie"), []
    old, new = Mirror(uri, tmp_path / "old"), Mirror(uri, tmp_path / "new")
    put(old, **{"metrics.jsonl": "1\n"})
    sender = Sender(old, begin_attempt(old.storage).name, ["metrics.jsonl"], told.append)
    begin_attempt(new.storage)
    put(new, **{"metrics.jsonl": "1\n2\n3\n"})
    (old.folder / "metrics.jsonl").write_text("1\n2\n")
    sender.send()
    sender.close()
    assert new.storage.read("metrics.jsonl") == b"1\n2\n3\n"
    assert not told, "whoever trains says it"


def test_one_process_works_on_a_run_and_others_may_look(s3, elsewhere):
    elsewhere("one")
    uri = s3.format("runs/busy")
    with mirrored(uri) as mirror:
        put(mirror, **{"recipe.yaml": "name: x", "run.json": info_of(uri)})
        (mirror.folder / "result.json").write_text("not sent yet")
        with mirrored(f"{uri}&allow_bucket_creation=false", look=True) as other:
            assert names(other) == ["recipe.yaml", "run.json"]
            assert other.folder != mirror.folder
        with pytest.raises(ConfigError, match="Another process on this machine"):
            mirror_of(uri.replace("/busy?", "/busy/?"))
        assert (mirror.folder / "result.json").is_file()
    assert mirror_of(uri).folder == mirror.folder


def test_of_two_that_begin_a_run_one_is_refused(s3, tmp_path):
    uri = s3.format("runs/two")
    mine, others = (Mirror(uri, tmp_path / name) for name in ("mine", "others"))
    for mirror in (mine, others):
        mirror.folder.mkdir()
        (mirror.folder / "recipe.yaml").write_text(f"name: {mirror.folder.name}")
        (mirror.folder / "run.json").write_text(info_of(uri, mirror.folder.name))
    mine.begin()
    mine.begin()  # once more, after a stumble
    with pytest.raises(ConfigError, match=r"Another process has begun a run .* meanwhile"):
        others.begin()
    assert mine.storage.read("recipe.yaml") == b"name: mine"
    assert not others.folder.exists()


def test_a_copy_is_no_run_and_other_options_are_no_copy(s3, elsewhere):
    elsewhere("one")
    uri, copy = s3.format("runs/home"), s3.format("runs/copy")
    put(mirror_of(uri), **{"run.json": info_of(uri)})
    put(mirror_of(copy), **{"run.json": info_of(uri)})
    with pytest.raises(ConfigError, match=r"copy of a run .* belong to s3://mirror/runs/home;"):
        mirror_of(copy)
    uploaded = s3.format("runs/uploaded")
    put(mirror_of(uploaded), **{"run.json": info_of(None)})
    with pytest.raises(ConfigError, match="belong to a folder; go on with that"):
        mirror_of(uploaded)
    longer = f"{uri}&allow_bucket_creation=false"
    info = json.loads((mirror_of(longer).folder / "run.json").read_text())
    assert info["checkpoints"] == longer


def test_errors_name_the_uri_and_its_copy_here_is_no_run(s3, elsewhere):
    elsewhere("one")
    uri = s3.format("runs/named")
    with pytest.raises(RaptideError) as told, mirrored(uri) as mirror:
        load_resumed(mirror.folder)
    assert uri in str(told.value)
    assert str(mirror.folder) not in str(told.value)
    with pytest.raises(ConfigError, match="lives at a URI; name the URI"):
        refuse_copy(mirror.folder)
    with pytest.raises(ConfigError, match="There is no bucket nowhere"):
        mirror_of(uri.replace("s3://mirror/", "s3://nowhere/"))


def test_the_job_takes_a_uri_and_says_what_is_wrong_with_one(corpus, s3, elsewhere, tmp_path):
    elsewhere("one")
    uri, demo = s3.format("runs/job"), ROOT / "jobs/recipes/demo.yaml"
    config = ["--config", demo, f"corpus={corpus.path}", "training.steps=5"]
    done = job_in_process("pretrain_model.py", *config, "--output", uri, "--dry-run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"Run {uri}\n")
    assert Storage.at(uri).names("", folders=True) == []
    wrong = {
        f"{uri} holds no run to resume": ["--resume", uri],
        "There is no bucket nowhere": ["--resume", "s3://nowhere/x?" + uri.partition("?")[2]],
        "must hold no keys": [*config, "--output", "s3://AKIA:sec/ret@mirror/x"],
        "leave one of the two out": [*config, "--output", uri, f"checkpoint.storage={uri}"],
        "the run's URI cannot be": [*config, "--output", "ftp://mirror/x"],
    }
    for sentence, arguments in wrong.items():
        done = job_in_process("pretrain_model.py", *arguments, cwd=tmp_path)
        assert done.returncode == 2, done.stderr
        assert sentence in done.stderr
        assert "sec/ret" not in done.stderr
        assert done.stderr.count("\n") == 1


def test_a_deletion_that_is_killed_can_be_made_again(s3, elsewhere, monkeypatch):
    elsewhere("one")
    uri = s3.format("runs/gone")
    put(mirror_of(uri), **{"recipe.yaml": "name: x", "run.json": info_of(uri), "loss.png": "x"})
    storage = Storage.at(uri)
    for step in (5, 10):
        storage.write(f"step-{step:08d}-000001-aa/manifest.json", lambda file: file.write(b"{}"))
    for deleted in range(6):  # and then it is killed
        left, delete = [deleted], Storage.delete

        def delete_some(self, name, left=left, delete=delete):
            if not left[0]:
                raise KeyboardInterrupt
            left[0] -= 1
            delete(self, name)

        mirror = mirror_of(uri)
        with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
            patch.setattr(Storage, "delete", delete_some)
            delete_run(mirror.folder)
    delete_run(mirror_of(uri).folder)
    assert storage.names("", folders=True) in ([], ["recipe.yaml"])
    assert not mirror_of(uri).folder.exists()


def test_a_run_goes_on_on_another_machine(whole, alone, corpus, s3, elsewhere):
    uri = s3.format("runs/moved")
    elsewhere("one")
    mirror = mirror_of(uri)
    half = as_recipe(make_recipe(corpus, steps=STEPS // 2), workers=1)
    assert run_here(half, mirror.folder, mirror=mirror).step == STEPS // 2
    elsewhere("two")
    there = mirror_of(uri)
    assert there.folder != mirror.folder
    assert names(there) == ["recipe.yaml", "result.json", "run.json"]
    assert run_here(half, there.folder, resume=True, mirror=there).tokens_per_s > 0
    kept = {"audit.json", "loss.png", "metrics.jsonl", "recipe.yaml", "result.json", "run.json"}
    assert kept <= set(names(there))
    assert json.loads((there.folder / "result.json").read_text())["step"] == STEPS // 2
    with pytest.raises(ConfigError, match="exists already"):
        run_here(half, there.folder, mirror=there)
    recipe = as_recipe(make_recipe(corpus), workers=1)
    result = run_here(recipe, there.folder, resume=True, mirror=there)
    assert result.audit.digest == whole.audit.digest
    assert result.audit.redone_steps == 0
    assert f"/runs/moved/step-{STEPS:08d}-" in find_bundle_at(uri)
    elsewhere("three")
    third = mirror_of(uri)
    third.fetch_all()
    assert sorted(losses(third.folder)) == list(range(1, STEPS + 1))
    assert json.loads((third.folder / "result.json").read_text())["step"] == STEPS


@pytest.mark.thorough
def test_a_node_that_goes_takes_nothing_along(whole, corpus, s3):
    """Rank 0 is killed, and its node's folder with it."""
    uri, results = s3.format("runs/wild"), []
    recipe = as_recipe(make_recipe(corpus, tracked=True))
    mirror = mirror_of(uri)
    thread = threading.Thread(
        target=lambda: results.append(run_to_the_end(recipe, mirror.folder, mirror=mirror))
    )
    thread.start()
    lose_a_node(uri, mirror, at_step=EVERY + 2)
    thread.join()
    (result,) = results
    assert result.audit.attempts == 2, "the kill came too late to interrupt anything"
    assert result.audit.digest == whole.audit.digest
    assert dict(audited_steps(result.folder)) == dict(audited_steps(whole.folder))
    assert any((result.folder / "wandb").glob("offline-run-*/*.wandb"))
    # The line of a saved step is written once it is saved, and may go with the node.
    assert losses(result.folder).keys() >= set(range(1, STEPS + 1)) - {EVERY}


def lose_a_node(uri, mirror, at_step):
    """Kill rank 0 once it has logged a step, and what its node holds of the run."""
    until = time.monotonic() + 240
    while True:
        assert time.monotonic() < until, "the run never got that far"
        time.sleep(0.02)
        if not (mirror.folder / "run.json").is_file():
            continue
        run_id = json.loads((mirror.folder / "run.json").read_text())["wandb_run_id"]
        folder = Mirror.of_worker(uri, run_id).folder
        if (folder / "metrics.jsonl").is_file() and at_step in losses(folder):
            break
    os.kill(training_processes()[0], signal.SIGKILL)
    shutil.rmtree(folder)
