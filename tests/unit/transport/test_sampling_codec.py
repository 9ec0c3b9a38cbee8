"""A sampling field is declared, never listed: each reaches every wire by what its sides declare."""

from dataclasses import fields, replace
from types import SimpleNamespace
from typing import get_args, get_type_hints

import pytest

from core.plan import SampleSpec, StepItem, StepPlan
from core.types import SamplingParams
from engine.ranks.plan_wire import PLAN, PlanDecoder, PlanEncoder
from engine.ranks.rank_wire import pack, unpack
from protos.baton.internal.v1 import session_pb2
from protos.baton.v1 import generation_pb2 as pb
from router.grpc.requests import generate_params
from router.http.bodies import OTHER_NAMES, CompletionBody
from router.http.body_model import parse_body
from transport.sampling_codec import ROUTER_ONLY, sampling_from_wire, sampling_to_wire

KINDS = get_type_hints(SamplingParams)
NAMES = [one.name for one in fields(SamplingParams)]
ON_SESSIONS = [name for name in NAMES if name not in ROUTER_ONLY]
DEFAULTS = SamplingParams()
SEED = 2**63 - 1


def example(kind):
    """A value of a type, never a field's default."""
    kinds = [k for k in get_args(kind) if k not in (type(None), Ellipsis)]
    if kind in (bool, float, int, str):
        return {bool: True, float: 0.625, int: 3, str: "ab"}[kind]
    if type(None) in get_args(kind):
        return example(*kinds)
    return tuple(example(k) for k in kinds)


def other(name):
    """A value of a field that is not its default."""
    value = example(KINDS[name])
    return not getattr(DEFAULTS, name) if KINDS[name] is bool else value


ALL = SamplingParams(**{name: other(name) for name in NAMES})


def test_no_field_of_the_examples_is_as_it_is_by_default():
    assert [name for name in NAMES if getattr(ALL, name) == getattr(DEFAULTS, name)] == []


def asked(name):
    """A value as clients write it, and what the request then has."""
    if name == "bad_words":
        return ["ab"]
    if name == "logit_bias":
        return {str(token_id): bias for token_id, bias in getattr(ALL, name)}
    value = getattr(ALL, name)
    return list(value) if isinstance(value, tuple) else value


def read(params, name):
    """What a request has of a field, given by `RequestParams`."""
    if name == "bad_words":
        assert list(params.bad_words) == ["ab"]
        return getattr(ALL, name)  # text until the request is made
    return getattr(SamplingParams(**params.sampling), name)


@pytest.mark.parametrize("name", NAMES)
def test_every_field_is_asked_for_over_http(name):
    body = {"prompt": "x", OTHER_NAMES.get(name, name): asked(name)}
    (params,) = parse_body(CompletionBody, body).all_params("", None)
    assert read(params, name) == getattr(ALL, name)
    assert set(params.sampling) <= {name}


@pytest.mark.parametrize("name", NAMES)
def test_every_field_is_asked_for_over_grpc(name):
    request = pb.GenerateRequest(text="x")
    groups = (request.sampling, request.stopping, request.response)
    (group,) = [group for group in groups if name in group.DESCRIPTOR.fields_by_name]
    value = asked(name)
    if isinstance(value, dict):
        getattr(group, name).update({int(key): bias for key, bias in value.items()})
    elif isinstance(value, list):
        getattr(group, name).extend(value)
    else:
        setattr(group, name, value)
    context = SimpleNamespace(invocation_metadata=tuple, time_remaining=lambda: None)
    params = generate_params(request, context)
    assert read(params, name) == getattr(ALL, name)
    assert set(params.sampling) <= {name}


def test_absent_is_the_default_and_zero_is_zero_over_grpc():
    context = SimpleNamespace(invocation_metadata=tuple, time_remaining=lambda: None)
    assert generate_params(pb.GenerateRequest(text="x"), context).sampling == {}
    zeros = pb.SamplingOptions(temperature=0.0, top_k=0)
    given = generate_params(pb.GenerateRequest(text="x", sampling=zeros), context).sampling
    assert given == {"temperature": 0.0, "top_k": 0}


def test_a_session_carries_every_field_that_a_worker_needs():
    assert {f.name for f in session_pb2.Sampling.DESCRIPTOR.fields} == set(ON_SESSIONS)
    arrived = sampling_from_wire(sampling_to_wire(ALL, SEED))
    of_the_router = {name: getattr(DEFAULTS, name) for name in ROUTER_ONLY}
    assert arrived == replace(ALL, **of_the_router, seed=SEED)
    for params in (DEFAULTS, replace(DEFAULTS, temperature=0.0, logprobs=0)):
        arrived = sampling_from_wire(sampling_to_wire(params, SEED))
        assert arrived == replace(params, seed=SEED)


def test_bytes_on_a_session_are_what_they_were():
    """Workers and routers of two versions talk to each other while a cluster is renewed."""
    asked_for = SamplingParams(
        temperature=0.7,
        top_k=3,
        top_p=0.9,
        min_p=0.05,
        presence_penalty=0.5,
        frequency_penalty=-0.5,
        repetition_penalty=1.3,
        logit_bias=((3, 0.5), (70000, -100.0)),
        allowed_token_ids=(3, 700),
        bad_words=((3, 4), (5,)),
        seed=-9,
        n=2,
        max_tokens=300,
        min_tokens=4,
        stop=("x",),
        stop_token_ids=(7, 8),
        ignore_eos=True,
        logprobs=0,
        prompt_logprobs=2,
        include_stop=True,
        skip_special_tokens=False,
    )
    wire = sampling_to_wire(asked_for, SEED).SerializeToString(deterministic=True)
    assert wire.hex() == (
        "09666666666666e63f100319cdccccccccccec3f200228ac0230043a0207084001480050ffffffffffffffff7f"
        "599a9999999999a93f61000000000000e03f69000000000000e0bf71cdccccccccccf43f"
        "7a0b080311000000000000e03f7a0d08f0a2041100000000000059c082010303bc05"
        "8a01040a0203048a01030a0105900102"
    )
    wire = sampling_to_wire(DEFAULTS, SEED).SerializeToString(deterministic=True)
    assert wire.hex() == (
        "09000000000000f03f19000000000000f03f2001281050ffffffffffffffff7f71000000000000f03f"
    )


@pytest.mark.parametrize("params", [ALL, DEFAULTS])
def test_a_rank_draws_by_the_parameters_of_the_request(params):
    item = StepItem(7, 0, (1,), [0], (SampleSpec(0, 0, SEED, params),))
    message = pack(PlanEncoder(4).encode(StepPlan(1, (item,))))
    (sample,) = PlanDecoder(4, 50).decode(unpack(message[4:], PLAN)).items[0].samples
    assert sample == item.samples[0]
