"""Bugs of the configuration: what is taken from where, what is refused, what is shown of it."""

from planted.bug import Bug

BY = "tests/unit/core/config/test_renamed.py::"
CONFIG = "tests/unit/core/test_config.py::"
CHECK = "tests/unit/cluster/test_machine_check.py::"
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
    Bug(
        "`up` starts what `check-config` refuses",
        "cli/up.py",
        "        check_machine(config, spec)\n",
        "        pass\n",
        CHECK + "test_what_a_start_would_refuse_is_refused_before_it",
    ),
    Bug(
        "room for less than a block is taken for none",
        "cluster/block_stores.py",
        "        if 0 < num_bytes < block_bytes:\n",
        "        if False:\n",
        CHECK + "test_what_a_start_would_refuse_is_refused_before_it",
    ),
    Bug(
        "check-config makes the folder of a storage tier",
        "kv_storage/disk.py",
        "    there = next(each for each in (folder, *folder.parents) if each.exists())\n",
        "    _make_private(there := folder)\n",
        CHECK + "test_what_fits_is_accepted_and_leaves_nothing_behind",
    ),
    Bug(
        "check-config does not read the secrets that a config names",
        "cluster/machine_check.py",
        "    with_read_secrets(config)\n",
        "",
        CHECK + "test_what_a_start_would_refuse_is_refused_before_it",
    ),
    Bug(
        "a wrong setting is told of in the validator's words",
        "core/validation_words.py",
        '    if error["type"] in WORDS:\n',
        "    if False:\n",
        CONFIG + "test_a_wrong_value_is_told_of_in_plain_words",
    ),
    Bug(
        "check-config passes two servers on one port",
        "core/config/router.py",
        "if router.http_port and router.http_port == router.grpc_port:",
        "if False:",
        CONFIG + "test_a_wrong_value_is_named",
    ),
    Bug(
        "a process that cannot read its config logs the secrets in it",
        "core/config/node.py",
        ", hide_input_in_errors=True)",
        ")",
        CONFIG + "test_no_error_about_a_config_has_its_secrets",
    ),
    Bug(
        "a wrong secret is quoted",
        "core/config/sources.py",
        "if _may_show(fields, dotted) else",
        "if dotted else",
        CONFIG + "test_no_error_about_a_config_has_its_secrets",
    ),
    Bug(
        "a broken config file is quoted",
        "core/config/file.py",
        "yaml.compose(io.StringIO(text), ",
        "yaml.compose(text, ",
        CONFIG + "test_no_error_about_a_config_has_its_secrets",
    ),
    Bug(
        "a log of a bad body quotes it",
        "router/http/body_model.py",
        ", hide_input_in_errors=True)",
        ")",
        CONFIG + "test_no_error_about_a_body_has_what_its_client_wrote",
    ),
    Bug(
        "the last of two equal keys in a file silently wins",
        "core/config/file.py",
        "                if (key.tag, key.value) in known:\n",
        "                if False:\n",
        CONFIG + "test_a_key_that_stands_twice_in_a_file_is_refused",
    ),
    Bug(
        "check-config passes a door_key of another certificate",
        "cli/main.py",
        "    if resolved.security.door_certificate:\n",
        "    if False:\n",
        CONFIG + "test_check_config_refuses_a_door_key_of_another_certificate",
    ),
]
