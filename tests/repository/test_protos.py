"""The public protos keep buf's STANDARD rules and never break a released client."""

import re
from pathlib import Path

import pytest
from google.protobuf import descriptor_pb2
from grpc_tools import protoc

ROOT = Path(__file__).parents[2]
RELEASED = ROOT / "protos" / "released" / "baton.v1.binpb"
SHARED = {"GenerateRequest"}
"""Generate and GenerateStream take the same request on purpose: the one exception,
as in buf's `ignore_only`."""


def compiled(*files):
    """Descriptor set of proto files, comments included."""
    out = ROOT / ".pytest-protos.binpb"
    try:
        arguments = [
            "protoc",
            f"-I{ROOT}",
            f"--descriptor_set_out={out}",
            "--include_source_info",
            *map(str, files),
        ]
        assert protoc.main([*arguments, f"-I{Path(protoc.__file__).parent / '_proto'}"]) == 0
        return descriptor_pb2.FileDescriptorSet.FromString(out.read_bytes())
    finally:
        out.unlink(missing_ok=True)


@pytest.fixture(scope="module")
def current():
    return compiled(ROOT / "protos/baton/v1/generation.proto").file[0]


def lint(file):
    """What buf's STANDARD category, and its COMMENT_RPC rule, would complain of."""
    commented = {
        tuple(loc.path) for loc in file.source_code_info.location if loc.leading_comments.strip()
    }
    wrong = []
    if not re.fullmatch(r"[a-z]+(\.[a-z]+)*\.v\d+", file.package):
        wrong.append(f"package {file.package} is not lower case with a version")
    if file.syntax != "proto3":
        wrong.append("syntax is not proto3")
    used = []
    for s, service in enumerate(file.service):
        for m, method in enumerate(service.method):
            request, response = (
                method.input_type.rpartition(".")[2],
                method.output_type.rpartition(".")[2],
            )
            used += [request, response]
            if (6, s, 2, m) not in commented:
                wrong.append(f"rpc {method.name} has no comment")
            for name, ending in ((request, "Request"), (response, "Response")):
                if name != f"{method.name}{ending}" and name not in SHARED:
                    wrong.append(f"rpc {method.name} uses {name}, must be {method.name}{ending}")
    wrong += [
        f"message {name} serves several rpcs" for name in set(used) - SHARED if used.count(name) > 1
    ]
    for message in file.message_type:
        if not re.fullmatch(r"([A-Z][a-z0-9]*)+", message.name):
            wrong.append(f"message {message.name} is not PascalCase")
        for field in message.field:
            if not re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", field.name):
                wrong.append(f"field {message.name}.{field.name} is not lower_snake_case")
    for enum in file.enum_type:
        prefix = re.sub(r"(?<!^)(?=[A-Z])", "_", enum.name).upper() + "_"
        if enum.value[0].name != f"{prefix}UNSPECIFIED" or enum.value[0].number:
            wrong.append(f"enum {enum.name} does not begin with {prefix}UNSPECIFIED = 0")
        wrong += [
            f"enum value {v.name} lacks {prefix}"
            for v in enum.value
            if not v.name.startswith(prefix)
        ]
    return wrong


def breaking(old, new):
    """What would break a client of `old`, on the wire or in its
    generated code (buf's FILE category)."""
    wrong = []
    if old.package != new.package:
        wrong.append("the package changed")
    messages = {m.name: m for m in new.message_type}
    for message in old.message_type:
        if message.name not in messages:
            wrong.append(f"message {message.name} is gone")
            continue
        fields = {f.number: f for f in messages[message.name].field}
        for field in message.field:
            now = fields.get(field.number)
            if now is None:
                wrong.append(f"field {message.name}.{field.name} = {field.number} is gone")
            elif any(
                getattr(now, a) != getattr(field, a)
                for a in ("name", "type", "type_name", "label", "proto3_optional")
            ):
                wrong.append(f"field {message.name}.{field.name} = {field.number} changed")
            elif field.HasField("oneof_index") != now.HasField("oneof_index"):
                wrong.append(f"field {message.name}.{field.name} moved in or out of a oneof")
    enums = {e.name: {v.number: v.name for v in e.value} for e in new.enum_type}
    for enum in old.enum_type:
        for value in enum.value:
            if enums.get(enum.name, {}).get(value.number) != value.name:
                wrong.append(f"enum value {value.name} = {value.number} is gone or renamed")
    services = {s.name: {m.name: m for m in s.method} for s in new.service}
    for service in old.service:
        for method in service.method:
            now = services.get(service.name, {}).get(method.name)
            same = ("input_type", "output_type", "client_streaming", "server_streaming")
            if now is None or any(getattr(now, a) != getattr(method, a) for a in same):
                wrong.append(f"rpc {service.name}.{method.name} is gone or changed")
    return wrong


def test_the_public_proto_is_clean(current):
    assert lint(current) == []


def test_nothing_that_was_released_has_changed(current):
    released = descriptor_pb2.FileDescriptorSet.FromString(RELEASED.read_bytes()).file[0]
    assert len(released.message_type) > 20 and breaking(released, current) == []


BAD = """
syntax = "proto3";
package Bad;
message fooBar { string BadName = 1; }
enum Kind { NOTHING = 0; OTHER = 1; }
message GetRequest {}
service Things { rpc Get(GetRequest) returns (GetRequest); }
"""


def test_the_linter_bites(tmp_path):
    path = ROOT / ".pytest-bad.proto"
    try:
        path.write_text(BAD)
        complaints = lint(compiled(path).file[0])
    finally:
        path.unlink()
    for words in (
        "package Bad",
        "fooBar",
        "BadName",
        "KIND_UNSPECIFIED",
        "OTHER lacks",
        "no comment",
        "must be GetResponse",
        "several rpcs",
    ):
        assert any(words in c for c in complaints), (words, complaints)


def test_the_breaking_check_bites(current):
    def changed(change):
        new = descriptor_pb2.FileDescriptorProto()
        new.CopyFrom(current)
        change(new)
        return breaking(current, new)

    def message(new, name):
        return next(m for m in new.message_type if m.name == name)

    cases = {
        "field Delta.text": lambda new: message(new, "Delta").field.pop(2),
        "field Delta.position": lambda new: setattr(message(new, "Delta").field[1], "type", 9),
        "field SamplingOptions.temperature": lambda new: setattr(
            message(new, "SamplingOptions").field[0], "proto3_optional", False
        ),
        "message Usage": lambda new: message(new, "Usage").__setattr__("name", "Use"),
        "enum value FINISH_REASON_STOP": lambda new: setattr(
            new.enum_type[0].value[1], "name", "FINISH_REASON_END"
        ),
        "rpc Generation.Abort": lambda new: new.service[0].method.pop(
            [m.name for m in new.service[0].method].index("Abort")
        ),
        "rpc Generation.Chat": lambda new: setattr(
            new.service[0].method[2], "server_streaming", False
        ),
    }
    for words, change in cases.items():
        assert any(words in c for c in changed(change)), (words, changed(change))
    assert (
        changed(lambda new: message(new, "Delta").field.add(name="new_one", number=99, type=9))
        == []
    )
