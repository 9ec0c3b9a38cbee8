"""A keyring over a file of two tenants, with clocks that a test moves."""

from router.access.credentials import Keyring, new_key

TIERS = {"acme": "interactive", "bulk": "batch"}


class MovedKeyring(Keyring):
    """Knows what it was made of: `keys` and `lines` by tenant, the `file`, `now` and `wall`."""

    def __init__(self, folder):
        made = {tenant: new_key(tenant, tier) for tenant, tier in TIERS.items()}
        self.keys = {tenant: key for tenant, (key, _) in made.items()}
        self.lines = {tenant: line for tenant, (_, line) in made.items()}
        self.file = folder / "keys"
        self.file.write_text("\n".join(["# who may come in\n", *self.lines.values(), ""]))
        self.now = [0.0]
        self.wall = [1.8e9]
        super().__init__(str(self.file), lambda: self.now[0], lambda: self.wall[0])
