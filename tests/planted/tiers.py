"""Bugs of tiers: who gets which, who goes next, who makes room."""

from planted.bug import Bug

CHOICE = "tests/unit/router/test_tiers.py::"
SERVERS = "tests/component/test_tiers.py::"

BUGS = [
    Bug(
        "whoever asks for a tier gets it",
        "router/tiers.py",
        "if self._delay_s(tier) < self._delay_s(own) and not identity.has(Right.OPERATE):",
        "if False:",
        SERVERS + "test_a_tier_that_a_key_may_not_have_is_refused_by_name",
    ),
    Bug(
        "a tier of equal delay counts as higher",
        "router/tiers.py",
        "if self._delay_s(tier) < self._delay_s(own) and",
        "if tier != own and self._delay_s(tier) <= self._delay_s(own) and",
        CHOICE + "test_a_key_may_step_back_or_aside_and_not_ahead",
    ),
    Bug(
        "a header goes before the body without a word",
        "router/tiers.py",
        "if asked and in_header and asked != in_header:",
        "if False:",
        CHOICE + "test_field_and_header_may_say_the_same_and_not_two_things",
    ),
    Bug(
        "the tier's limit counts for no prompt",
        "router/request_limits.py",
        "if limit_tokens and len(token_ids) > limit_tokens:",
        "if False:",
        "tests/unit/router/test_request_builder.py"
        "::test_a_tier_limits_its_prompts_and_what_fits_is_cut_to_that",
    ),
    Bug(
        "a key of an unknown tier has a tier that is none",
        "router/access/credentials.py",
        "tier=self._tiers.of_key(entry.identity.tier))",
        "tier=entry.identity.tier)",
        "tests/unit/router/access/test_credentials.py"
        "::test_keys_of_an_unknown_tier_open_in_the_default_one_and_are_told_at_each_reading",
    ),
]
