from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ToWorker(_message.Message):
    __slots__ = ("number", "hello", "submit", "cancel", "credit", "heartbeat", "connect_peers", "offer_prefix")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    HELLO_FIELD_NUMBER: _ClassVar[int]
    SUBMIT_FIELD_NUMBER: _ClassVar[int]
    CANCEL_FIELD_NUMBER: _ClassVar[int]
    CREDIT_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_FIELD_NUMBER: _ClassVar[int]
    CONNECT_PEERS_FIELD_NUMBER: _ClassVar[int]
    OFFER_PREFIX_FIELD_NUMBER: _ClassVar[int]
    number: int
    hello: Hello
    submit: Submit
    cancel: Cancel
    credit: Credit
    heartbeat: RouterHeartbeat
    connect_peers: ConnectPeers
    offer_prefix: OfferPrefix
    def __init__(self, number: _Optional[int] = ..., hello: _Optional[_Union[Hello, _Mapping]] = ..., submit: _Optional[_Union[Submit, _Mapping]] = ..., cancel: _Optional[_Union[Cancel, _Mapping]] = ..., credit: _Optional[_Union[Credit, _Mapping]] = ..., heartbeat: _Optional[_Union[RouterHeartbeat, _Mapping]] = ..., connect_peers: _Optional[_Union[ConnectPeers, _Mapping]] = ..., offer_prefix: _Optional[_Union[OfferPrefix, _Mapping]] = ...) -> None: ...

class ToRouter(_message.Message):
    __slots__ = ("number", "welcome", "frame", "progress", "peer_report")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    FRAME_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    PEER_REPORT_FIELD_NUMBER: _ClassVar[int]
    number: int
    welcome: Welcome
    frame: StepFrame
    progress: Progress
    peer_report: PeerReport
    def __init__(self, number: _Optional[int] = ..., welcome: _Optional[_Union[Welcome, _Mapping]] = ..., frame: _Optional[_Union[StepFrame, _Mapping]] = ..., progress: _Optional[_Union[Progress, _Mapping]] = ..., peer_report: _Optional[_Union[PeerReport, _Mapping]] = ...) -> None: ...

class Hello(_message.Message):
    __slots__ = ("router_id", "wanted", "stream_number")
    ROUTER_ID_FIELD_NUMBER: _ClassVar[int]
    WANTED_FIELD_NUMBER: _ClassVar[int]
    STREAM_NUMBER_FIELD_NUMBER: _ClassVar[int]
    router_id: str
    wanted: _containers.RepeatedCompositeFieldContainer[Wanted]
    stream_number: int
    def __init__(self, router_id: _Optional[str] = ..., wanted: _Optional[_Iterable[_Union[Wanted, _Mapping]]] = ..., stream_number: _Optional[int] = ...) -> None: ...

class Wanted(_message.Message):
    __slots__ = ("request_id", "epoch", "next_positions", "credit", "num_scores", "finished_choices", "is_coming")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    NEXT_POSITIONS_FIELD_NUMBER: _ClassVar[int]
    CREDIT_FIELD_NUMBER: _ClassVar[int]
    NUM_SCORES_FIELD_NUMBER: _ClassVar[int]
    FINISHED_CHOICES_FIELD_NUMBER: _ClassVar[int]
    IS_COMING_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    epoch: int
    next_positions: _containers.RepeatedScalarFieldContainer[int]
    credit: int
    num_scores: int
    finished_choices: _containers.RepeatedScalarFieldContainer[int]
    is_coming: bool
    def __init__(self, request_id: _Optional[str] = ..., epoch: _Optional[int] = ..., next_positions: _Optional[_Iterable[int]] = ..., credit: _Optional[int] = ..., num_scores: _Optional[int] = ..., finished_choices: _Optional[_Iterable[int]] = ..., is_coming: _Optional[bool] = ...) -> None: ...

