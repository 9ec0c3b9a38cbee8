"""Bugs of text, stops, frames and readiness."""

from planted.bug import Bug

DETOKENIZING = "tests/unit/router/text/test_detokenizing.py"
FRAMES = "tests/unit/worker/test_attempt.py"
CHOICES = "tests/simulation/test_choices.py"
STOPPING = "tests/unit/router/test_choice_output.py"
MAKING = "tests/unit/router/test_request_builder.py"
STOPPED = "test_a_choice_that_a_stop_string_ended_is_computed_no_further"

BUGS = [
    Bug("broken bytes are replaced as one by byte fallback", "router/text/detokenizing.py",
        "EACH_BYTE if self._falls_back else", '"replace" if self._falls_back else',
        f"{DETOKENIZING}::test_broken_bytes_show_as_such_and_what_follows_is_right"),
    Bug("bytes of a fallback are decoded with what is around them", "router/text/detokenizing.py",
        "BYTE_NAME.fullmatch(name) if self._falls_back else None", "None",
        f"{DETOKENIZING}::test_broken_bytes_show_as_such_and_what_follows_is_right"),
    Bug("a skipped special token breaks a character", "router/text/detokenizing.py",
        "return (skips_special and token_id in self._hidden_ids) or", "return",
        f"{DETOKENIZING}::test_broken_bytes_show_as_such_and_what_follows_is_right"),
    Bug("what a prompt left of a character is told again", "router/text/detokenizing.py",
        "        return text.removeprefix(foreign)", "        return text",
        f"{DETOKENIZING}::test_a_prompt_that_ends_inside_a_character_is_not_told_again"),
    Bug("special tokens at a prompt's end hide the word before them", "router/text/detokenizing.py",
        "            if not self.is_hidden(token_id, skips_special=skips_special)\n", "",
        f"{DETOKENIZING}::test_special_tokens_at_the_end_of_a_prompt_cost_the_output_no_space"),
    Bug("one attempt may fill a frame", "worker/router_session.py",
        "attempt.take(min(share_bytes, left_bytes))", "attempt.take(left_bytes)",
        f"{FRAMES}::test_one_with_much_to_say_holds_back_nobodys_tokens"),
    Bug("a frame has no size", "worker/router_session.py",
        "FRAME_BYTES = 256 << 10", "FRAME_BYTES = 256 << 30",
        f"{FRAMES}::test_one_with_much_to_say_holds_back_nobodys_tokens"),
    Bug("what a frame had no room for is forgotten", "worker/router_session.py",
        "            if attempt.has_unsent:\n", "            if False:\n",
        f"{FRAMES}::test_much_to_say_is_said_in_frames_of_a_bounded_size_scores_first"),
    Bug("after a reconnect no score comes again", "worker/attempt.py",
        "        self.num_scores_sent = min(wanted.num_scores, len(self.prompt_logprobs))\n", "",
        f"{CHOICES}::test_scores_of_a_prompt_come_once_and_whole_though_the_session_is_cut"),
    Bug("scores that came twice are told twice", "router/attempt_state.py",
        "delta.prompt_logprobs[known - delta.prompt_start :]", "delta.prompt_logprobs",
        "tests/unit/router/test_attempt_state.py::"
        "test_scores_are_told_once_and_whole_before_any_token"),
    Bug("a missing part of the scores is not missed", "router/attempt_state.py",
        "        if delta.prompt_start > known:", "        if False:",
        "tests/unit/router/test_attempt_state.py::"
        "test_a_missing_part_ends_the_attempt"),
    Bug("scores interrupted by a preemption are kept", "engine/scheduling/block_supply.py",
        "            sequence.prompt_logprobs.clear()\n", "            pass\n",
        "tests/unit/engine/scheduling/test_scheduler.py"
        "::test_prompt_scores_that_a_preemption_interrupts_are_there_once"),
    Bug("nobody tells the worker that a choice is over", "router/attempt_state.py",
        "            self.on_choice_finished(self)\n", "            pass\n",
        f"{CHOICES}::{STOPPED}"),
    Bug("a stop string ends an output before min_tokens", "router/choice_output.py",
        "if not self._stop or len(self.token_ids) <= self._min_tokens:", "if not self._stop:",
        f"{STOPPING}::test_stops_are_looked_for_after_min_tokens_only"),
    Bug("of stops in one piece of text the shortest wins", "router/choice_output.py",
        "(self._held.find(s), -len(s), s)", "(self._held.find(s), len(s), s)",
        f"{STOPPING}::test_of_stops_that_come_in_one_piece_at_one_place_the_longest_is_shown"),
    Bug("a stop string that is a hidden token is never peer_report", "router/request_builder.py",
        "        stop_ids = (*sampling.stop_token_ids, *(i for i, _ in hidden_stops))\n",
        "        stop_ids = sampling.stop_token_ids\n",
        f"{MAKING}::test_a_stop_that_is_a_hidden_special_token_becomes_a_stop_token"),
    Bug("a hidden stop is left out though it was asked for", "router/choice_output.py",
        'tail += stop if stop and self._includes_stop else ""', "pass",
        f"{STOPPING}::test_a_hidden_special_token_ends_the_text_as_the_stop_string_it_is"),
    Bug("tokens that the model has no row for come in", "router/request_builder.py",
        "        self._check_rows(params.prompt, token_ids)\n", "",
        f"{MAKING}::test_a_token_that_the_model_has_no_row_for_is_named"),
    Bug("an id without a row ends the rank", "engine/model/runner.py",
        "        failed = _outside(plan.items, self.model.spec.vocabulary_size)\n",
        "        failed: dict[int, str] = {}\n",
        "tests/component/test_model.py"
        "::test_an_id_that_the_model_has_no_row_for_fails_only_its_own_sequence"),
    Bug("a split model takes an id without a row for another's", "engine/model/model.py",
        "        if not 0 <= token_ids.min() <= token_ids.max() < self.spec.vocabulary_size:",
        "        if False:",
        "tests/component/test_sharding.py"
        "::test_a_split_model_refuses_an_id_that_no_rank_has_a_row_for"),
    Bug("any number of prompt scores may be asked for", "router/request_limits.py",
        "        if num_scores > limit:", "        if False:",
        f"{MAKING}::test_prompt_scores_have_a_limit"),
    Bug("ready without a pool that the path needs", "router/observe/readiness.py",
        "if self._must_cross or not self._has_crossed or not live:",
        "if not self._has_crossed or not live:",
        "tests/simulation/test_readiness.py"
        "::test_a_path_that_needs_both_pools_is_not_ready_while_one_is_empty"),
    Bug("each request from the terminal has a loop of its own", "cli/client.py",
        "@functools.cache\ndef _runner", "def _runner",
        "tests/unit/cli/test_client.py"
        "::test_all_requests_of_a_process_run_on_one_loop"),
    Bug("a text that cannot fit is tokenized first", "router/text/tokenizing.py",
        "        check_bytes(text, max_bytes)\n", "",
        "tests/contract/test_tokenizer.py"
        "::test_what_may_fit_is_counted_in_bytes_to_the_last_one"),
]  # fmt: skip
