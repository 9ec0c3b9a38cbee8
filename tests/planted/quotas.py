"""Bugs of quotas: charges lost, counted twice or refunded twice, and shares without end."""

from planted.bug import Bug

RULES = "tests/unit/router/quotas/test_rules.py::"
LEDGER = "tests/unit/router/quotas/test_ledger.py::"
ROUTERS = "tests/unit/router/quotas/test_quotas.py::"
FAULTS = "tests/unit/router/quotas/test_quotas_without_store.py::"
CHARGING = "tests/unit/router/test_charging.py::"

BUGS = [
    Bug(
        "routers that began anew follow another time and leave what they charged behind",
        "router/quotas/shared_clock.py",
        "        if is_lost and value.base != self._base and value.now_ms < self.now_ms():\n",
        "        if False:\n",
        FAULTS + "test_who_meets_others_that_began_anew_and_count_from_elsewhere_frees_nobody",
    ),
    Bug(
        "who leaves takes back what a copy of the request leans on",
        "router/quotas/account.py",
        "            self.settle(charge, NOTHING)\n\n",
        "            self._give_back(charge)\n\n",
        FAULTS + "test_who_leaves_takes_nothing_back_that_a_copy_of_the_request_leans_on",
    ),
    Bug(
        "the first calls that fail grant up to the limit, at each router",
        "router/quotas/quotas.py",
        "decide_locally(claim, self._sharing_alone())",
        "decide_locally(claim, self._sharing())",
        FAULTS + "test_also_the_first_calls_that_fail_grant_no_more_than_a_share",
    ),
    Bug(
        "a stream that is resumed by the id it was given is charged again",
        "router/charging.py",
        'first.request_id or (made[0].request_id if is_resumable else "")',
        "first.request_id",
        CHARGING + "test_a_stream_that_is_resumed_by_the_id_it_was_given_is_charged_once",
    ),
    Bug(
        "after a loss, a drift of clocks moves what was charged into another second",
        "router/quotas/shared_clock.py",
        "        if value.base == self._base:\n            self._offset_ms",
        "        if False:\n            self._offset_ms",
        FAULTS + "test_a_charge_counts_once_after_a_loss_however_clocks_have_drifted",
    ),
    Bug(
        "a copy that comes late overwrites what is known",
        "router/quotas/ledger.py",
        "self.slots.get(key, slot).merged(slot)",
        "slot",
        LEDGER + "test_a_copy_that_is_behind_takes_nothing_away",
    ),
    Bug(
        "copies are added up instead of merged",
        "router/quotas/ledger.py",
        "Slot(*map(max, self, other))",
        "Slot(*map(sum, zip(self, other, strict=True)))",
        LEDGER + "test_copies_merge_in_any_order_and_any_number_of_times",
    ),
    Bug(
        "a minute ends at its border",
        "router/quotas/ledger.py",
        "            if second >= now_s - WINDOW_S and router",
        "            if second >= now_s - WINDOW_S + 1 and router",
        LEDGER + "test_a_second_counts_for_sixty_full_seconds_after_its_end",
    ),
    Bug(
        "a faster router's charges are not looked at",
        "router/quotas/account.py",
        "            if not answer.is_written:\n                return False\n",
        "",
        ROUTERS + "test_what_one_router_grants_counts_at_the_other",
    ),
    Bug(
        "a refusal is decided by what was known before",
        "router/quotas/account.py",
        "        is_fresh = False\n",
        "        is_fresh = True\n",
        ROUTERS + "test_a_refund_that_another_router_has_just_told_is_looked_for",
    ),
    Bug(
        "a call whose answer was lost is charged twice",
        "router/quotas/account.py",
        "            for charge in claim.doubtful:\n                self._give_back(charge)\n",
        "",
        FAULTS + "test_a_call_whose_answer_is_lost_charges_once",
    ),
    Bug(
        "who leaves while being charged pays",
        "router/quotas/account.py",
        "            elif isinstance(outcome, Charge):  # it waits no longer\n"
        "                self.settle(outcome, NOTHING)\n",
        "",
        FAULTS + "test_one_of_several_that_leaves_while_they_are_charged_pays_nothing",
    ),
    Bug(
        "a charge is refunded twice",
        "router/quotas/account.py",
        "        if charge.is_settled:\n            return\n",
        "",
        ROUTERS + "test_what_was_not_used_is_refunded_once_and_seen_at_the_other_router",
    ),
    Bug(
        "what a long request used beyond its estimate is free",
        "router/quotas/quotas.py",
        "        self._account(key).settle(charge, used)\n",
        "        if key in self._accounts:\n            self._account(key).settle(charge, used)\n",
        ROUTERS + "test_what_comes_beyond_an_estimate_is_charged_of_a_request_that_outlasts"
        "_the_minute",
    ),
    Bug(
        "a refund stays with its router",
        "router/quotas/account.py",
        "        charge.is_settled = True\n        self.is_dirty = True\n        paid",
        "        charge.is_settled = True\n        paid",
        ROUTERS + "test_what_was_not_used_is_refunded_once_and_seen_at_the_other_router",
    ),
    Bug(
        "a run that others lean on is refunded",
        "router/quotas/ledger.py",
        "        if last.owner != owner:\n            return False\n",
        "",
        ROUTERS + "test_who_cuts_the_first_run_short_pays_for_the_second",
    ),
    Bug(
        "every run of a named request is charged",
        "router/quotas/account.py",
        "paid = draft.paid(claim.idempotency_key) if claim.idempotency_key else NOTHING",
        "paid = NOTHING",
        ROUTERS + "test_a_named_request_is_charged_once_however_often_and_wherever_it_runs",
    ),
    Bug(
        "a name that a client gives buys any prompts for the price of one",
        "router/charging.py",
        'return f"{request_id}:{content.hexdigest()}"',
        "return request_id",
        CHARGING + "test_another_request_under_the_same_name_is_charged_by_itself",
    ),
    Bug(
        "a named request is free for a minute once it was charged",
        "router/quotas/ledger.py",
        "if last is None or last.number % RUNS_PER_CHARGE == 0:",
        "if last is None:",
        ROUTERS + "test_one_charge_pays_for_some_runs_and_not_for_a_minute_of_them",
    ),
    Bug(
        "a router without the store grants without end",
        "router/quotas/rules.py",
        "    if used == NOTHING or fits(used, amount, share):\n",
        "    if True:\n",
        FAULTS + "test_without_the_store_each_router_grants_its_share_and_waits_for_nobody",
    ),
    Bug(
        "a client is told of less than it has to wait",
        "router/quotas/rules.py",
        "ceil(retry_after_s)",
        "round(retry_after_s)",
        RULES + "test_a_message_names_the_wait_of_retry_after_and_never_a_shorter_one",
    ),
    Bug(
        "a store that is away is asked by every request",
        "router/quotas/quotas.py",
        "if self._store is not None and not self.is_local:",
        "if self._store is not None:",
        FAULTS + "test_without_the_store_each_router_grants_its_share_and_waits_for_nobody",
    ),
    Bug(
        "after a loss a router grants by what it knows",
        "router/quotas/quotas.py",
        "GRACE_MS = 2_500",
        "GRACE_MS = 0",
        FAULTS + "test_an_emptied_store_forgets_nothing_that_a_router_knew",
    ),
    Bug(
        "a router that finds a new router's epoch grants by what it knows",
        "router/quotas/shared_clock.py",
        "self.lost_ms = self.now_ms() if is_lost else max(self.lost_ms, value.lost_ms)",
        "self.lost_ms = max(self.lost_ms, value.lost_ms)",
        FAULTS + "test_no_router_grants_by_what_it_knows_if_a_new_one_was_first_at_an_emptied"
        "_store",
    ),
    Bug(
        "a refund looks for its charge where it was before the clock moved",
        "router/quotas/account.py",
        "ledger.refund(charge.second + self._clock.moved_s, amount)",
        "ledger.refund(charge.second, amount)",
        ROUTERS + "test_what_is_refunded_moves_with_what_was_charged",
    ),
    Bug(
        "what was being written while the clock moved counts in two seconds",
        "router/quotas/account.py",
        "        draft.shift(self._clock.moved_s - moved_s)\n",
        "",
        FAULTS + "test_a_charge_counts_once_if_its_call_finds_another_clock_in_an_emptied_store",
    ),
    Bug(
        "a client is told when its request fits into the limit, and not into the share",
        "router/quotas/rules.py",
        "        retry_after_s = max(retry_after_s, over_share.retry_after_s)\n",
        "        pass\n",
        RULES + "test_a_client_is_told_when_its_request_fits_into_limit_and_share",
    ),
    Bug(
        "what was charged after a loss is overwritten by who knew its version with less",
        "router/quotas/account.py",
        "            if is_share_new or not answer.is_expected:\n",
        "            if is_share_new:\n",
        FAULTS + "test_what_was_charged_after_a_loss_counts_though_its_version_was_known_with_less",
    ),
    Bug(
        "a run that began unaware of another one hides it",
        "router/quotas/account.py",
        "has_runs=answer.is_expected or not charges",
        "has_runs=True",
        FAULTS + "test_what_was_charged_after_a_loss_counts_though_its_version_was_known_with_less",
    ),
    Bug(
        "what an emptied store lacks is not written again",
        "router/quotas/quotas.py",
        "        for account in self._accounts.values():\n            account.is_dirty = True\n",
        "",
        FAULTS + "test_an_emptied_store_is_told_of_routers_that_are_dead",
    ),
    Bug(
        "a router's own clock counts for all",
        "router/quotas/shared_clock.py",
        "        if not self.is_shared:\n            self._move(ahead_ms)\n",
        "        if not self.is_shared:\n            self._move(0)\n",
        ROUTERS + "test_a_router_that_joins_with_any_clock_frees_nobody",
    ),
    Bug(
        "a forged value counts",
        "router/quotas/values.py",
        "        if not hmac.compare_digest(tag, self._tag(name, body)):\n"
        "            return None\n",
        "",
        "tests/unit/router/quotas/test_values.py::"
        "test_what_no_router_of_this_cluster_wrote_there_is_not_read",
    ),
    Bug(
        "a cancellation that the client of Redis loses is lost",
        "cluster/redis/client.py",
        "        if task is not None and task.cancelling() > num_cancels:\n",
        "        if False:\n",
        "tests/unit/cluster/redis/test_client.py::"
        "test_a_cancellation_that_the_client_loses_is_not_lost",
    ),
    Bug(
        "a failed request is charged",
        "router/charging.py",
        "        if not ended.timing.path or "
        "(is_ours and not isinstance(error, DeadlineExceeded)):\n"
        "            return 0\n",
        "",
        CHARGING + "test_our_faults_are_not_charged_and_the_clients_choices_are",
    ),
    Bug(
        "only one choice is charged",
        "router/charging.py",
        "sampling.max_tokens * sampling.n\n",
        "sampling.max_tokens\n",
        CHARGING + "test_prompt_and_the_longest_output_of_every_choice_are_charged_until_the_end",
    ),
    Bug(
        "a router that counts alone takes the whole limit for its share",
        "router/quotas/rules.py",
        "    share = share_of(limits, sharing.num_routers)\n    # The first",
        "    share = limits\n    # The first",
        "seeds 3-4",
    ),
    Bug(
        "runs that others have begun are not taken over",
        "router/quotas/account.py",
        "self.ledger.merge(slots, answer.other.runs)",
        "self.ledger.merge(slots, {})",
        "seeds 3-4",
    ),
    Bug(
        "what others have charged is not taken over",
        "router/quotas/account.py",
        "self.ledger.merge(slots, answer.other.runs)",
        "self.ledger.merge({}, answer.other.runs)",
        "seeds 3-4",
    ),
    Bug(
        "a router that found the store away never asks it again",
        "router/quotas/quotas.py",
        "            self.is_local = False\n",
        "",
        "seeds 3-4",
    ),
    Bug(
        "of a named request that has ended nothing is refunded",
        "router/quotas/account.py",
        "less(charge.amount, less(counted, charge.paid))",
        "NOTHING",
        "seeds 8-9",
    ),
]
