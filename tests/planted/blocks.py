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
]
