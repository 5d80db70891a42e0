"""Many replicas behind one address, on Ray Serve: `python -m deploy.ray_serve --model FOLDER --replicas 2`.

`build` makes the application, for this command and for Ray's own (`serve deploy`, KubeRay; see ray_serve.yaml).
"""

import logging
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import fields, replace
from threading import Event
from types import FrameType
from typing import Any

import ray
import typer
from ray import serve
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy, HTTPOptions, RequestRouterConfig
from ray.serve.schema import LoggingConfig

from engine import logs
from engine.config import EngineConfig
from engine.hub import pinned, pinned_names
from server.embedded import embedded_model
from server.flags import with_settings
from server.lifecycle import ServeError, load_keys, log_access
from server.settings import ServerSettings

from .ray_ingress import Ingress
from .ray_join import JoinError, join
from .ray_replica import Replica
from .ray_router import CostRouter
from .ray_scaling import ByQueuedBytes
from .ray_settings import RaySettings

log = logging.getLogger("fastblt.ray")

NAME = "fastblt"
HEAD = "node:__internal_head__"
"""Ray's resource of its first machine."""
SPARE_REQUESTS = 64
"""Room in a replica for other requests than completions, and for preempted sequences."""
LEAST_LOOK_BACK_SECONDS = 11.0
"""Seconds of the average that autoscaling uses. Replicas report every ten seconds."""
HEALTH_CHECK_SECONDS = 10.0
STOP_SECONDS = 10.0
"""Seconds for a replica to end its engine after its requests."""


def build(arguments: dict[str, Any]) -> serve.Application:
    """The application with settings by their names, the server's, the engine's and Ray's: `{"model": "models/nano",
    "replicas": 2}`. Others have their defaults. Raises ValueError."""
    given = {"model": str(embedded_model())} | arguments
    engine = {field.name: given[field.name] for field in fields(EngineConfig) if field.name in given}
    of_ray = {name: arguments[name] for name in RaySettings.model_fields if name in arguments}
    of_server = {name: value for name, value in arguments.items() if name not in engine | of_ray}
    settings, options = ServerSettings(**of_server), RaySettings(**of_ray)
    _check_offered(settings)
    # All replicas get the same commit of a model from the hub.
    return application(settings, pinned_names(EngineConfig(**engine)), options)


def _check_offered(settings: ServerSettings) -> None:
    """Raises ValueError for what a single server offers, but not several replicas."""
    if settings.ssl_certfile:
        raise ValueError(
            "--ssl-certfile is not offered here: Ray's proxies speak plain HTTP; put a proxy with TLS in front"
        )
    if settings.admin_key_file:
        raise ValueError("--admin-key-file is not offered here: a request would reach only one of the replicas")


def application(
    settings: ServerSettings, config: EngineConfig, options: RaySettings, *, on_head: bool = False
) -> serve.Application:
    """on_head: the ingresses are on the cluster's first machine, and end with no other."""
    # Replicas may have another working directory.
    if os.path.isdir(config.model):
        config = replace(config, model=os.path.abspath(config.model))
    if config.patcher and os.path.isdir(config.patcher):
        config = replace(config, patcher=os.path.abspath(config.patcher))
    # Ray gives a process of so many cores OMP_NUM_THREADS, unless its machine has one.
    config = replace(config, num_threads=options.threads(config.num_threads))
    if settings.api_key_file:
        settings = settings.model_copy(update={"api_key_file": settings.api_key_file.absolute()})
    gpus = options.replica_gpus if options.replica_gpus is not None else float(config.device == "cuda")
    target_requests = options.target_requests or config.max_sequences
    patience = settings.drain_seconds + STOP_SECONDS
    # The replicas log every request.
    ray_logs = LoggingConfig(
        encoding="JSON" if settings.log_format == "json" else "TEXT", log_level="WARNING", enable_access_log=False
    )
    replicas = serve.deployment(
        name="Replica",
        ray_actor_options={"num_cpus": options.replica_cpus, "num_gpus": gpus},
        # As many as its own gate admits; the gate refuses the rest with the proper error.
        max_ongoing_requests=settings.max_queue + config.max_sequences + SPARE_REQUESTS,
        autoscaling_config=AutoscalingConfig(
            min_replicas=options.replicas,
            max_replicas=options.max_replicas or options.replicas,
            target_ongoing_requests=target_requests,
            policy=AutoscalingPolicy(
                policy_function=f"{ByQueuedBytes.__module__}:{ByQueuedBytes.__name__}",
                policy_kwargs={
                    "target_requests": target_requests,
                    "target_queued_bytes": options.target_queued_bytes,
                },
            ),
            upscale_delay_s=options.upscale_delay,
            downscale_delay_s=options.downscale_delay,
            look_back_period_s=max(options.upscale_delay, LEAST_LOOK_BACK_SECONDS),
        ),
        request_router_config=RequestRouterConfig(
            request_router_class=f"{CostRouter.__module__}.{CostRouter.__name__}",
        ),
        graceful_shutdown_timeout_s=patience,
        health_check_period_s=options.health_check_period,
        health_check_timeout_s=HEALTH_CHECK_SECONDS,
        logging_config=ray_logs,
    )(Replica)
    ingress = serve.deployment(
        name="Ingress",
        num_replicas=options.ingresses,
        ray_actor_options={"num_cpus": 0, "resources": {HEAD: 0.001} if on_head else {}},
        max_ongoing_requests=100_000,
        graceful_shutdown_timeout_s=patience,
        health_check_period_s=options.health_check_period,
        health_check_timeout_s=HEALTH_CHECK_SECONDS,
        logging_config=ray_logs,
    )(Ingress)
    # The ingresses answer pages of other origins, also for themselves.
    of_replicas = settings.model_copy(update={"cors_origins": []})
    return ingress.bind(replicas.bind(of_replicas, config), settings, options)


