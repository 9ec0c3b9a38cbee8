"""A chat's next turn goes where its answer was made: 2 prefill, 2 decode workers, own Redis."""

import json
from itertools import pairwise
from pathlib import Path

import httpx
import pytest
from support.talk import BLOCK, Talk
from support.up import Up

from router.access.credentials import new_key
from router.access.identities import KeyRole

POOLS = {
    f"BATON_POOLS__{role}__{name}": value
    for role in ("PREFILL", "DECODE")
    # Ray would not start four workers on two cores otherwise.
    for name, value in (("REPLICAS", "2"), ("NUM_CPUS", "0.25"))
}
TEMPLATES = sorted(
    path
    for path in (Path(__file__).parent.parent / "data" / "chat_templates").glob("*.jinja")
    if not path.name.startswith("own_")
)
SPECIAL_TOKENS = [str(token) for token in range(256, 264)]
"""The others are bytes."""
PUBLIC = "You answer sailors, in the words of the sea, and never at great length. " * 2


def web(up, key=""):
    headers = {"authorization": f"Bearer {key}"} if key else {}
    return httpx.AsyncClient(base_url=up.url, timeout=60, headers=headers)


def preferred(turn):
    """Return the prefill workers that placement leaned to for the session's sake."""
    candidates = turn.timing["why"]["candidates"]
    return {c["worker"] for c in candidates if c["path"] == "pd" and c.get("is_preferred")}


@pytest.fixture(scope="module", params=["local", "ray"])
def up(request):
    kind = ["--local"] if request.param == "local" else []
    # Ray starts five actors one after the other, each with its own imports.
    cluster = Up(*kind, timeout_s=240, **POOLS)
    yield cluster
    code, left = cluster.end()
    assert code == 0 and not left


@pytest.mark.sampled(3)
@pytest.mark.timeout(400)
async def test_each_turn_goes_to_the_holder_and_finds_the_answer_before_it(up):
    async with web(up) as http:
        # Long answers, all of it text: even a holder that seems slow for a while is the cheapest.
        talk = Talk(http, max_tokens=160, logit_bias=dict.fromkeys(SPECIAL_TOKENS, -100))
        first = await talk.turn()
        assert first.decision["path"] == "pd" and first.cached == 0
        for number in range(3):
            await talk.until_published()
            turn = await talk.turn()
            assert turn.decision["path"] == "local", (number, turn.decision)
            assert turn.decision["decode_worker"] == first.decision["decode_worker"]
            assert turn.cached == turn.foreseen == turn.reusable
            answer_ends = len(talk.turns[-2].prompt) + len(talk.turns[-2].output)
            assert turn.cached > answer_ends - 17, "the whole answer but its last block"
        # The same history in a scope where nothing is cached: the same words.
        del talk.messages[-2:]
        fresh = await talk.ask(cache_salt="nobody's")
        assert fresh.cached == 0 and fresh.output == talk.turns[-1].output


@pytest.mark.sampled(2)
@pytest.mark.timeout(400)
async def test_histories_of_real_templates_hit_up_to_the_first_other_token():
    # One worker: what is cached decides, and not which of two is thought to be faster.
    up = Up("--local", "--colocated", BATON_ROUTER__TRUST_REQUEST_CHAT_TEMPLATE="true")
    found = {}
    try:
        async with web(up) as http:
            for path in TEMPLATES:
                talk = Talk(
                    http,
                    f"{path.stem}: tell me of the sea. " * 4,
                    chat_template=path.read_text(),
                    cache_salt=path.stem,
                )
                await talk.turn()
                turn = await talk.turn()
                assert turn.cached == turn.reusable, path.name
                found[path.stem] = turn.cached / len(turn.prompt)
    finally:
        code, left = up.end()
    assert code == 0 and not left
    assert len(found) == len(TEMPLATES) > 12
    # Some write the history otherwise than they opened the answer; most do not.
    assert sorted(found.values())[len(found) // 3] > 0.6, found


@pytest.mark.sampled(2)
async def test_a_session_stays_with_its_worker_where_nothing_is_cached_and_is_its_tenants(tmp_path):
    roles = {"acme": KeyRole.TENANT, "bulk": KeyRole.TENANT, "operator": KeyRole.ADMIN}
    keys = {name: new_key(name, "standard", role) for name, role in roles.items()}
    (tmp_path / "keys").write_text("".join(line + "\n" for _, line in keys.values()))
    (tmp_path / "public.json").write_text(json.dumps([PUBLIC]))
    operator, acme, bulk = (keys[name][0] for name in ("operator", "acme", "bulk"))
    up = Up(
        "--local",
        key=operator,
        **POOLS,
        BATON_SECURITY__API_KEYS=str(tmp_path / "keys"),
        BATON_ROUTER__PUBLIC_PROMPTS=str(tmp_path / "public.json"),
    )
    try:
        async with web(up, acme) as acme, web(up, bulk) as bulk:
            homes = []
            for number in range(6):
                # Nothing in common, not even the first block.
                talk = Talk(acme, f"{number} says: " * 9, session_id="mine")
                turn = await talk.turn(max_tokens=2)
                assert preferred(turn) == set(homes[-1:]), turn.timing["why"]
                homes.append(turn.decision["prefill_worker"])
            # It may leave a worker that was slow meanwhile, whose preference is not worth that.
            assert any(before == after for before, after in pairwise(homes)), homes
            for other in (
                Talk(acme, "no session says: " * 9),
                Talk(bulk, "a stranger says: " * 9, session_id="mine"),
            ):
                assert not preferred(await other.turn())

            talk = Talk(acme, "a secret of ours: " * 9)
            await talk.turn()
            await talk.until_published()
            assert (await talk.turn()).cached > 0
            copied = Talk(bulk, "a secret of ours: " * 9)
            copied.messages = list(talk.messages)
            turn = await copied.turn()
            assert turn.cached == 0
            assert not any(c["cached_tokens"] for c in turn.timing["why"]["candidates"])

            for system, is_public in ((PUBLIC, True), (PUBLIC + " Or not.", False)):
                asked = [Talk(http, "What is the sea?") for http in (acme, bulk)]
                for talk in asked:
                    talk.messages.insert(0, {"role": "system", "content": system})
                first = await asked[0].turn()
                await asked[0].until_published()
                # One token at most: by path local, where the answer before was made.
                turn = await asked[1].ask(max_tokens=1)
                if not is_public:
                    assert turn.cached == 0, "a public text with more behind it is another text"
                    continue
                # Bytes, between begin, system, end and user; both ask the same thing after them.
                num_public = len(PUBLIC.encode()) + 4
                assert turn.cached == num_public // BLOCK * BLOCK > 0
                fresh = await asked[1].ask(max_tokens=1, cache_salt="nobody's")
                assert fresh.cached == 0 and fresh.output == turn.output == first.output[:1]
    finally:
        code, left = up.end()
    assert code == 0 and not left
