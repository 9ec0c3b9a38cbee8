"""Keep-alive pings of ordinary gRPC clients on streams on which nothing comes."""

import asyncio
from types import SimpleNamespace

import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from core.config import RouterConfig, SecurityConfig
from router.access.credentials import ANYBODY
from router.grpc.server import GrpcServer

PING_MS = 1000
OPTIONS = [
    ("grpc.keepalive_time_ms", PING_MS),
    ("grpc.keepalive_timeout_ms", 5000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
]


async def test_a_client_that_pings_every_second_on_a_quiet_stream_is_not_sent_away():
    service = SimpleNamespace(
        config=RouterConfig(grpc_port=0),
        keyring=SimpleNamespace(identify=lambda *_: ANYBODY),
        status=SimpleNamespace(is_ready=True, proof=SimpleNamespace(checked=asyncio.Event())),
    )
    server = GrpcServer(service, SecurityConfig())
    await server.start()
    try:
        async with grpc.aio.insecure_channel(
            f"127.0.0.1:{server.port}", options=OPTIONS
        ) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            watch = stub.Watch(health_pb2.HealthCheckRequest())
            assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
            await asyncio.sleep(5 * PING_MS / 1000)  # the third ping too many ends a connection
            assert not watch.done(), await watch.details()
            watch.cancel()
    finally:
        await server.stop(0.0)
