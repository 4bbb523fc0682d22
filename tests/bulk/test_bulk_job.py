"""Whole jobs on the session's Ray: exactly once, whatever dies, and never mixed."""

import json
import threading
import time
from contextlib import suppress

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from bulk_works import MEMORY, RAISE, SEGV, SLEEP, DeadlyWork, ManyUnits, check_sum
from draws import generator, random_sequence

from raptide.bulk import BulkSettings, OutputFolder, find_sources, run_bulk
from raptide.bulk.report import describe
from raptide.errors import ConfigError, FastaError, RaptideError

pytestmark = pytest.mark.usefixtures("cluster")


def write_fasta(path, sequences, name="p{}"):
    path.write_text("".join(f">{name.format(n)}\n{s}\n" for n, s in enumerate(sequences)))
    return path


def run(work, inputs, folder, watch=lambda *told: None, **settings):
    output = OutputFolder.at(folder)
    settings = BulkSettings(**{"workers": 2, "memory_gb": 0.6, "timeout_s": 60.0} | settings)
    return run_bulk(work, find_sources(inputs), output, settings, watch)


def parts_of(folder):
    return {path.name: path.read_bytes() for path in sorted((folder / "parts").iterdir())}


def values_of(folder):
    table = pq.read_table(folder / "parts")
    return table["id"].to_pylist(), table["value"].to_pylist()


def assert_tidy(folder):
    left = {path.name for path in folder.iterdir()}
    assert left == {".lock", "parts", "manifest.json", "rejects.parquet"}
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["finished"] is True
    assert manifest["counts"]["parts"] == len(list((folder / "parts").iterdir()))


def engines_of(folder):
    """Processes that compute for a work whose log lies in this folder, with their workers."""
    text = (folder / "log").read_text() if (folder / "log").exists() else ""
    found = []
    for pid in sorted({int(line.split()[0]) for line in text.splitlines() if " " in line}):
        with suppress(psutil.NoSuchProcess):
            worker = psutil.Process(pid).parent()
            if worker and "UnitWorker" in worker.name() + " ".join(worker.cmdline()):
                found.append((psutil.Process(pid), worker))
    return found


@pytest.fixture(scope="module")
def plain(cluster, tmp_path_factory):
    """An input, and what an uninterrupted job of one worker makes of it."""
    folder = tmp_path_factory.mktemp("plain")
    sequences = [random_sequence(int(generator().integers(9, 40))) for _ in range(120)]
    sequences[5] = sequences[4]
    file = write_fasta(folder / "a.fasta", sequences)
    told = []
    work = ManyUnits(str(folder / "log"))
    outcome = run(work, [file], folder / "out", lambda *each: told.append(each), workers=1)
    return file, sequences, folder / "out", work, outcome, told


def test_a_job_computes_each_once_in_order_and_tells_of_its_progress(plain, tmp_path):
    file, sequences, out, work, outcome, told = plain
    assert values_of(out) == ([f"p{n}" for n in range(120)], [check_sum(s) for s in sequences])
    assert len(work.computed()) == 119, "equal ones in a unit are computed once"
    assert (outcome.rows, outcome.rejects, outcome.parts) == (120, 0, 15)
    total = sum(map(len, sequences))
    assert outcome.residues == outcome.computed_residues == total
    assert told[0] == (0, total, 0.0)
    assert told[-1][:2] == (total, total)
    assert [done for done, *_ in told] == sorted(done for done, *_ in told)
    assert told[-1][2] > 0
    assert outcome.startup_s > 0
    assert_tidy(out)
    text = describe(outcome, OutputFolder.at(out), price_per_hour=36.0)
    assert "120 rows" in text
    assert "residues/s" in text
    hours = 1e6 * outcome.seconds / 120 / 3600
    assert f"{hours:,.2f} hours, {36 * hours:,.2f} at 36 an hour" in text
    again = run(work, [file], out)
    assert (again.rows, again.computed_records) == (120, 0)
    assert len(work.computed()) == 119
    assert "Nothing was left" in describe(again, OutputFolder.at(out), 1.0)


def test_killed_workers_and_engines_change_no_byte(plain, tmp_path):
    file, _, out, *_ = plain
    work = ManyUnits(str(tmp_path / "log"), seconds=0.2)
    killed = []

    def kill():
        while len(killed) < 2 and not (tmp_path / "out/rejects.parquet").exists():
            time.sleep(0.2)
            for engine, worker in engines_of(tmp_path)[:1]:
                with suppress(psutil.NoSuchProcess):  # it has just ended by itself
                    killed.append(engine if len(killed) % 2 else worker)
                    killed[-1].kill()

    thread = threading.Thread(target=kill)
    thread.start()
    outcome = run(work, [file], tmp_path / "out")
    thread.join()
    assert len(killed) >= 2, "one of each kind"
    assert (outcome.rows, outcome.rejects) == (120, 0)
    assert parts_of(tmp_path / "out") == parts_of(out)
    assert_tidy(tmp_path / "out")


