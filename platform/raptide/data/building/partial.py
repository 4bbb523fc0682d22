"""The folder in which a corpus is built until it is whole.

    corpora/x.partial/
      plan.json              what an interrupted build must share with the one that goes on
      survey.json, notes/    what the first pass has found
      train-00000-00.parquet, …
      bucket-00000.json      what the manifest is to say of a bucket whose shards are all there
      drafts-…/              shards that a task is writing
      attempts/              whose the build is (attempts.py)

Of two builds of one corpus the one that began last goes on. What it finds finished stays, and what
the other one still writes does not get in its way: it is equal, and whole or not there.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from raptide.attempts import ATTEMPTS, Attempts
from raptide.data.building.shards import BucketReport
from raptide.errors import RaptideError, Superseded, find_os_error
from raptide.patience import patiently, reason_of, trouble, unreadable
from raptide.small_files import write_whole
from raptide.storage import PARTIAL, Storage

PLAN, SURVEY, NOTES, DRAFTS = "plan.json", "survey.json", "notes", "drafts-"


@dataclass(frozen=True)
class PartialFolder:
    """A corpus that is not whole yet, in the hands of one attempt at it. Safe to pickle."""

    path: Path
    attempt: str
    """Its name."""

    @classmethod
    def open(cls, path: Path, plan: dict[str, Any], say: Callable[[str], None]) -> PartialFolder:
        """Take a folder over from whoever built there, or begin anew where that was another plan.

        Raises:
            Superseded: another build of it began meanwhile.
        """
        if read_json(path / PLAN) == plan:
            say(f"Going on with the interrupted build in {path}")
        else:
            shutil.rmtree(path, ignore_errors=True)
            (path / NOTES).mkdir(parents=True)
            write_whole(path / PLAN, json.dumps(plan))
        attempt = Attempts(Storage.of(path)).begin()
        for drafts in path.glob(f"{DRAFTS}*"):
            shutil.rmtree(drafts, ignore_errors=True)
        return cls(path, attempt.name)

    @property
    def notes(self) -> Path:
        return self.path / NOTES

    @property
    def survey(self) -> Path:
        return self.path / SURVEY

    def refuse_others(self) -> None:
        """
        Raises:
            Superseded: another build owns the folder.
        """
        Attempts(Storage.of(self.path)).refuse_others(self.attempt)

    @contextmanager
    def explaining_errors(self) -> Iterator[None]:
        """Within the block, what goes wrong because another build has taken over is told as that,
        and what the file system refuses in one sentence.

        Raises:
            Superseded: another build owns the folder.
            StorageStumbled: the file system failed again and again.
            RaptideError: it always will.
        """
        try:
            yield
        except Superseded:
            raise
        except Exception as error:
            self.refuse_others()
            refused = None if isinstance(error, RaptideError) else find_os_error(error)
            if refused is None:
                raise
            raise trouble(
                refused,
                f"The build in {self.path} broke off ({reason_of(refused)}); see to its file "
                "system, and give the command again: it goes on where it was.",
            ) from None

    def write_bucket(self, bucket: int, write: Callable[[Path], BucketReport]) -> None:
        """Add a bucket's shards, and then its report.

        Args:
            write: writes the shards into a folder, and reports on them.

        Raises:
            Superseded: another build owns the folder.
            OSError: the file system refuses for good, or again and again.
        """
        report = patiently(partial(self._write_shards, write))
        write_whole(self._report_of(bucket), json.dumps(report))

    def _write_shards(self, write: Callable[[Path], BucketReport]) -> BucketReport:
        drafts = Path(tempfile.mkdtemp(prefix=DRAFTS, dir=self.path))
        try:
            report = write(drafts)
            self.refuse_others()
            for shard in report["shards"]:
                (drafts / shard["name"]).replace(self.path / shard["name"])
            return report
        finally:
            shutil.rmtree(drafts, ignore_errors=True)

    def report(self, bucket: int) -> BucketReport | None:
        """A bucket's report, None if its shards are not all there."""
        report: BucketReport | None = read_json(self._report_of(bucket))
        if report is None:
            return None
        files = [(self.path / shard["name"], shard["bytes"]) for shard in report["shards"]]
        whole = all(file.exists() and file.stat().st_size == size for file, size in files)
        return report if whole else None

    def _report_of(self, bucket: int) -> Path:
        return self.path / f"bucket-{bucket:05d}.json"

    def finish(self, output: Path, buckets: int) -> None:
        """Give the folder its name, once its manifest is there.

        Raises:
            Superseded: another build owns the folder.
        """
        shutil.rmtree(self.notes)
        for file in (self.path / PLAN, self.survey, *map(self._report_of, range(buckets))):
            file.unlink(missing_ok=True)
        self.refuse_others()
        for folder in (ATTEMPTS, PARTIAL):
            shutil.rmtree(self.path / folder, ignore_errors=True)
        self.path.rename(output)

    def give_up(self) -> None:
        """Leave nothing, unless another build owns the folder."""
        with suppress(RaptideError):
            self.refuse_others()
            shutil.rmtree(self.path)


def read_json(file: Path) -> Any:
    """None where there is no such file, or nothing whole in it.

    Raises:
        RaptideError: the file system does not give it out.
    """
    try:
        return json.loads(patiently(file.read_text))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise unreadable(str(file), error) from None
    except ValueError:
        return None
