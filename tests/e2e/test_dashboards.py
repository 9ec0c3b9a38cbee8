"""The dashboard and the alerts ask for series that a cluster shows.

Those that need certificates are asked for in `tests/e2e/test_security.py`; regret needs a choice,
which the cluster here does not have: its path is forced.
"""

import httpx
from support.promql import read, shown, unresolved

from core import metrics


def test_every_query_finds_its_series(local):
    assert local.complete().status_code == 200
    lost = unresolved(httpx.get(f"{local.url}/metrics").text)
    absent = {metrics.CERTIFICATE_ENDS.name, f"{metrics.PLACEMENT_REGRET.name}_bucket"}
    of_others = {
        f"{where}: {query}"
        for where, query, _ in shown()
        if absent & {selector.name for selector in read(query)[0]}
    }
    assert len(of_others) >= 4
    assert set(lost) == of_others, lost