def test_deadly_records_are_found_and_rejected_and_the_rest_is_computed(tmp_path):
    sequences = [random_sequence(9) for _ in range(40)]
    deadly = {3: SEGV, 4: SEGV + "A", 17: MEMORY, 30: SLEEP, 39: RAISE}
    for index, letters in deadly.items():
        sequences[index] = letters
    file = write_fasta(tmp_path / "a.fasta", sequences)
    work = ManyUnits(str(tmp_path / "log"))
    outcome = run(work, [file], tmp_path / "out", timeout_s=3.0)
    assert (outcome.rows, outcome.rejects) == (35, 5)
    ids, values = values_of(tmp_path / "out")
    assert ids == [f"p{n}" for n in range(40) if n not in deadly]
    assert values == [check_sum(s) for n, s in enumerate(sequences) if n not in deadly]
    rejects = pq.read_table(tmp_path / "out/rejects.parquet").to_pylist()
    assert [each["id"] for each in rejects] == [f"p{n}" for n in deadly]
    assert [each["line"] for each in rejects] == [2 * n + 1 for n in deadly]
    assert [each["length"] for each in rejects] == [len(s) for s in deadly.values()]
    assert {each["file"] for each in rejects} == {str(file)}
    reasons = [each["reason"].split(" at ")[0] for each in rejects]
    assert reasons == [
        *["killed its process: SIGSEGV"] * 2,
        "out of memory: needed more than 0.6 GB",
        "timed out: took longer than 3 s",
        "failed: ValueError",
    ]
    assert_tidy(tmp_path / "out")
    text = describe(outcome, OutputFolder.at(tmp_path / "out"), None)
    assert "5 records rejected: 2 killed its process, " in text
    assert "1 timed out" in text


@pytest.mark.parametrize("letters", ["MKLV", None])
def test_an_engine_of_no_use_ends_the_job_in_one_sentence(tmp_path, letters):
    file = write_fasta(tmp_path / "a.fasta", [letters or random_sequence(9)] * 20)
    if letters:
        work, message = DeadlyWork(str(tmp_path / "log")), "dies of a plain protein too"
    else:
        work, message = ManyUnits(str(tmp_path / "log"), at_opening="die"), "while it opens"
    with pytest.raises(RaptideError, match=message) as caught:
        run(work, [file], tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "out").glob("rejects*")), "no record is to blame"
    healthy = ManyUnits(str(tmp_path / "log"))
    assert run(healthy, [file], tmp_path / "out").rows == 20
    assert_tidy(tmp_path / "out")


def test_a_job_goes_on_with_what_is_missing_alone(plain, tmp_path):
    """Parts, rejects and notes as a killed job leaves them."""
    file, sequences, out, *_ = plain
    folder = tmp_path / "out"
    work = ManyUnits(str(tmp_path / "log"))
    run(work, [file], folder)
    names = sorted(path.name for path in (folder / "parts").iterdir())
    for name in names[::3]:
        (folder / "parts" / name).unlink()
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"finished": False}))
    (folder / "rejects.parquet").unlink()
    (folder / "partial").mkdir()
    (folder / "partial/parts-half.parquet.12345678").write_text("half")
    before, told = len(work.computed()), []
    outcome = run(work, [file], folder, lambda *each: told.append(each), workers=1)
    assert 0 < len(work.computed()) - before <= 8 * len(names[::3])
    assert outcome.rows == 120
    assert outcome.residues == sum(map(len, sequences)) > outcome.computed_residues > 0
    assert told[0][0] == outcome.residues - outcome.computed_residues
    assert parts_of(folder) == parts_of(out)
    assert_tidy(folder)


def test_rejects_outlive_a_kill_between_the_last_steps(tmp_path):
    """Gathered, but the manifest does not say so yet, and some single ones are deleted."""
    file = write_fasta(tmp_path / "a.fasta", ["MKLV", "M1"] * 30)
    work, folder = ManyUnits(str(tmp_path / "log")), tmp_path / "out"
    output = OutputFolder.at(folder)
    finish = OutputFolder.finish
    OutputFolder.finish = lambda self, manifest: exec("raise KeyboardInterrupt")
    try:
        with pytest.raises(KeyboardInterrupt):
            run(work, [file], folder)
    finally:
        OutputFolder.finish = finish
    rejects = pq.read_table(folder / "rejects.parquet")
    assert rejects.num_rows == 30
    assert run(work, [file], folder).rejects == 30
    assert pq.read_table(folder / "rejects.parquet").equals(rejects)
    assert_tidy(folder)
    victim = next((folder / "parts").iterdir())
    content = victim.read_bytes()
    victim.unlink()
    assert run(work, [file], folder).rejects == 30
    assert pq.read_table(folder / "rejects.parquet").equals(rejects)
    assert victim.read_bytes() == content
    assert output.manifest()["counts"] == {"rows": 30, "rejects": 30, "parts": 8}


