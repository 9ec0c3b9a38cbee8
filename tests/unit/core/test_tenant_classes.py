"""Which tenant classes a config may list."""

import pytest

from core.config import load_config
from core.errors import ConfigError
from core.tenant_classes import MAX_CLASSES, TenantClasses

MANY = [f"c{n}" for n in range(MAX_CLASSES)]


@pytest.mark.parametrize(
    ("listed", "message"),
    [
        (MANY, "tenant_classes has 16 names, the limit is 15: each is a label of metrics"),
        (["Gold"], "tenant_classes has the name 'Gold'"),
        ([""], "tenant_classes has the name ''"),
        (["1st"], "a letter first"),
        (["acme corp"], "acme corp"),
        (["x" * 33], "use 1 to 32 lower-case letters"),
        (["default"], "neither default nor none"),
        (["none"], "neither default nor none"),
        (["gold", "trial", "gold"], "tenant_classes has a name twice"),
    ],
)
def test_a_class_that_cannot_be_meant_is_named(listed, message):
    with pytest.raises(ConfigError, match=message):
        load_config(None, {"tenant_classes": listed}, {})


def test_as_many_as_are_labels_may_be_listed_in_a_file_or_a_variable():
    config = load_config(None, {"tenant_classes": MANY[:-1]}, {})
    assert TenantClasses(config.tenant_classes).names == ("default", *MANY[:-1])
    config = load_config(None, {}, {"BATON_TENANT_CLASSES": "gold, trial"})
    assert config.tenant_classes == ("gold", "trial")


def test_a_key_of_a_class_that_is_not_listed_counts_as_default():
    classes = TenantClasses(["gold"])
    assert [classes.of_key(name) for name in ("gold", "default", "acme", "none")] == [
        "gold",
        "default",
        "default",
        "default",
    ]
