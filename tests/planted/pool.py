"""Bugs of the block pool: what a hit compares, what a name hides, what is forgotten."""

from planted.bug import Bug

POOL = "tests/unit/engine/scheduling/test_block_pool.py"
RULES = "tests/unit/engine/scheduling/test_block_pool_rules.py"
IDENTITY = "tests/unit/engine/scheduling/test_block_identities.py"

BUGS: list[Bug] = [
    Bug(
        "a hit compares a block's own tokens alone",
        "engine/scheduling/block_identities.py",
        'i", parent, *token_ids)',
        'i", 0, *token_ids)',
        f"{RULES}::test_the_same_tokens_after_another_parent_are_another_block_under_any_name",
    ),
    Bug(
        "whatever falls into a bucket is a hit",
        "engine/scheduling/block_identities.py",
        "            if self._records[start : start + self._record_bytes] == record:\n",
        "            if True:\n",
        f"{IDENTITY}::test_answers_do_not_depend_on_the_cache_however_short_the_names_are",
    ),
    Bug(
        "names are made without the cluster's key",
        "engine/scheduling/scheduler.py",
        "naming_of(self._content_digest, request.scope, size, self._hash_key)",
        "naming_of(self._content_digest, request.scope, size)",
        f"{IDENTITY}::test_every_worker_names_blocks_with_the_clusters_key",
    ),
    Bug(
        "an identity is given twice",
        "engine/scheduling/block_identities.py",
        "        self._next_serial += 1\n",
        "        self._next_serial = 2 + self._next_serial % 3\n",
        POOL,
    ),
    Bug(
        "an evicted block stays in its bucket",
        "engine/scheduling/block_identities.py",
        "        self._chains[before] = self._chains[block_id]\n",
        "",
        f"{RULES}::test_a_block_leaves_its_bucket_from_any_place",
    ),
    Bug(
        "dropping the cache forgets no identity",
        "engine/scheduling/block_identities.py",
        "        self._oldest_serial = self._next_serial\n        self._num_registered = 0\n\n"
        "    def check",
        "        self._num_registered = 0\n\n    def check",
        POOL,
    ),
    Bug(
        "roots of every scope there ever was are remembered",
        "engine/scheduling/block_identities.py",
        "                self._roots.popitem(last=False)\n",
        "                pass\n",
        f"{RULES}::test_no_more_roots_are_remembered_than_there_are_blocks"
        "_and_the_one_unused_longest_goes",
    ),
]
