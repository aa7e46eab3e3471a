"""The server on many GPUs or machines: Ray Serve deals requests out to replicas, one engine each.

    pip install "lserve-jax[serve,ray]"
    python examples/serve_ray.py --replicas 4
    python examples/serve_ray.py --replicas 2 --gpus-per-replica 0    # on CPUs

Clients take http://HOST:PORT/v1 as their base URL, as of ``python -m lserve_jax.serve``: each
replica is that server's application. What a replica keeps is its own: ``/metrics`` and
``/v1/prefixes`` speak of the replica that the request happens to reach. Without a cluster Ray
starts on this machine; for one, run this where RAY_ADDRESS says where it is.
"""

import contextlib
import threading
from dataclasses import dataclass

import tyro
from ray import serve
from starlette.applications import Starlette

from lserve_jax import LLM
from lserve_jax.async_engine import AsyncEngine
from lserve_jax.serve.app import create_app
from lserve_jax.serve.service import Service, ServiceOptions


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Serve a model with OpenAI's API on several GPUs, or on CPUs."""

    # What --model of lserve_jax.serve takes; every machine must be able to read it.
    model: str = "smollm2-135m-instruct"
    # Address to listen at; 0.0.0.0 is every one: give an --api-key then.
    host: str = "127.0.0.1"
    port: int = 8000
    # Keys that open the service; without any, everybody may use it.
    api_key: tuple[str, ...] = ()
    # How many engines run.
    replicas: int = 1
    # GPUs of each; 0 runs on CPUs.
    gpus_per_replica: int = 1
    cpus_per_replica: float = 1.0
    # Completions that run at the same time in a replica.
    max_num_seqs: int = 32
    # Room for prompt and answer together, in tokens; the model's own by default.
    max_model_len: int | None = None


def application(args: Arguments) -> serve.Application:
    """What ``serve.run`` takes."""

    def build() -> Starlette:
        # In the replica: nothing of the model has to travel.
        llm = LLM(args.model, max_num_seqs=args.max_num_seqs, max_model_len=args.max_model_len)
        options = ServiceOptions(model_names=(args.model,), api_keys=args.api_key)
        return create_app(Service(engine=AsyncEngine(llm.text_engine), options=options))

    deployment = serve.deployment(
        serve.ingress(build)(),
        name="lserve",
        num_replicas=args.replicas,
        # As many again wait in a replica, so that it never runs dry; the others wait in Ray until
        # some replica has room.
        max_ongoing_requests=2 * args.max_num_seqs,
        ray_actor_options={"num_gpus": args.gpus_per_replica, "num_cpus": args.cpus_per_replica},
    )
    return deployment.bind()


def main() -> None:
    args = tyro.cli(Arguments)
    serve.start(http_options={"host": args.host, "port": args.port})
    serve.run(application(args), name="lserve", route_prefix="/")
    print(f"Serving at http://{args.host}:{args.port}/v1", flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        threading.Event().wait()
    serve.shutdown()


if __name__ == "__main__":
    main()
