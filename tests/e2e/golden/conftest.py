"""A cluster of child processes and one on Ray, whose start takes longer than all these tests."""

import grpc
import openai
import pytest
from support.up import Up

from protos.baton.v1 import generation_pb2_grpc


@pytest.fixture(scope="package", params=["local", "ray"])
def up(request):
    if request.param == "local":
        yield request.getfixturevalue("local")
        return
    cluster = Up(BATON_PLACEMENT__PATH="pd")
    yield cluster
    code, left = cluster.end()
    assert code == 0 and not left


@pytest.fixture()
def client(up):
    with openai.OpenAI(base_url=f"{up.url}/v1", api_key="none", max_retries=0) as made:
        yield made


@pytest.fixture()
def stub(up):
    with grpc.insecure_channel(up.grpc) as channel:
        yield generation_pb2_grpc.GenerationStub(channel)
