"""Bugs of pools whose block sizes differ."""

from planted.bug import Bug

BUGS: list[Bug] = [
    Bug(
        "pools must have blocks of one size",
        "core/config/tier_pools.py",
        "    if max(sizes) % min(sizes):\n",
        "    if max(sizes) != min(sizes):\n",
        "tests/unit/core/test_config.py::test_block_sizes_of_which_one_divides_the_other_are_taken",
    ),
    Bug(
        "block sizes that do not divide one another are taken",
        "core/config/tier_pools.py",
        "    if max(sizes) % min(sizes):\n",
        "    if max(sizes) < min(sizes):\n",
        "tests/unit/core/test_config.py::test_a_wrong_value_is_named",
    ),
]
