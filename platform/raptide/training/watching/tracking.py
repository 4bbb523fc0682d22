"""Metrics of a run: W&B, a plain JSONL copy and Prometheus, from rank 0 alone."""

from __future__ import annotations

import netrc
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, cast
from urllib.parse import urlsplit

from raptide.data.corpus import MANIFEST, Corpus
from raptide.small_files import LinesFile
from raptide.training.planning.recipe import Recipe, TrackingSettings
from raptide.training.watching.exporting import RunExporter

STEP = "trainer/global_step"
METRICS = "metrics.jsonl"


FINISH_S = 300.0
"""Seconds that the end of a run waits for W&B to take what it has not taken yet."""


class Tracker:
    """Writes metrics to `metrics.jsonl` and to W&B under an id that survives restarts.

    Nothing that W&B does ends a run: what it cannot do is told, and the run goes on without.
    """

    def __init__(
        self,
        settings: TrackingSettings,
        run_folder: Path,
        *,
        mode: str,
        run_id: str,
        name: str,
        config: dict[str, Any],
        exporter: RunExporter | None = None,
        warn: Callable[[str], Any] = print,
    ) -> None:
        """
        Args:
            mode: of W&B: online, offline or disabled.
            exporter: shows the metrics to Prometheus as well; closed with this.
            warn: told, in a sentence, what W&B cannot do.
        """
        self._exporter, self._warn = exporter, warn
        self._lines = LinesFile(run_folder / METRICS, warn)
        self._wandb: Any = None
        if mode == "disabled":
            return
        options = {"project": settings.project, "name": name, "id": run_id, "config": config}
        self._wandb = _begin_wandb(mode, {**options, "dir": str(run_folder)}, warn)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        record = {STEP: step, **metrics}
        self._lines.write(record)
        if self._exporter is not None:
            self._exporter.export(record)
        if self._wandb is not None:
            try:
                self._wandb.log(record)
            except Exception as error:
                self._warn(f"W&B takes no more metrics ({_reason(error)}); {METRICS} has them all.")
                self._wandb = None

    def link(self, kind: Literal["corpus", "model"], name: str, uri: str, **facts: Any) -> None:
        """Draw the lineage: corpus to run, run to model, as artifacts that refer to a URI.

        Offline W&B cannot look up what a run uses, so there the corpus counts as made by it.
        """
        if self._wandb is None:
            return
        try:
            artifact = _refer(f"{kind}-{name}", kind, uri, facts)
            if kind == "corpus" and not self._wandb.offline:  # not exercised without a network
                self._wandb.use_artifact(artifact)
            else:
                self._wandb.log_artifact(artifact)
        except Exception as error:
            self._warn(f"W&B was not told of the {kind} {uri} ({_reason(error)}).")

    def link_corpora(self, corpora: Sequence[Corpus]) -> None:
        for corpus in corpora:
            uri = corpus.files.name(MANIFEST)
            if not corpus.files.is_far:
                uri = (corpus.path.resolve() / MANIFEST).as_uri()
            self.link("corpus", corpus.digest[:16], uri, **corpus_facts(corpus))

    def __enter__(self) -> Tracker:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._lines.close()
        if self._exporter is not None:
            self._exporter.close()
        if self._wandb is not None:
            try:
                self._wandb.finish(exit_code=0 if error is None else 1)
            except Exception as trouble:
                self._warn(f"W&B did not take the end of the run ({_reason(trouble)}).")


def _begin_wandb(mode: str, options: dict[str, Any], warn: Callable[[str], Any]) -> Any:
    """W&B's run, offline where W&B cannot be reached; None where it cannot be begun at all."""
    import wandb

    settings = wandb.Settings(silent=True, console="off", finish_timeout=FINISH_S)
    for tried in dict.fromkeys((mode, "offline")):
        try:
            run = wandb.init(mode=cast(Any, tried), resume="allow", settings=settings, **options)
            # After a rollback W&B drops steps below its last; an axis of our own keeps them.
            run.define_metric(STEP)
            run.define_metric("*", step_metric=STEP)
            return run
        except Exception as error:
            instead = "without it" if tried == "offline" else "offline: `wandb sync` sends it later"
            warn(f"W&B cannot be reached ({_reason(error)}); the run goes on {instead}.")
            wandb.teardown()  # its service holds the run's id
    return None


def _refer(name: str, kind: str, uri: str, facts: dict[str, Any]) -> Any:
    """An artifact that refers to a URI."""
    import wandb
    from wandb.sdk.artifacts.artifact_manifest_entry import ArtifactManifestEntry

    artifact = wandb.Artifact(name, kind, metadata={**facts, "uri": uri})
    if urlsplit(uri).scheme == "file":
        artifact.add_reference(uri, checksum=False)
    else:  # what `add_reference` does, too, once it has the cloud's own client library
        artifact.manifest.add_entry(ArtifactManifestEntry(path=kind, ref=uri, digest=uri))
    return artifact


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def start_tracking(
    recipe: Recipe,
    run_folder: Path,
    run_id: str,
    corpora: Sequence[Corpus],
    facts: dict[str, Any],
    warn: Callable[[str], Any],
) -> Tracker:
    """The tracker of a run; `facts` join the recipe and the corpora in W&B's configuration."""
    known = [corpus_facts(corpus) for corpus in corpora]
    return Tracker(
        recipe.tracking,
        run_folder,
        mode=resolve_mode(recipe.tracking),
        run_id=run_id,
        name=recipe.name,
        config=recipe.model_dump()
        | {"corpus_manifest": known[0] if len(known) == 1 else known, **facts},
        exporter=RunExporter(run_folder.name),
        warn=warn,
    )


def corpus_facts(corpus: Corpus) -> dict[str, Any]:
    """What a corpus's manifest says, without its lists of files."""
    return {k: v for k, v in corpus.manifest.items() if k not in ("shards", "inputs")}


def resolve_mode(settings: TrackingSettings) -> str:
    """What `auto` means here: WANDB_MODE if set, online with a key at hand, else offline."""
    if settings.mode != "auto":
        return settings.mode
    if mode := os.environ.get("WANDB_MODE"):
        return mode
    return "online" if _has_key() else "offline"


def _has_key() -> bool:
    """Whether W&B would find a key: in the environment, or where `wandb login` puts it."""
    if "WANDB_API_KEY" in os.environ:
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc.netrc().authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