class TokenIds(_message.Message):
    __slots__ = ("ids",)
    IDS_FIELD_NUMBER: _ClassVar[int]
    ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, ids: _Optional[_Iterable[int]] = ...) -> None: ...

class Sampling(_message.Message):
    __slots__ = ("temperature", "top_k", "top_p", "n", "max_tokens", "min_tokens", "stop_token_ids", "ignore_eos", "logprobs", "seed", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty", "logit_bias", "allowed_token_ids", "bad_words", "prompt_logprobs")
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    N_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MIN_TOKENS_FIELD_NUMBER: _ClassVar[int]
    STOP_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    IGNORE_EOS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    MIN_P_FIELD_NUMBER: _ClassVar[int]
    PRESENCE_PENALTY_FIELD_NUMBER: _ClassVar[int]
    FREQUENCY_PENALTY_FIELD_NUMBER: _ClassVar[int]
    REPETITION_PENALTY_FIELD_NUMBER: _ClassVar[int]
    LOGIT_BIAS_FIELD_NUMBER: _ClassVar[int]
    ALLOWED_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    BAD_WORDS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    temperature: float
    top_k: int
    top_p: float
    n: int
    max_tokens: int
    min_tokens: int
    stop_token_ids: _containers.RepeatedScalarFieldContainer[int]
    ignore_eos: bool
    logprobs: int
    seed: int
    min_p: float
    presence_penalty: float
    frequency_penalty: float
    repetition_penalty: float
    logit_bias: _containers.RepeatedCompositeFieldContainer[TokenBias]
    allowed_token_ids: _containers.RepeatedScalarFieldContainer[int]
    bad_words: _containers.RepeatedCompositeFieldContainer[TokenIds]
    prompt_logprobs: int
    def __init__(self, temperature: _Optional[float] = ..., top_k: _Optional[int] = ..., top_p: _Optional[float] = ..., n: _Optional[int] = ..., max_tokens: _Optional[int] = ..., min_tokens: _Optional[int] = ..., stop_token_ids: _Optional[_Iterable[int]] = ..., ignore_eos: _Optional[bool] = ..., logprobs: _Optional[int] = ..., seed: _Optional[int] = ..., min_p: _Optional[float] = ..., presence_penalty: _Optional[float] = ..., frequency_penalty: _Optional[float] = ..., repetition_penalty: _Optional[float] = ..., logit_bias: _Optional[_Iterable[_Union[TokenBias, _Mapping]]] = ..., allowed_token_ids: _Optional[_Iterable[int]] = ..., bad_words: _Optional[_Iterable[_Union[TokenIds, _Mapping]]] = ..., prompt_logprobs: _Optional[int] = ...) -> None: ...

class TokenBias(_message.Message):
    __slots__ = ("token_id", "bias")
    TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    BIAS_FIELD_NUMBER: _ClassVar[int]
    token_id: int
    bias: float
    def __init__(self, token_id: _Optional[int] = ..., bias: _Optional[float] = ...) -> None: ...

class Submit(_message.Message):
    __slots__ = ("request_id", "epoch", "task", "model", "prompt", "sampling", "time_left_s", "eos_token_ids", "tier", "scope", "emitted", "finished_choices", "credit", "transfer_id", "peer_id", "peer_incarnation", "peer_address", "run_alone", "traceparent", "tracestate", "age_s", "keeps_prefix", "prefix_source")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    TASK_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    TIME_LEFT_S_FIELD_NUMBER: _ClassVar[int]
    EOS_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    TIER_FIELD_NUMBER: _ClassVar[int]
    SCOPE_FIELD_NUMBER: _ClassVar[int]
    EMITTED_FIELD_NUMBER: _ClassVar[int]
    FINISHED_CHOICES_FIELD_NUMBER: _ClassVar[int]
    CREDIT_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_ID_FIELD_NUMBER: _ClassVar[int]
    PEER_ID_FIELD_NUMBER: _ClassVar[int]
    PEER_INCARNATION_FIELD_NUMBER: _ClassVar[int]
    PEER_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    RUN_ALONE_FIELD_NUMBER: _ClassVar[int]
    TRACEPARENT_FIELD_NUMBER: _ClassVar[int]
    TRACESTATE_FIELD_NUMBER: _ClassVar[int]
    AGE_S_FIELD_NUMBER: _ClassVar[int]
    KEEPS_PREFIX_FIELD_NUMBER: _ClassVar[int]
    PREFIX_SOURCE_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    epoch: int
    task: str
    model: str
    prompt: _containers.RepeatedScalarFieldContainer[int]
    sampling: Sampling
    time_left_s: float
    eos_token_ids: _containers.RepeatedScalarFieldContainer[int]
    tier: str
    scope: str
    emitted: _containers.RepeatedCompositeFieldContainer[TokenIds]
    finished_choices: _containers.RepeatedScalarFieldContainer[int]
    credit: int
    transfer_id: bytes
    peer_id: str
    peer_incarnation: int
    peer_address: str
    run_alone: bool
    traceparent: str
    tracestate: str
    age_s: float
    keeps_prefix: bool
    prefix_source: PrefixSource
    def __init__(self, request_id: _Optional[str] = ..., epoch: _Optional[int] = ..., task: _Optional[str] = ..., model: _Optional[str] = ..., prompt: _Optional[_Iterable[int]] = ..., sampling: _Optional[_Union[Sampling, _Mapping]] = ..., time_left_s: _Optional[float] = ..., eos_token_ids: _Optional[_Iterable[int]] = ..., tier: _Optional[str] = ..., scope: _Optional[str] = ..., emitted: _Optional[_Iterable[_Union[TokenIds, _Mapping]]] = ..., finished_choices: _Optional[_Iterable[int]] = ..., credit: _Optional[int] = ..., transfer_id: _Optional[bytes] = ..., peer_id: _Optional[str] = ..., peer_incarnation: _Optional[int] = ..., peer_address: _Optional[str] = ..., run_alone: _Optional[bool] = ..., traceparent: _Optional[str] = ..., tracestate: _Optional[str] = ..., age_s: _Optional[float] = ..., keeps_prefix: _Optional[bool] = ..., prefix_source: _Optional[_Union[PrefixSource, _Mapping]] = ...) -> None: ...

class PrefixSource(_message.Message):
    __slots__ = ("transfer_id", "peer_address", "num_tokens", "wait_s")
    TRANSFER_ID_FIELD_NUMBER: _ClassVar[int]
    PEER_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    WAIT_S_FIELD_NUMBER: _ClassVar[int]
    transfer_id: bytes
    peer_address: str
    num_tokens: int
    wait_s: float
    def __init__(self, transfer_id: _Optional[bytes] = ..., peer_address: _Optional[str] = ..., num_tokens: _Optional[int] = ..., wait_s: _Optional[float] = ...) -> None: ...

class OfferPrefix(_message.Message):
    __slots__ = ("transfer_id", "token_ids", "scope", "receiver_id", "receiver_incarnation")
    TRANSFER_ID_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    SCOPE_FIELD_NUMBER: _ClassVar[int]
    RECEIVER_ID_FIELD_NUMBER: _ClassVar[int]
    RECEIVER_INCARNATION_FIELD_NUMBER: _ClassVar[int]
    transfer_id: bytes
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    scope: str
    receiver_id: str
    receiver_incarnation: int
    def __init__(self, transfer_id: _Optional[bytes] = ..., token_ids: _Optional[_Iterable[int]] = ..., scope: _Optional[str] = ..., receiver_id: _Optional[str] = ..., receiver_incarnation: _Optional[int] = ...) -> None: ...

class Cancel(_message.Message):
    __slots__ = ("request_id", "epoch")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    epoch: int
    def __init__(self, request_id: _Optional[str] = ..., epoch: _Optional[int] = ...) -> None: ...

class Credit(_message.Message):
    __slots__ = ("request_id", "epoch", "limit", "finished_choices")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    FINISHED_CHOICES_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    epoch: int
    limit: int
    finished_choices: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, request_id: _Optional[str] = ..., epoch: _Optional[int] = ..., limit: _Optional[int] = ..., finished_choices: _Optional[_Iterable[int]] = ...) -> None: ...