def test_another_job_is_refused_and_replaced_when_asked(plain, tmp_path):
    file, *_ = plain
    folder, log = tmp_path / "out", str(tmp_path / "log")
    few = write_fasta(tmp_path / "few.fasta", ["MKLV", "MK"])
    run(ManyUnits(log), [few], folder)
    before = parts_of(folder)
    for work, inputs, field in [
        (ManyUnits(log, seed=1), [few], r"\(seed: 0 there, 1 here\)"),
        (ManyUnits(log), [file], r"\(inputs: .* there, .* here\)"),
        (ManyUnits(log), [few, few], r"\(inputs: "),
        (ManyUnits(log), [few], r"\(threads: 1 there, 2 here\)"),
    ]:
        with pytest.raises(ConfigError, match=field):
            run(work, inputs, folder, threads=2 if "threads" in field else 1)
        assert parts_of(folder) == before
    (folder / "mine.txt").write_text("keep")
    (folder / "parts/mine.parquet").write_bytes(next(iter(before.values())))
    for settings in ({}, {"replace": True}):
        with pytest.raises(ConfigError, match=r"parts holds 'mine.parquet'"):
            run(ManyUnits(log), [few], folder, **settings)
    assert parts_of(folder) == before | {"mine.parquet": next(iter(before.values()))}
    (folder / "parts/mine.parquet").unlink()
    run(ManyUnits(log, seed=1), [file], folder, replace=True)
    assert (folder / "mine.txt").read_text() == "keep"
    assert not parts_of(folder).keys() & before.keys()
    assert values_of(folder)[0] == [f"p{n}" for n in range(120)]


@pytest.mark.parametrize(
    "name", ["inputs/a.fasta", "notes.txt", "parts/x.parquet", "partial/x", "manifest.json"]
)
@pytest.mark.parametrize("replace", [False, True])
def test_a_folder_of_somebody_else_is_refused_and_untouched(tmp_path, name, replace):
    few = write_fasta(tmp_path / "few.fasta", ["MKLV"])
    folder = tmp_path / "out"
    (folder / name).parent.mkdir(parents=True)
    (folder / name).write_text('{"digest": "of a corpus, say"}')
    before = sorted(folder.rglob("*"))
    with pytest.raises(ConfigError, match="holds files that no job of this kind wrote"):
        run(ManyUnits(str(tmp_path / "log")), [few], folder, replace=replace)
    assert sorted(each for each in folder.rglob("*") if each.name != ".lock") == before


def test_a_damaged_input_leaves_no_folder_behind(tmp_path):
    (tmp_path / "a.fasta").write_text("no fasta\n")
    work = ManyUnits(str(tmp_path / "log"))
    with pytest.raises(FastaError, match=r"a\.fasta:1: text before the first > line"):
        run(work, [tmp_path / "a.fasta"], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    with pytest.raises(FastaError):
        run(work, [tmp_path / "a.fasta"], tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_tables_folders_and_an_output_among_the_inputs(tmp_path):
    inputs = tmp_path / "inputs"
    (inputs / "deep").mkdir(parents=True)
    sequences = [random_sequence(9) for _ in range(200)]
    write_fasta(inputs / "deep/a.fa", sequences[:50])
    names = [None, "NA", "007", *[f"t{n}" for n in range(147)]]
    letters = [*sequences[50:-3], None, "", "MK1"]
    table = pa.table({"extra": range(150), "sequence": letters, "id": names})
    pq.write_table(table, inputs / "b.parquet", row_group_size=17)
    work = ManyUnits(str(tmp_path / "log"))
    for _ in range(2):  # the second time, the output lies among the inputs
        outcome = run(work, [inputs], inputs / "out")
        ids, values = values_of(inputs / "out")
        assert ids == ["", "NA", "007", *names[3:-3], *[f"p{n}" for n in range(50)]]
        assert values == [check_sum(s) for s in sequences[50:-3] + sequences[:50]]
        rejects = pq.read_table(inputs / "out/rejects.parquet").to_pylist()
        assert [each["line"] for each in rejects] == [148, 149, 150]
        assert [each["reason"].split(":")[0] for each in rejects] == ["empty"] * 2 + ["bad letters"]
        assert outcome.rejects == 3


def test_two_jobs_at_once(tmp_path):
    few = write_fasta(tmp_path / "few.fasta", ["MKLV"])
    output = OutputFolder.at(tmp_path / "out")
    with output.alone(), pytest.raises(ConfigError, match="Another job writes to"):
        run(ManyUnits(str(tmp_path / "log")), [few], tmp_path / "out")
    assert run(ManyUnits(str(tmp_path / "log")), [few], tmp_path / "out").rows == 1
