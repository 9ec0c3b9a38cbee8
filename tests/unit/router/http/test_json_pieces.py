"""JSON that is made in pieces."""

import json

from hypothesis import given, settings
from hypothesis import strategies as st

from router.http.json_pieces import dumps


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
        max_leaves=40,
    )
)
@settings(deadline=None)
def test_pieces_are_the_same_json(tree):
    assert dumps(tree) == json.dumps(tree, separators=(",", ":"))
