"""Lines of a key file: what each says, and which open nothing."""

import time

import pytest

from core.errors import ConfigError, Unauthenticated
from core.tenant_classes import TenantClasses
from router.access.credentials import RELOAD_S, Keyring, new_key
from router.access.identities import Identity, KeyRole
from router.access.key_file import check_keys, parse_keys, parse_line

TIERS = ("interactive", "standard", "batch")
CLASSES = TenantClasses(["gold", "trial"])


def test_of_two_lines_with_one_name_neither_opens(ring):
    ring.file.write_text(f"{ring.lines['acme']}\n{ring.lines['acme'].replace('acme', 'evil')}\n")
    ring.now[0] += 2 * RELOAD_S
    with pytest.raises(Unauthenticated):
        ring.identify(f"Bearer {ring.keys['acme']}")
    keys, faults = parse_keys(f"{ring.lines['acme']}\n" * 3)
    assert not keys and len(faults) == 2 and "line 3" in faults[1] and "line 1" in faults[1]


def test_a_line_that_was_cut_off_opens_nothing_and_harms_no_other():
    """Without its end a key would last for ever, and a scraper's would generate."""
    whole = new_key("acme", "batch")[1]
    line = new_key("ops", "standard", KeyRole.METRICS, 1.9e9)[1]
    for length in range(1, len(line) + 1):
        keys, faults = parse_keys(f"{whole}\n{line[:length]}")
        assert [key.text() for key in keys.values()] == [whole]
        assert [fault[: len(CUT_OFF)] for fault in faults] == [CUT_OFF]
    keys, faults = parse_keys(f"{whole}\n{line}\n# a note needs no end")
    assert [key.text() for key in keys.values()] == [whole, line] and not faults


@pytest.mark.parametrize("role", KeyRole)
def test_a_line_says_all_that_its_key_may(role):
    _, line = new_key("acme", "batch", role, 1.9e9, "gold")
    read = parse_line(line)
    assert read.identity == Identity("acme", "batch", role, tenant_class="gold")
    assert read.expires_at == 1.9e9
    assert read.text() == line and line.endswith("class=gold expires=2030-03-17T17:46:40Z")


def test_a_line_without_a_class_is_as_it_was_before_there_were_any():
    line = new_key("acme", "batch")[1]
    assert "class" not in line and parse_line(line).identity.tenant_class == "default"


@pytest.mark.parametrize("name", ["", "Gold", "a" * 33, "acme!", "1"])
def test_a_line_whose_class_could_be_no_label_opens_nothing(name):
    keys, faults = parse_keys(f"{new_key('acme', 'batch')[1]} class={name}\n")
    assert not keys and "line 1: class is" in faults[0]


def test_keys_of_a_class_that_the_config_does_not_list_are_refused_at_start(ring):
    made = [
        new_key("acme", "batch", tenant_class=name)[1] for name in ("vip", "vip", "gold", "default")
    ]
    ring.file.write_text("".join(f"{line}\n" for line in made))
    listed = "2 keys are of class vip, and tenant_classes has gold, trial; list it there"
    with pytest.raises(ConfigError, match=listed):
        check_keys(str(ring.file), TIERS, CLASSES)
    with pytest.raises(ConfigError, match="tenant_classes has none"):
        check_keys(str(ring.file), TIERS, TenantClasses())
    check_keys(str(ring.file), TIERS, TenantClasses(["gold", "vip"]))


HASH = "00" * 32


CUT_OFF = "security.api_keys, line 2: has no newline at its end"


@pytest.mark.parametrize(
    "line",
    [
        "one two",
        "a b c d e f",
        f"01234567 zz {HASH} t r",
        "01234567 00 11 t r",
        f"01234567 00 {HASH} t! r",
        f"0123456 00 {HASH} t r",
    ],
)
def test_a_broken_file_is_refused_at_start_with_its_line(tmp_path, line):
    file = tmp_path / "keys"
    file.write_text(f"# c\n{line}\n")
    with pytest.raises(ConfigError, match="line 2"):
        check_keys(str(file), TIERS, CLASSES)
    ring = Keyring(str(file), time.monotonic)  # a router that comes back meanwhile serves the rest
    assert ring.num_by_state()["refused"] == 1
    with pytest.raises(ConfigError, match="cannot be read"):
        check_keys(str(tmp_path / "none"), TIERS, CLASSES)
    with pytest.raises(ConfigError, match="cannot be read"):
        Keyring(str(tmp_path / "none"), time.monotonic)


def test_a_file_that_anybody_may_write_is_refused_at_start(ring):
    check_keys(str(ring.file), TIERS, CLASSES)
    ring.file.chmod(0o602)
    starts = (
        lambda path: check_keys(path, TIERS, CLASSES),
        lambda path: Keyring(path, time.monotonic),
    )
    for refuse in starts:
        with pytest.raises(ConfigError, match="every user of this machine"):
            refuse(str(ring.file))


def test_keys_of_a_tier_that_the_config_has_not_are_refused_at_start_with_their_number(ring):
    made = [new_key("acme", tier)[1] for tier in ("gold", "gold", "default")]
    ring.file.write_text("".join(f"{line}\n" for line in made))
    with pytest.raises(ConfigError, match="2 keys are of tier gold, and tiers has interactive, st"):
        check_keys(str(ring.file), TIERS, CLASSES)
    check_keys(str(ring.file), [*TIERS, "gold"], CLASSES)
