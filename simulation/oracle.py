"""What a request must answer, computed alone: no scheduler, no cluster, no transfer, no resume.

Owns the reference output of the hash model: one sequence after the other on a pool of its own, and
text and stop strings by the plainest reading of their definition. Does not know the router's code.
"""

from __future__ import annotations

from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any

from core.kv_layout import KVLayout
from core.plan import SampleSpec, StepItem, StepPlan
from core.types import GenerateRequest, Logprob
from simulation.hash_runner import HashModel, MemoryKV
from simulation.ports import InlineDecoder


@dataclass(frozen=True, slots=True)
class Expected:
    """Output of one choice."""

    token_ids: tuple[int, ...]
    text: str
    finish: str


async def _no_wait(_: float) -> None:
    """Costs are of no interest here."""


def _drive(coroutine: Coroutine[Any, Any, Any]) -> Any:  # noqa: ANN401
    """Run a coroutine that never waits."""
    try:
        coroutine.send(None)
    except StopIteration as done:
        return done.value
    raise RuntimeError("the reference run waited for something")


class Oracle:
    """Reference outputs for one layout."""

    def __init__(self, layout: KVLayout, vocabulary_size: int, max_model_len: int) -> None:
        """Make a pool for one sequence."""
        self._layout = layout
        num_blocks = layout.blocks_for(max_model_len) + 1
        self._kv = MemoryKV(layout, num_blocks)
        self._model = HashModel(layout, self._kv, vocabulary_size, _no_wait, lambda plan: 0.0)
        self._table = tuple(range(num_blocks))

    def expected(self, request: GenerateRequest) -> list[Expected]:
        """Compute every choice of a request."""
        num_choices = request.sampling.n
        if request.sampling.temperature == 0:  # nothing is drawn: they cannot differ
            return num_choices * [self._choice(request, 0)]
        return [self._choice(request, choice) for choice in range(num_choices)]

    def scores(self, request: GenerateRequest) -> tuple[Logprob, ...]:
        """Score a request's prompt, from the second token on."""
        prompt = request.token_ids
        most = request.sampling.prompt_logprobs or 0
        item = StepItem(
            1,
            0,
            prompt,
            self._table,
            scope=request.scope,
            targets=prompt[1:],
            num_target_logprobs=most,
        )
        result = _drive(self._model.execute(StepPlan(1, (item,)), lambda step_id, layer: None))
        scored: tuple[Logprob, ...] = result.scored.get(1, ())
        return scored

    def _choice(self, request: GenerateRequest, choice: int) -> Expected:
        sampling = request.sampling
        # What a choice has computed of the prompt, the next one finds in the same blocks.
        start = len(request.token_ids) - 1 if choice else 0
        tokens = list(request.token_ids)
        output: list[int] = []
        decoder = InlineDecoder()
        text = ""
        while True:
            spec = SampleSpec(choice, len(output), request.seed, sampling)
            item = StepItem(
                1, start, tuple(tokens[start:]), self._table, (spec,), scope=request.scope
            )
            start = len(tokens)
            result = _drive(self._model.execute(StepPlan(1, (item,)), lambda step_id, layer: None))
            token_id = result.tokens[1, choice].token_id
            tokens.append(token_id)
            output.append(token_id)
            is_eos = token_id in request.eos_token_ids and not sampling.ignore_eos
            is_last = is_eos or len(output) == sampling.max_tokens
            # The end token is an output, and has no text.
            text += "" if is_eos else decoder.push(token_id)
            if is_last:
                text += decoder.flush()
            # The earliest of all stop strings ends the text, whichever is named first.
            cuts = [text.find(s) for s in sampling.stop if s in text]
            if cuts:
                return Expected(tuple(output), text[: min(cuts)], "stop")
            if is_last:
                return Expected(tuple(output), text, "stop" if is_eos else "length")
