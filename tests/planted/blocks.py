"""Bugs of pools whose block sizes differ."""

from planted.bug import Bug

BUGS: list[Bug] = [
    Bug(
        "pools must have blocks of one size",
        "core/config/tree.py",
        "        if not self.colocated and max(sizes) % min(sizes):\n",
        "        if not self.colocated and max(sizes) != min(sizes):\n",
        "tests/unit/core/test_config.py::test_block_sizes_of_which_one_divides_the_other_are_taken",
    ),
    Bug(
        "block sizes that do not divide one another are taken",
        "core/config/tree.py",
        "        if not self.colocated and max(sizes) % min(sizes):\n",
        "        if not self.colocated and max(sizes) < min(sizes):\n",
        "tests/unit/core/test_config.py::test_a_wrong_value_is_named",
    ),
    Bug(
        "a prompt that decode has cached is taken for a shorter one",
        "router/placement.py",
        "    size = len(request.token_ids)\n",
        "    size = len(request.token_ids) - (8 if decode[0].load.cached_blocks else 0)\n",
        "tests/unit/router/test_placement.py",
    ),
]