class ConnectPeers(_message.Message):
    __slots__ = ("addresses", "probe_bytes")
    ADDRESSES_FIELD_NUMBER: _ClassVar[int]
    PROBE_BYTES_FIELD_NUMBER: _ClassVar[int]
    addresses: _containers.RepeatedScalarFieldContainer[str]
    probe_bytes: int
    def __init__(self, addresses: _Optional[_Iterable[str]] = ..., probe_bytes: _Optional[int] = ...) -> None: ...

class RouterHeartbeat(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class RouteReport(_message.Message):
    __slots__ = ("address", "transport", "round_trip_s", "gb_per_s", "error")
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    ROUND_TRIP_S_FIELD_NUMBER: _ClassVar[int]
    GB_PER_S_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    address: str
    transport: str
    round_trip_s: float
    gb_per_s: float
    error: str
    def __init__(self, address: _Optional[str] = ..., transport: _Optional[str] = ..., round_trip_s: _Optional[float] = ..., gb_per_s: _Optional[float] = ..., error: _Optional[str] = ...) -> None: ...

class PeerReport(_message.Message):
    __slots__ = ("routes",)
    ROUTES_FIELD_NUMBER: _ClassVar[int]
    routes: _containers.RepeatedCompositeFieldContainer[RouteReport]
    def __init__(self, routes: _Optional[_Iterable[_Union[RouteReport, _Mapping]]] = ...) -> None: ...

class Welcome(_message.Message):
    __slots__ = ("descriptor",)
    DESCRIPTOR_FIELD_NUMBER: _ClassVar[int]
    descriptor: WorkerDescriptor
    def __init__(self, descriptor: _Optional[_Union[WorkerDescriptor, _Mapping]] = ...) -> None: ...

class WorkerDescriptor(_message.Message):
    __slots__ = ("worker_id", "role", "incarnation", "session_address", "transfer_address", "model", "content_digest", "block_size_tokens", "num_blocks", "max_model_len", "tier", "node", "pid", "rank_pids", "exports_kv")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    SESSION_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    CONTENT_DIGEST_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    MAX_MODEL_LEN_FIELD_NUMBER: _ClassVar[int]
    TIER_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    RANK_PIDS_FIELD_NUMBER: _ClassVar[int]
    EXPORTS_KV_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    role: str
    incarnation: int
    session_address: str
    transfer_address: str
    model: str
    content_digest: str
    block_size_tokens: int
    num_blocks: int
    max_model_len: int
    tier: str
    node: str
    pid: int
    rank_pids: _containers.RepeatedScalarFieldContainer[int]
    exports_kv: bool
    def __init__(self, worker_id: _Optional[str] = ..., role: _Optional[str] = ..., incarnation: _Optional[int] = ..., session_address: _Optional[str] = ..., transfer_address: _Optional[str] = ..., model: _Optional[str] = ..., content_digest: _Optional[str] = ..., block_size_tokens: _Optional[int] = ..., num_blocks: _Optional[int] = ..., max_model_len: _Optional[int] = ..., tier: _Optional[str] = ..., node: _Optional[str] = ..., pid: _Optional[int] = ..., rank_pids: _Optional[_Iterable[int]] = ..., exports_kv: _Optional[bool] = ...) -> None: ...

class TopLogprob(_message.Message):
    __slots__ = ("token_id", "logprob")
    TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    LOGPROB_FIELD_NUMBER: _ClassVar[int]
    token_id: int
    logprob: float
    def __init__(self, token_id: _Optional[int] = ..., logprob: _Optional[float] = ...) -> None: ...

class TokenLogprob(_message.Message):
    __slots__ = ("token_id", "logprob", "top")
    TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    LOGPROB_FIELD_NUMBER: _ClassVar[int]
    TOP_FIELD_NUMBER: _ClassVar[int]
    token_id: int
    logprob: float
    top: _containers.RepeatedCompositeFieldContainer[TopLogprob]
    def __init__(self, token_id: _Optional[int] = ..., logprob: _Optional[float] = ..., top: _Optional[_Iterable[_Union[TopLogprob, _Mapping]]] = ...) -> None: ...

class WorkerTiming(_message.Message):
    __slots__ = ("queue_s", "prefill_s", "decode_s", "cached_tokens", "kv_bytes", "kv_blocks", "kv_transport", "kv_fragments_resent", "fetch")
    QUEUE_S_FIELD_NUMBER: _ClassVar[int]
    PREFILL_S_FIELD_NUMBER: _ClassVar[int]
    DECODE_S_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    KV_BYTES_FIELD_NUMBER: _ClassVar[int]
    KV_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    KV_TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    KV_FRAGMENTS_RESENT_FIELD_NUMBER: _ClassVar[int]
    FETCH_FIELD_NUMBER: _ClassVar[int]
    queue_s: float
    prefill_s: float
    decode_s: float
    cached_tokens: int
    kv_bytes: int
    kv_blocks: int
    kv_transport: str
    kv_fragments_resent: int
    fetch: FetchReport
    def __init__(self, queue_s: _Optional[float] = ..., prefill_s: _Optional[float] = ..., decode_s: _Optional[float] = ..., cached_tokens: _Optional[int] = ..., kv_bytes: _Optional[int] = ..., kv_blocks: _Optional[int] = ..., kv_transport: _Optional[str] = ..., kv_fragments_resent: _Optional[int] = ..., fetch: _Optional[_Union[FetchReport, _Mapping]] = ...) -> None: ...

class FetchReport(_message.Message):
    __slots__ = ("outcome", "num_tokens", "took_s")
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TOOK_S_FIELD_NUMBER: _ClassVar[int]
    outcome: str
    num_tokens: int
    took_s: float
    def __init__(self, outcome: _Optional[str] = ..., num_tokens: _Optional[int] = ..., took_s: _Optional[float] = ...) -> None: ...

class TokenDelta(_message.Message):
    __slots__ = ("request_id", "epoch", "choice", "position", "token_ids", "logprobs", "finish", "stop_token_id", "timings", "prompt_logprobs", "prompt_start")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    CHOICE_FIELD_NUMBER: _ClassVar[int]
    POSITION_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    FINISH_FIELD_NUMBER: _ClassVar[int]
    STOP_TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    TIMINGS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_START_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    epoch: int
    choice: int
    position: int
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    logprobs: _containers.RepeatedCompositeFieldContainer[TokenLogprob]
    finish: str
    stop_token_id: int
    timings: WorkerTiming
    prompt_logprobs: _containers.RepeatedCompositeFieldContainer[TokenLogprob]
    prompt_start: int
    def __init__(self, request_id: _Optional[str] = ..., epoch: _Optional[int] = ..., choice: _Optional[int] = ..., position: _Optional[int] = ..., token_ids: _Optional[_Iterable[int]] = ..., logprobs: _Optional[_Iterable[_Union[TokenLogprob, _Mapping]]] = ..., finish: _Optional[str] = ..., stop_token_id: _Optional[int] = ..., timings: _Optional[_Union[WorkerTiming, _Mapping]] = ..., prompt_logprobs: _Optional[_Iterable[_Union[TokenLogprob, _Mapping]]] = ..., prompt_start: _Optional[int] = ...) -> None: ...

class AttemptEnded(_message.Message):
    __slots__ = ("request_id", "epoch", "task", "timings", "error", "error_message")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    TASK_FIELD_NUMBER: _ClassVar[int]
    TIMINGS_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    ERROR_MESSAGE_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    epoch: int
    task: str
    timings: WorkerTiming
    error: str
    error_message: str
    def __init__(self, request_id: _Optional[str] = ..., epoch: _Optional[int] = ..., task: _Optional[str] = ..., timings: _Optional[_Union[WorkerTiming, _Mapping]] = ..., error: _Optional[str] = ..., error_message: _Optional[str] = ...) -> None: ...

class StepFrame(_message.Message):
    __slots__ = ("step_id", "deltas", "ended")
    STEP_ID_FIELD_NUMBER: _ClassVar[int]
    DELTAS_FIELD_NUMBER: _ClassVar[int]
    ENDED_FIELD_NUMBER: _ClassVar[int]
    step_id: int
    deltas: _containers.RepeatedCompositeFieldContainer[TokenDelta]
    ended: _containers.RepeatedCompositeFieldContainer[AttemptEnded]
    def __init__(self, step_id: _Optional[int] = ..., deltas: _Optional[_Iterable[_Union[TokenDelta, _Mapping]]] = ..., ended: _Optional[_Iterable[_Union[AttemptEnded, _Mapping]]] = ...) -> None: ...

class StorageLoad(_message.Message):
    __slots__ = ("tier", "blocks", "hit_blocks", "faults")
    class FaultsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    TIER_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    HIT_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    FAULTS_FIELD_NUMBER: _ClassVar[int]
    tier: str
    blocks: int
    hit_blocks: int
    faults: _containers.ScalarMap[str, int]
    def __init__(self, tier: _Optional[str] = ..., blocks: _Optional[int] = ..., hit_blocks: _Optional[int] = ..., faults: _Optional[_Mapping[str, int]] = ...) -> None: ...

class Progress(_message.Message):
    __slots__ = ("steps", "layers_done", "work_in_hand", "num_waiting", "num_running", "waiting_tokens", "free_blocks", "cached_blocks", "rank_pids", "is_ready", "is_leaving", "storage", "num_preemptions")
    STEPS_FIELD_NUMBER: _ClassVar[int]
    LAYERS_DONE_FIELD_NUMBER: _ClassVar[int]
    WORK_IN_HAND_FIELD_NUMBER: _ClassVar[int]
    NUM_WAITING_FIELD_NUMBER: _ClassVar[int]
    NUM_RUNNING_FIELD_NUMBER: _ClassVar[int]
    WAITING_TOKENS_FIELD_NUMBER: _ClassVar[int]
    FREE_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    CACHED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    RANK_PIDS_FIELD_NUMBER: _ClassVar[int]
    IS_READY_FIELD_NUMBER: _ClassVar[int]
    IS_LEAVING_FIELD_NUMBER: _ClassVar[int]
    STORAGE_FIELD_NUMBER: _ClassVar[int]
    NUM_PREEMPTIONS_FIELD_NUMBER: _ClassVar[int]
    steps: int
    layers_done: int
    work_in_hand: bool
    num_waiting: int
    num_running: int
    waiting_tokens: int
    free_blocks: int
    cached_blocks: int
    rank_pids: _containers.RepeatedScalarFieldContainer[int]
    is_ready: bool
    is_leaving: bool
    storage: _containers.RepeatedCompositeFieldContainer[StorageLoad]
    num_preemptions: int
    def __init__(self, steps: _Optional[int] = ..., layers_done: _Optional[int] = ..., work_in_hand: _Optional[bool] = ..., num_waiting: _Optional[int] = ..., num_running: _Optional[int] = ..., waiting_tokens: _Optional[int] = ..., free_blocks: _Optional[int] = ..., cached_blocks: _Optional[int] = ..., rank_pids: _Optional[_Iterable[int]] = ..., is_ready: _Optional[bool] = ..., is_leaving: _Optional[bool] = ..., storage: _Optional[_Iterable[_Union[StorageLoad, _Mapping]]] = ..., num_preemptions: _Optional[int] = ...) -> None: ...
