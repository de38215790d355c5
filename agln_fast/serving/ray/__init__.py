"""Bundles on a Ray cluster: `serve run agln_fast.serving.ray:app bundle=street.agln`."""

from pathlib import Path
from typing import Any, Self

from agln_fast import environment
from agln_fast.bundle import open_bundle
from agln_fast.errors import MissingPackageError

try:
    from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
    from ray import serve

    from agln_fast.serving.ray.bundles import BATCHES, OPTIONS, Bundles
    from agln_fast.serving.ray.ingress import Ingress, web
except ModuleNotFoundError as error:
    raise MissingPackageError(error.name or "ray", "ray") from None

__all__ = ["Arguments", "app"]

if not environment.allow_telemetry():
    environment.forbid_reports()


class Arguments(BaseModel):
    """What `app` takes, `NAME=VALUE` on the command line of `serve run`, or `args` in a file for `serve deploy`.

    bundle: one, whose name is the folder's. bundles: several, by name; on the command line NAME=PATH,NAME=PATH.
        Every node finds them at these paths.
    backend, precision, device, threads, wait_ms: as `agln_fast.serving.worker.Engine`; threads: None for as many as
        the replica has CPUs. They are the `user_config` of `Bundles`, where they can be changed while it runs.
    cpus, gpus: of each replica. models_per_replica: bundles that it holds at once.
    min_replicas, max_replicas: Ray starts more, and ends them, as requests come.
    queue: requests of an ingress that wait for a replica; more get 503. timeout_s: until a request is late.
    max_body_mib: the largest request.
    """

    model_config = ConfigDict(extra="forbid")

    bundle: str | None = None
    bundles: dict[str, str] = {}
    backend: str = "auto"
    precision: str | None = None
    device: str | None = None
    threads: int | None = Field(default=None, ge=1)
    wait_ms: float = Field(default=0.0, ge=0)
    cpus: float = Field(default=1.0, ge=0)
    gpus: float = Field(default=0.0, ge=0)
    models_per_replica: int = Field(default=4, ge=1)
    min_replicas: int = Field(default=1, ge=0)
    max_replicas: int = Field(default=4, ge=1)
    queue: int = Field(default=64, ge=1)
    timeout_s: float = Field(default=30.0, gt=0)
    max_body_mib: int = Field(default=32, ge=1)

    @field_validator("bundles", mode="before")
    @classmethod
    def _of_command_line(cls, given: Any) -> Any:
        if isinstance(given, str):
            named = (pair if "=" in pair else f"{_name(pair)}={pair}" for pair in given.split(","))
            return dict(pair.split("=", 1) for pair in named)
        return given

    @model_validator(mode="after")
    def _named(self) -> Self:
        if self.bundle is not None:
            self.bundles = {_name(self.bundle): self.bundle, **self.bundles}
            self.bundle = None
        if not self.bundles:
            raise ValueError("no bundle: give bundle=PATH, or bundles=NAME=PATH,NAME=PATH")
        self.bundles = {name: str(Path(path).absolute()) for name, path in self.bundles.items()}
        return self

    def user_config(self) -> dict[str, Any]:
        """Of `Bundles`."""
        return {name: getattr(self, name) for name in OPTIONS}


def _name(path: str) -> str:
    return Path(path).absolute().name.removesuffix(".agln")


def app(arguments: Arguments) -> serve.Application:
    """The application.

    Raises:
        BundleError: a bundle that cannot be opened here.
    """
    most = max(open_bundle(path).manifest.contract.max_batch for path in arguments.bundles.values())
    bundles: Any = serve.deployment(
        Bundles,
        ray_actor_options={"num_cpus": arguments.cpus, "num_gpus": arguments.gpus},
        autoscaling_config={
            "min_replicas": arguments.min_replicas,
            "max_replicas": max(arguments.min_replicas, arguments.max_replicas),
            "target_ongoing_requests": BATCHES * most,
        },
        max_ongoing_requests=(BATCHES + 1) * most,  # while they run, the next batch is decoded
        max_queued_requests=arguments.queue,
        user_config=arguments.user_config(),
        health_check_period_s=5,
        health_check_timeout_s=30,
        graceful_shutdown_wait_loop_s=0.5,
        graceful_shutdown_timeout_s=arguments.timeout_s,
    )
    body_bytes = arguments.max_body_mib << 20
    ingress: Any = serve.deployment(
        serve.ingress(lambda: web(body_bytes))(Ingress),
        name="Ingress",
        num_replicas=2,  # one takes over while the other is replaced
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=1000,
        graceful_shutdown_wait_loop_s=0.5,
        graceful_shutdown_timeout_s=arguments.timeout_s,
    )
    application: serve.Application = ingress.bind(
        tuple(arguments.bundles),
        bundles.bind(arguments.bundles, arguments.models_per_replica),
        timeout_s=arguments.timeout_s,
    )
    return application
