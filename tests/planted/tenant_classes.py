"""Bugs of tenant classes: labels without bound, counts for the wrong class, lost classes."""

from planted.bug import Bug

CREDENTIALS = "tests/unit/router/access/test_credentials.py::"
KEY_FILE = "tests/unit/router/access/test_key_file.py::"
TELEMETRY = "tests/unit/router/observe/test_telemetry.py::"
TENANTS = (
    "tests/component/test_tenants.py::"
    "test_what_a_key_asks_for_counts_for_its_class_from_the_first_byte_to_the_end"
)

BUGS = [
    Bug(
        "whoever writes the key file adds labels to a running router",
        "router/access/credentials.py",
        "            tenant_class=self._classes.of_key(who.tenant_class),\n",
        "",
        CREDENTIALS + "test_keys_that_come_later_add_no_class_to_those_of_the_config",
    ),
    Bug(
        "a class that is not listed is a series of its own",
        "core/tenant_classes.py",
        "        return name if name in self.names else DEFAULT_CLASS\n",
        "        return name\n",
        TELEMETRY + "test_no_more_series_than_listed_classes_whatever_keys_and_callers_say",
    ),
    Bug(
        "a config may list any number of classes",
        "core/tenant_classes.py",
        "    if len(listed) >= MAX_CLASSES:\n",
        "    if False:\n",
        "tests/unit/core/test_tenant_classes.py::test_a_class_that_cannot_be_meant_is_named",
    ),
    Bug(
        "a class may have any name",
        "router/access/key_file.py",
        "    if not is_class_name(name):\n",
        "    if False:\n",
        KEY_FILE + "test_a_line_whose_class_could_be_no_label_opens_nothing",
    ),
    Bug(
        "baton up starts with keys of a class that nobody listed",
        "router/access/key_file.py",
        "return {name: num for name, num in named.items() if name not in classes.names}",
        "return {}",
        KEY_FILE + "test_keys_of_a_class_that_the_config_does_not_list_are_refused_at_start",
    ),
    Bug(
        "a key that is replaced loses its class",
        "cli/keys.py",
        "new_key(who.tenant, who.tier, who.role, expires_at, who.tenant_class)",
        "new_key(who.tenant, who.tier, who.role, expires_at)",
        "tests/unit/cli/test_keys.py::test_a_key_has_a_class_and_keeps_it_when_it_is_replaced",
    ),
    Bug(
        "requests forget the class of their key",
        "router/request_builder.py",
        "            tenant_class=params.identity.tenant_class,\n",
        "",
        TENANTS,
    ),
    Bug(
        "those who guess keys count as the tenants without a class",
        "router/calls.py",
        '_NOBODY = Identity(tier="", tenant_class=NO_CLASS)',
        '_NOBODY = Identity(tier="")',
        TENANTS,
    ),
    Bug(
        "the first refusal of a class has no rate",
        "router/observe/telemetry.py",
        "for code in sorted(SHORTAGE_CODES):",
        "for code in ():",
        TELEMETRY + "test_what_tenants_ask_for_is_counted_by_their_class",
    ),
    Bug(
        "a key's limits are shown as those of a tier that is not there",
        "cli/keys.py",
        "tiers.by_name[tiers.of_key(tier)]",
        "tiers.by_name[tier if tier in tiers.by_name else 'batch']",
        "tests/unit/cli/test_keys.py::"
        "test_the_list_shows_the_limits_of_each_keys_tier_where_the_config_is_given",
    ),
]