def run(
    settings: ServerSettings, config: EngineConfig, options: RaySettings, explain: Callable[[str], str] = str
) -> None:
    """Serve a checkpoint over HTTP from several replicas, on a Ray cluster. SIGTERM, Ctrl-C or a closed terminal ends
    all of them, after their running requests."""
    logs.configure(settings.logs, "ray")
    try:
        _check_offered(settings)
        # Report wrong keys before anything is started. Each replica loads its own.
        keys = load_keys(settings)
        # All replicas get the same commit of a model from the hub. Each machine downloads its own copy.
        config = pinned(config)
        with _hangups_held_back():
            join(options.ray_address)
        log_access(settings, keys)
    except (ValueError, JoinError, ServeError) as error:
        log.critical("%s", explain(str(error)))
        raise SystemExit(1) from None
    # Ray's own handlers would end the process at once.
    _on_signal(signal.default_int_handler)
    try:
        # A machine with a proxy would take the connections of its clients with it.
        serve.start("HeadOnly", http_options=HTTPOptions(host=settings.host, port=settings.port))
        try:
            serve.run(application(settings, config, options, on_head=True), name=NAME)
        except RuntimeError as error:
            log.critical("%s", " ".join([str(error), *_complaints()]))
            raise SystemExit(1) from None
        threads = options.threads(config.num_threads)
        log.info("%d threads and %g reserved cores for each replica", threads, options.replica_cpus)
        log.info("serving %s on http://%s:%d", config.model, settings.host, settings.port)
        stop = Event()
        _on_signal(lambda *_: stop.set())
        stop.wait()
        _on_signal(signal.default_int_handler)
        log.info("draining for up to %g s", settings.drain_seconds)
        _drain()
    finally:
        _leave()
    log.info("stopped")


def _drain() -> None:
    """Until no request is under way; a signal cuts these off."""
    ingresses = serve.get_app_handle(NAME)
    try:
        ingresses.broadcast("drain").results()
    except KeyboardInterrupt:
        with suppress(TimeoutError):
            ingresses.broadcast("cut_off").results(timeout_s=STOP_SECONDS, return_exceptions=True)


def _leave() -> None:
    """Removes the application, and Serve if that has no other, and leaves the cluster."""
    try:
        # Waits for the requests that are left, but for no more than a minute.
        serve.delete(NAME)
    except TimeoutError:
        log.warning("the application still has requests; Ray ends them")
    if serve.status().applications.keys() <= {NAME}:
        serve.shutdown()
    ray.shutdown()


def _complaints() -> list[str]:
    """Why deployments did not start: the last line of each traceback."""
    status = serve.status().applications.get(NAME)
    return [deployment.message.rpartition("\n")[2] for deployment in status.deployments.values()] if status else []


@contextmanager
def _hangups_held_back() -> Iterator[None]:
    """A closing terminal sends SIGHUP to every process started in it. Processes started in this context ignore it, so
    that the command's own cluster lives until it has drained; the command itself handles it afterwards."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGHUP})


def _on_signal(handler: Callable[[int, FrameType | None], Any]) -> None:
    def handle(number: int, frame: FrameType | None) -> None:
        # A closing terminal may send SIGHUP twice; the second must not cut the drain short.
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        handler(number, frame)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, handle)
    # `nohup` has it ignored.
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        signal.signal(signal.SIGHUP, handle)


def main() -> None:
    app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    app.command()(with_settings(run, RaySettings))
    app(prog_name="python -m deploy.ray_serve")


if __name__ == "__main__":
    main()
