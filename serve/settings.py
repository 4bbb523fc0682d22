"""What the application is deployed with: `serve run serve.app:build model=FOLDER ...`.

Options of a model given at the top hold for all models; an entry of `models` may set its own.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from raptide.config import Settings, parse_settings
from raptide.errors import ConfigError


class ModelOptions(Settings):
    """How one model is served."""

    replicas: int = Field(1, ge=1)
    """How many there always are, unless `max_replicas` is set."""

    min_replicas: int = Field(1, ge=0)
    """With `max_replicas`: the fewest. 0 frees the GPUs of an idle model; its next request then
    waits until a replica has loaded."""

    max_replicas: int | None = Field(None, ge=1)
    """Scale between `min_replicas` and this by the tokens that wait; None keeps `replicas`."""

    target_tokens_per_replica: int = Field(32_768, ge=1)
    """Waiting and running tokens a replica should have: about what it computes in a second."""

    upscale_delay_s: float = Field(5.0, ge=0.0)
    """How long more replicas must be wanted before they are started."""

    downscale_delay_s: float = Field(300.0, ge=0.0)
    """How long fewer must be wanted before some are stopped."""

    dtype: Literal["auto", "fp32", "bf16"] = "auto"

    gpus_per_replica: float = Field(0.0, ge=0.0)

    cpus_per_replica: float = Field(1.0, gt=0.0)
    """Also the threads a CPU replica computes with."""

    max_batch_tokens: int = Field(4096, ge=1)
    """Tokens in one forward pass."""

    max_queued_tokens: int = Field(262_144, ge=1)
    """Tokens that may wait at a replica. A request that finds no room is refused with 429, one that
    alone takes more with 422; masking each residue in turn takes a pass per residue."""

    model_cache_gb: float = Field(200.0, gt=0.0)
    """Of each node's disk, for the files of models (`~/.cache/raptide`, or $RAPTIDE_CACHE); beyond
    it those go that were opened longest ago and that no replica has open."""


class ModelSettings(ModelOptions):
    """One model."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """What clients call it."""

    path: str
    """A bundle, a checkpoint, or a run folder (its newest checkpoint is taken); also by URI."""


class ServedModel(ModelSettings):
    """One model as its replicas find it; `path` is where its files are fetched from."""

    digest: str
    """Of all its files (`raptide.kept.digest_of`)."""


class GatewaySettings(Settings):
    """What the gateways keep to."""

    gateways: int = Field(1, ge=1)
    """Processes that take requests. Each has a share of every key's rate."""

    max_sequences: int = Field(256, ge=1)
    """Sequences, or variants, in one request."""

    max_residues: int = Field(4096, ge=1)
    """Residues in one sequence; the model's own limit counts too."""

    max_body_bytes: int = Field(8 * 2**20, ge=1024)
    """Bytes of a request; reading stops there."""

    max_answer_bytes: int = Field(2**30, ge=1024)
    """Bytes of an answer by Arrow or gRPC, which are sent as they are computed."""

    max_json_bytes: int = Field(2**26, ge=1024)
    """Bytes of an answer in JSON, which is computed as a whole first."""

    max_held_bytes: int = Field(2**30, ge=1024)
    """Bytes of answers that one gateway holds at a time; further requests wait for their turn."""

    max_body_s: float = Field(30.0, gt=0.0)
    """Seconds in which a request's body has to come."""

    timeout_s: float = Field(120.0, gt=0.0)
    """Seconds a request may take, waiting included; X-Raptide-Timeout-S may ask for less."""

    keys_file: str | None = None
    """API keys, hashed (gateway/keys.py). Read again whenever it changes; every node needs it."""

    residues_per_minute: int | None = Field(None, ge=1)
    """What a key may send whose line sets no other rate; None means any number."""

    cors_origins: list[str] = Field(default_factory=list)
    """Web pages that browsers let call the endpoint, e.g. https://lab.example; none by default."""


class ServeSettings(GatewaySettings, ModelOptions):
    """Arguments of `serve.app:build`."""

    model: str | None = None
    """The path of the only model; or give `models`."""

    name: str = "raptide"
    """What clients call the only model."""

    staging: str | None = None
    """A folder or URI that every node reaches, where models are put at the deploy, by digest; None
    takes the folder `served/` of the run that a model comes from (serve/models.py)."""

    models: list[dict[str, Any]] = Field(default_factory=list)
    """Several models: `name`, `path` and options of their own each."""

    @model_validator(mode="after")
    def _one_way(self) -> ServeSettings:
        if bool(self.model) == bool(self.models):
            raise ValueError("give either `model` (one path) or `models` (a list)")
        return self

    def model_settings(self) -> list[ModelSettings]:
        """Each model with its options.

        Raises:
            ConfigError: an entry is wrong, or two have one name.
        """
        shared = {name: getattr(self, name) for name in ModelOptions.model_fields}
        entries = self.models or [{"name": self.name, "path": self.model}]
        found = [
            parse_settings(ModelSettings, {**shared, **entry}, source=f"serve arguments, model {i}")
            for i, entry in enumerate(entries)
        ]
        names = [model.name for model in found]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ConfigError(f"Two models are called {min(twice)!r}; give each its own name.")
        for model in found:
            if model.max_replicas is not None and model.max_replicas < max(1, model.min_replicas):
                raise ConfigError(
                    f"Model {model.name!r}: max_replicas is {model.max_replicas}, but min_replicas "
                    f"is {model.min_replicas}; raise it."
                )
        return found

    def gateway_settings(self) -> GatewaySettings:
        return GatewaySettings(**{n: getattr(self, n) for n in GatewaySettings.model_fields})
