"""Draw a bulk job's lineage in W&B: model to data set."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, cast

from raptide.bulk.folder import MANIFEST, OutputFolder
from raptide.bulk.job import Outcome
from raptide.bulk.work import Model
from raptide.training.planning.recipe import TrackingSettings
from raptide.training.watching.tracking import resolve_mode


def log_output(output: OutputFolder, outcome: Outcome, models: list[Model]) -> None:
    """Log the output as an artifact that refers to its folder, with the models it was made with.

    Offline W&B cannot look up what a run uses, so there the models count as made by it.
    """
    import wandb

    manifest = output.manifest() or {}
    mode = resolve_mode(TrackingSettings())
    run = wandb.init(
        project=TrackingSettings().project,
        job_type=manifest["fingerprint"]["work"],
        config=manifest["fingerprint"],
        mode=cast(Any, mode),
        settings=wandb.Settings(silent=True, console="off"),
    )
    for model in models:
        artifact = wandb.Artifact(f"model-{model.digest[:16]}", "model")
        artifact.add_reference(Path(model.path).as_uri(), checksum=False)
        if run.offline:
            run.log_artifact(artifact)
        else:  # not exercised without a network
            run.use_artifact(artifact)
    facts = {"counts": manifest["counts"], "inputs": manifest["inputs"][:100]}
    name = re.sub(r"[^\w.-]", "-", Path(output.name).name, flags=re.ASCII)
    data = wandb.Artifact(f"{manifest['fingerprint']['work']}-{name}", "dataset", metadata=facts)
    data.add_reference(_uri(output), checksum=False)
    run.log_artifact(data)
    run.log(
        {
            "bulk/rows": outcome.rows,
            "bulk/rejects": outcome.rejects,
            "bulk/residues": outcome.residues,
            "bulk/seconds": outcome.seconds,
        }
    )
    run.finish()
    wandb.teardown()  # its service ends here, and not at some moment of this process's end


def _uri(output: OutputFolder) -> str:
    path = output.path(MANIFEST)
    return (
        Path(path).as_uri()
        if output.storage.is_local
        else f"{output.storage.filesystem.type_name}://{path}"
    )
