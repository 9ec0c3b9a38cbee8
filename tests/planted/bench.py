"""Bugs of the router's benchmark: figures that flatter it, stubs that are no workers."""

from planted.bug import Bug

CLIENT = "tests/unit/bench/router/test_client.py::"
CPU = "tests/unit/bench/test_cpu_time.py::"
PLAN = "tests/unit/bench/router/test_plan.py::"
REPORT = "tests/unit/bench/router/test_report.py::"
STUB = "tests/unit/bench/router/test_stub_worker.py::"

BUGS = [
    Bug(
        "the stub's own time counts as the router's",
        "bench/router/report.py",
        "        added.append(to_worker[-1] + to_client[-1])",
        "        added.append(first_at - sample.sent_at)",
        REPORT + "test_added_ttft_leaves_out_the_stubs_own_time",
    ),
    Bug(
        "a core of the router has no tokenizers",
        "bench/router/report.py",
        "    used_s = measured.router_cpu_s + measured.children_cpu_s",
        "    used_s = measured.router_cpu_s",
        REPORT + "test_tokens_per_core_count_the_routers_children_and_no_token_of_a_broken_answer",
    ),
    Bug(
        "a lost connection counts as a refusal",
        "bench/router/report.py",
        "    refused = [s for s in measured.samples if s.error.startswith(REFUSED)]",
        "    refused = [s for s in measured.samples if s.error]",
        REPORT + "test_refusals_are_those_of_the_server_over_the_time_of_the_load",
    ),
    Bug(
        "children of a child use no CPU",
        "bench/cpu_time.py",
        "    for member in family:",
        "    for member in (pid,):",
        CPU + "test_a_process_and_its_descendants_count_and_one_that_ends_meanwhile_does_not",
    ),
    Bug(
        "a process that ends meanwhile breaks the measurement",
        "bench/cpu_time.py",
        "            with contextlib.suppress(OSError):",
        "            with contextlib.nullcontext():",
        CPU + "test_a_process_and_its_descendants_count_and_one_that_ends_meanwhile_does_not",
    ),
    Bug(
        "all clients send the same prompts",
        "bench/router/plan.py",
        '        rng = random.Random(f"{self.seed}:from {self.first_index}")',
        '        rng = random.Random(f"{self.seed}:from 0")',
        PLAN + "test_clients_share_a_load_and_send_nothing_twice",
    ),
    Bug(
        "a keep-alive comment is a first token",
        "bench/router/client.py",
        "            if EVENT in self._seen:",
        "            if self._seen:",
        CLIENT + "test_the_first_event_is_the_first_token_and_not_a_comment",
    ),
    Bug(
        "a first event in two pieces is not seen",
        "bench/router/client.py",
        "            self._seen += data\n",
        "            self._seen = data\n",
        CLIENT + "test_a_whole_answer_in_pieces_of_any_size",
    ),
    Bug(
        "a stub's sequences decode each by itself",
        "bench/router/stub_worker.py",
        "            due_at = self._next_step(due_at + self._pace.token_s)\n",
        "            due_at += self._pace.token_s\n",
        STUB + "test_a_decode_worker_sends_every_token_on_the_steps_that_all_its_sequences_share",
    ),
    Bug(
        "a stub's prefill worker decodes, too",
        "bench/router/stub_worker.py",
        "        if is_whole or submit.task is Task.PREFILL:",
        "        if is_whole:",
        STUB + "test_a_prefill_worker_sends_the_first_token_in_its_time_and_no_other",
    ),
    Bug(
        "a stub has credit without end",
        "bench/router/stub_worker.py",
        "        if attempt.position >= attempt.limit:",
        "        if False:",
        STUB + "test_it_stops_at_the_credit_and_goes_on_with_more",
    ),
    Bug(
        "a stub reads no Cancel",
        "bench/router/stub_worker.py",
        "            del self._attempts[run_id]\n\n    def _credit",
        "            pass\n\n    def _credit",
        STUB + "test_a_cancelled_attempt_is_silent_and_a_newer_one_goes_on",
    ),
    Bug(
        "a stub computes while it waits",
        "bench/router/stub_worker.py",
        "work_in_hand=False",
        "work_in_hand=bool(self._due)",
        STUB + "test_a_slow_stub_is_not_taken_for_a_hung_worker",
    ),
]
