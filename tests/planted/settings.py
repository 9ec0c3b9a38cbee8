"""Faults of the configuration."""

from planted.bug import Bug

BY = "tests/unit/core/config/test_renamed.py::"
BUGS: list[Bug] = [
    Bug(
        "a setting given by both its names silently takes one",
        "core/config/renamed.py",
        "        if name in group:\n",
        "        if False:\n",
        BY + "test_both_names_in_one_source_are_refused_even_when_they_agree",
    ),
    Bug(
        "an old name in a file beats a flag",
        "core/config/sources.py",
        "        tree = merge(tree, with_new_names(part, source, on_renamed))\n",
        "        tree = with_new_names(merge(tree, part), source, on_renamed)\n",
        BY + "test_a_later_source_wins_whichever_name_it_uses",
    ),
    Bug(
        "pools that share a group in a file are renamed as one",
        "core/config/renamed.py",
        "    tree = _copy(tree)\n",
        "",
        BY + "test_pools_that_share_a_group_in_a_file_are_renamed_once_each",
    ),
]
