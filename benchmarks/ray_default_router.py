"""`deploy.ray_serve` with the router that Ray has unless told otherwise: the one with the shorter queue of two replicas
drawn at random. For `benchmarks.routing`."""

from unittest import mock

from ray.serve.config import RequestRouterConfig

from deploy import ray_serve

if __name__ == "__main__":
    with mock.patch.object(ray_serve, "RequestRouterConfig", lambda **_: RequestRouterConfig()):
        ray_serve.main()
