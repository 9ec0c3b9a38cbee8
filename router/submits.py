"""What the workers of an attempt are sent to begin with.

Owns what a Submit holds. Does not know sessions, or how an attempt goes on.
"""

from __future__ import annotations

from dataclasses import replace

from core.ids import Epoch, TransferId
from core.session import PrefixSource, Submit, Task, WorkerDescriptor
from core.types import Path
from router.placement import Placement
from router.request_state import RequestState

DEATHS_BEFORE_ALONE = 2
"""A request that has seen so many workers die runs alone in its next attempt, its last."""


def submits_of(
    run: RequestState,
    epoch: Epoch,
    placement: Placement,
    transfer_id: TransferId,
    source: PrefixSource | None,
    now_s: float,
) -> list[tuple[WorkerDescriptor, Submit]]:
    """Make the Submit of each worker that takes part in an attempt.

    Args:
        run: The request, and how far it has come.
        epoch: Of the attempt.
        placement: Who takes part.
        transfer_id: Of the hand-over, on path pd.
        source: From whom the worker that computes the prompt fetches its beginning.
        now_s: Current instant.
    """
    request = replace(run.request, request_id=run.run_id)
    if run.has_prompt_scores:
        # They need a prompt computed without the prefix cache: once is enough.
        request = replace(request, sampling=replace(request.sampling, prompt_logprobs=None))
    base = Submit(
        request=request,
        epoch=epoch,
        task=Task.LOCAL,
        emitted=tuple(tuple(c.token_ids) for c in run.choices),
        finished_choices=run.finished_choices,
        credit=run.credit,
        run_alone=run.num_deaths >= DEATHS_BEFORE_ALONE,
        # An age, for clocks of two machines differ.
        age_s=max(0.0, now_s - run.timeline.received_at),
    )
    computing = replace(base, prefix_source=source)
    if placement.path is Path.LOCAL:
        return [(placement.decode, computing)]
    prefill = placement.prefill
    decode = placement.decode
    return [
        (prefill, _with_peer(computing, Task.PREFILL, transfer_id, decode)),
        (decode, _with_peer(base, Task.DECODE, transfer_id, prefill)),
    ]


def _with_peer(
    submit: Submit, task: Task, transfer_id: TransferId, peer: WorkerDescriptor
) -> Submit:
    return replace(
        submit,
        task=task,
        transfer_id=transfer_id,
        peer_id=peer.worker_id,
        peer_incarnation=peer.incarnation,
        peer_address=peer.transfer_address,
    )
