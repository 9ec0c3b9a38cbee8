"""What a router may ask of a worker: every value of a message, looked at before anything is done.

Owns the limits and the refusals. Routers check what clients send; a worker trusts none of them, so
that a router that is broken, or in wrong hands, harms what is its own and no rank, no worker and
no request of another. Does not know scheduling, and leaves what fits to the scheduler.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace

from core.errors import InvalidRequest, KVTransferError
from core.ids import TRANSFER_ID_BYTES, TransferId
from core.session import ConnectPeers, Hello, OfferPrefix, PrefixSource, Submit, Task
from core.types import MAX_STOP_STRINGS, MAX_TOP_LOGPROBS, GenerateRequest, Logprob, outside

MAX_NAME_CHARACTERS = 256
MAX_SCOPE_CHARACTERS = 1024
"""A tenant's name and a salt."""
MAX_ADDRESS_CHARACTERS = 1024
MAX_END_TOKENS = 256
MAX_STOP_TOKENS = 2 * MAX_STOP_STRINGS
"""Those that were asked for, and those that stand for stop strings."""
MAX_AGE_S = 86_400.0
MAX_POSITION = 2**32 - 1
MAX_PEERS = 512
MAX_FETCH_WAIT_S = 60.0
MAX_WANTED = 65_536


def check_submit(submit: Submit, vocabulary_size: int) -> None:
    """Check every field of a Submit.

    Args:
        submit: As it came.
        vocabulary_size: Rows of the model's embedding.

    Raises:
        InvalidRequest: Names the first field that cannot be; nothing was changed.
    """
    request = submit.request
    sampling = request.sampling
    n = sampling.n
    _check_names(request)
    # The limit of `validate` is a client's; a router adds the tokens that stand for stop strings.
    replace(sampling, stop_token_ids=()).validate(vocabulary_size)
    _check_count("stop_token_ids", sampling.stop_token_ids, MAX_STOP_TOKENS)
    _check_tokens("stop_token_ids", sampling.stop_token_ids, vocabulary_size)
    _check_count("eos_token_ids", request.eos_token_ids, MAX_END_TOKENS)
    _check_tokens("eos_token_ids", request.eos_token_ids, vocabulary_size)
    if not request.token_ids:
        raise InvalidRequest("prompt", "is empty, must have at least one token")
    _check_tokens("prompt", request.token_ids, vocabulary_size)
    _check_choices(submit.finished_choices, n)
    # With nothing left to compute the attempt would have no sequence, and never end.
    if len(set(submit.finished_choices)) == n:
        raise InvalidRequest("finished_choices", f"are all {n}, one must be left to compute")
    if len(submit.emitted) != n:
        raise InvalidRequest("emitted", f"has {len(submit.emitted)} choices, the request has {n}")
    for tokens in submit.emitted:
        _check_count("emitted", tokens, sampling.max_tokens)
        _check_tokens("emitted", tokens, vocabulary_size)
    _check_numbers(submit)
    if submit.task is not Task.LOCAL:
        _check_peer(submit)
    if submit.prefix_source is not None:
        _check_source(submit.prefix_source, len(request.token_ids))


def check_offer(offer: OfferPrefix, vocabulary_size: int, max_model_len: int) -> None:
    """Check every field of an OfferPrefix.

    Args:
        offer: As it came.
        vocabulary_size: Rows of the model's embedding.
        max_model_len: Tokens of the longest prompt of which it can be the beginning.

    Raises:
        InvalidRequest: Names the first field that cannot be.
    """
    _check_transfer_id(offer.transfer_id)
    if not offer.receiver_id:
        raise InvalidRequest("receiver_id", "is empty; a transfer has two ends")
    _check_count("receiver_id", offer.receiver_id, MAX_NAME_CHARACTERS)
    _check_count("scope", offer.scope, MAX_SCOPE_CHARACTERS)
    _check_count("token_ids", offer.token_ids, max_model_len)
    _check_tokens("token_ids", offer.token_ids, vocabulary_size)


def check_credit(finished_choices: Iterable[int], request: GenerateRequest) -> None:
    """Check the choices that a Credit names.

    Raises:
        InvalidRequest: It names one that the request does not have.
    """
    _check_choices(finished_choices, request.sampling.n)


