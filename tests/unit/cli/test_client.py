"""What the commands use to reach the gRPC server,
and what they say of a model before anything starts."""

import asyncio
import json
import shutil
import subprocess
import sys
from concurrent import futures
from pathlib import Path

import grpc
import pytest
from support.models import TINY

from cli import client
from protos.baton.v1 import generation_pb2 as pb
from protos.baton.v1 import generation_pb2_grpc

ROOT = Path(__file__).parents[3]


class Parrot(generation_pb2_grpc.GenerationServicer):
    def GenerateStream(self, request, context):
        yield pb.GenerateStreamResponse(delta=pb.Delta(text=request.text))
        yield pb.GenerateStreamResponse(summary=pb.Summary())


@pytest.fixture
def address():
    server = grpc.server(futures.ThreadPoolExecutor(2))
    generation_pb2_grpc.add_GenerationServicer_to_server(Parrot(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(0)


def test_all_requests_of_a_process_run_on_one_loop(address):
    """gRPC's poller keeps every loop it has met, and speaks up when it finds one closed."""
    loops = []

    def show(text):
        loops.append(asyncio.get_running_loop())
        assert text == "hello"

    for _ in range(3):
        assert client.stream_answer(address, pb.GenerateRequest(text="hello"), show).text == "hello"
    assert len(loops) == 3 and len(set(loops)) == 1 and not loops[0].is_closed()


def check_config(folder):
    command = [sys.executable, "-m", "cli.main", "check-config", "-o", "json"]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, timeout=120, check=True,
        env={"BATON_MODEL__PATH": str(folder), "PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert json.loads(done.stdout)["facts"]["max_model_len"] > 0
    return done.stderr


def test_tokens_that_the_model_has_no_row_for_are_told_before_anything_starts(tmp_path):
    assert check_config(TINY) == ""
    shutil.copytree(TINY, tmp_path, dirs_exist_ok=True)
    tree = json.loads((TINY / "tokenizer.json").read_text())
    tree["added_tokens"].append({**tree["added_tokens"][0], "id": 264, "content": "<|new|>"})
    (tmp_path / "tokenizer.json").write_text(json.dumps(tree))
    told = check_config(tmp_path)
    assert "1 tokens for which the model has no row" in told and "'<|new|>' (id 264)" in told
