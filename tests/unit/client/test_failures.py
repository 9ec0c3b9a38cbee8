"""What a caller of `baton.Client` catches: our own errors, made from what is on the wire."""

import asyncio
import subprocess
import sys
import tomllib
from concurrent import futures
from pathlib import Path

import grpc
import pytest
from google.protobuf import any_pb2, duration_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

import baton
from baton import Client, GenerateRequest, errors
from core.errors import all_errors
from protos.baton.v1 import generation_pb2_grpc

ROOT = Path(__file__).parents[3]


class Refuses(generation_pb2_grpc.GenerationServicer):
    """Ends each call with the status that its text names, `NAME` or `NAME reason`."""

    def GenerateStream(self, request, context):
        name, _, reason = request.text.partition(" ")
        if not reason:
            context.abort(grpc.StatusCode[name], "bare")
        details = [
            error_details_pb2.ErrorInfo(reason=reason, domain="baton"),
            error_details_pb2.RetryInfo(retry_delay=duration_pb2.Duration(seconds=7)),
            error_details_pb2.BadRequest(
                field_violations=[error_details_pb2.BadRequest.FieldViolation(field="top_p")]
            ),
        ]
        boxes = [any_pb2.Any() for _ in details]
        for box, detail in zip(boxes, details, strict=True):
            box.Pack(detail)
        status = status_pb2.Status(
            code=code_pb2.Code.Value(name), message="top_p is 2; at most 1", details=boxes
        )
        context.abort_with_status(rpc_status.to_status(status))


@pytest.fixture
def address():
    server = grpc.server(futures.ThreadPoolExecutor(2))
    generation_pb2_grpc.add_GenerationServicer_to_server(Refuses(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(0)


def caught(address, text):
    async def run():
        async with Client([address], max_reconnects=0) as client:
            async for _ in client.generate(GenerateRequest(text=text), timeout_s=5):
                pass

    with pytest.raises(errors.ServingError) as failure:
        asyncio.run(run())
    assert isinstance(failure.value.__cause__, grpc.aio.AioRpcError)
    return failure.value


def test_an_answer_is_raised_as_the_error_that_the_server_meant(address):
    error = caught(address, "INVALID_ARGUMENT invalid_value")
    assert type(error) is errors.InvalidRequest
    assert (error.field, error.message) == ("top_p", "top_p is 2; at most 1")
    error = caught(address, "UNAVAILABLE server_overloaded")
    assert type(error) is errors.Unavailable and error.retry_after_s == 7
    error = caught(address, "RESOURCE_EXHAUSTED rate_limit_exceeded")
    assert type(error) is errors.RateLimited and error.retry_after_s == 7
    assert type(caught(address, "UNAVAILABLE no_worker")) is errors.NoWorker
    assert type(caught(address, "INTERNAL of_a_newer_server")) is errors.InternalError


def test_a_status_without_details_is_the_error_of_that_status(address):
    for status, kind in (
        ("DEADLINE_EXCEEDED", errors.DeadlineExceeded),
        ("UNAUTHENTICATED", errors.Unauthenticated),
        ("UNIMPLEMENTED", errors.InternalError),
        ("INTERNAL", errors.InternalError),
        ("UNAVAILABLE", errors.Unavailable),
    ):
        assert type(caught(address, status)) is kind, status


def test_nobody_at_the_address_is_unavailable():
    error = caught("127.0.0.1:1", "hello")
    assert type(error) is errors.Unavailable and error.retry_after_s > 0


def test_every_error_of_the_tree_is_caught_by_one_that_the_facade_names():
    named = [getattr(errors, name) for name in errors.__all__ if name != "ServingError"]
    assert all(issubclass(kind, errors.ServingError) for kind in named)
    inside = {"ConfigError", "ModelLoadError"}  # a cluster that cannot start has no callers
    for kind in all_errors()[1:]:
        assert kind.__name__ in inside or issubclass(kind, tuple(named)), kind


def test_the_version_is_that_of_the_project():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert baton.__version__ == project["version"], "make setup installs the new one"


def test_the_facade_brings_no_torch_ray_or_server():
    code = (
        "import sys, baton; "
        "print(*{'torch', 'ray', 'fastapi', 'router', 'cluster', 'numba'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, cwd=ROOT, stdout=subprocess.PIPE
    )
    assert done.stdout == b"\n"
