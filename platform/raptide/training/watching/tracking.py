"""Metrics of a run: W&B, a plain JSONL copy and Prometheus, from rank 0 alone."""

from __future__ import annotations

import json
import netrc
import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, cast
from urllib.parse import urlsplit

from raptide.data.corpus import MANIFEST, Corpus
from raptide.training.planning.recipe import Recipe, TrackingSettings
from raptide.training.watching.exporting import RunExporter

STEP = "trainer/global_step"
METRICS = "metrics.jsonl"


class Tracker:
    """Writes metrics to `metrics.jsonl`, and to W&B under an id that survives restarts."""

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
    ) -> None:
        """
        Args:
            exporter: shows the metrics to Prometheus as well; closed with this.
        """
        self._exporter = exporter
        self._file = (run_folder / METRICS).open("a")
        self._wandb: Any = None
        if mode == "disabled":
            return
        import wandb

        self._wandb = wandb.init(
            project=settings.project,
            name=name,
            id=run_id,
            resume="allow",
            dir=str(run_folder),
            mode=cast(Any, mode),
            config=config,
            settings=wandb.Settings(silent=True, console="off"),
        )
        # After a rollback W&B drops steps below its last; an axis of our own keeps them.
        self._wandb.define_metric(STEP)
        self._wandb.define_metric("*", step_metric=STEP)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        record = {STEP: step, **metrics}
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        if self._exporter is not None:
            self._exporter.export(record)
        if self._wandb is not None:
            self._wandb.log(record)

    def link(self, kind: Literal["corpus", "model"], name: str, uri: str, **facts: Any) -> None:
        """Draw the lineage: corpus to run, run to model, as artifacts that refer to a URI.

        Offline W&B cannot look up what a run uses, so there the corpus counts as made by it.
        """
        if self._wandb is None:
            return
        import wandb

        artifact = wandb.Artifact(f"{kind}-{name}", kind, metadata=facts)
        artifact.add_reference(uri, checksum=False)
        if kind == "corpus" and not self._wandb.offline:  # not exercised without a network
            self._wandb.use_artifact(artifact)
        else:
            self._wandb.log_artifact(artifact)

    def link_corpora(self, corpora: Sequence[Corpus]) -> None:
        for corpus in corpora:
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
        self._file.close()
        if self._exporter is not None:
            self._exporter.close()
        if self._wandb is not None:
            self._wandb.finish(exit_code=0 if error is None else 1)


def start_tracking(
    recipe: Recipe, run_folder: Path, run_id: str, corpora: Sequence[Corpus], facts: dict[str, Any]
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