def check_hello(hello: Hello) -> None:
    """Check a router's greeting.

    Raises:
        InvalidRequest: Names the field.
    """
    if not hello.router_id:
        raise InvalidRequest("router_id", "is empty")
    _check_count("wanted", hello.wanted, MAX_WANTED)


def check_peers(connect_peers: ConnectPeers) -> None:
    """Check an introduction to peers.

    Raises:
        InvalidRequest: Names the field.
    """
    _check_count("addresses", connect_peers.addresses, MAX_PEERS)
    for address in connect_peers.addresses:
        _check_count("addresses", address, MAX_ADDRESS_CHARACTERS)


def check_first_tokens(tokens: Iterable[Logprob], vocabulary_size: int) -> None:
    """Check the first tokens that a prefill worker has drawn.

    Raises:
        KVTransferError: One of them, or of the likely ones beside it, is none.
    """
    for token in tokens:
        ids = (token.token_id, *(token_id for token_id, _ in token.top))
        wrong = outside(ids, vocabulary_size)
        if wrong is not None:
            raise KVTransferError(
                f"a first token came with id {wrong}, ids are from 0 to {vocabulary_size - 1}"
            )
        if len(token.top) > MAX_TOP_LOGPROBS:
            raise KVTransferError(
                f"a first token came with {len(token.top)} likely ones beside it, the limit is "
                f"{MAX_TOP_LOGPROBS}"
            )


def _check_names(request: GenerateRequest) -> None:
    _check_count("model", request.model, MAX_NAME_CHARACTERS)
    _check_count("tier", request.tier, MAX_NAME_CHARACTERS)
    _check_count("scope", request.scope, MAX_SCOPE_CHARACTERS)


def _check_numbers(submit: Submit) -> None:
    _check_range("seed", submit.request.seed, 0, 2**64 - 1)
    _check_range("epoch", submit.epoch, 0, MAX_POSITION)
    _check_range("credit", submit.credit, 0, MAX_POSITION)
    _check_range("age_s", submit.age_s, 0.0, MAX_AGE_S)
    if not math.isfinite(submit.request.deadline_at):
        raise InvalidRequest("time_left_s", "is not finite")


def _check_peer(submit: Submit) -> None:
    """The other end of a hand-over."""
    _check_transfer_id(submit.transfer_id)
    if not submit.peer_id:
        raise InvalidRequest("peer_id", "is empty; a hand-over has two ends")
    _check_count("peer_id", submit.peer_id, MAX_NAME_CHARACTERS)
    _check_count("peer_address", submit.peer_address, MAX_ADDRESS_CHARACTERS)


def _check_source(source: PrefixSource, num_prompt_tokens: int) -> None:
    """The other end of a fetch."""
    _check_transfer_id(source.transfer_id)
    _check_count("peer_address", source.peer_address, MAX_ADDRESS_CHARACTERS)
    # The last token is always computed: without it there are no logits to draw from.
    _check_range("num_tokens", source.num_tokens, 1, num_prompt_tokens - 1)
    _check_range("wait_s", source.wait_s, 0.0, MAX_FETCH_WAIT_S)


def _check_transfer_id(transfer_id: TransferId) -> None:
    num_bytes = len(transfer_id)
    if num_bytes != TRANSFER_ID_BYTES:
        raise InvalidRequest("transfer_id", f"has {num_bytes} bytes, must have {TRANSFER_ID_BYTES}")


def _check_choices(choices: Iterable[int], n: int) -> None:
    for choice in choices:
        _check_range("finished_choices", choice, 0, n - 1)


def _check_tokens(name: str, token_ids: Sequence[int], vocabulary_size: int) -> None:
    wrong = outside(token_ids, vocabulary_size)
    if wrong is not None:
        raise InvalidRequest(name, f"has token id {wrong}, must be from 0 to {vocabulary_size - 1}")


def _check_count(name: str, values: Sequence[object], limit: int) -> None:
    if len(values) > limit:
        raise InvalidRequest(name, f"has the length {len(values)}, the limit is {limit}")


def _check_range(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:  # NaN is in no range
        raise InvalidRequest(name, f"is {value}, must be from {low} to {high}")
