"""The dashboard and the alerts ask for series that a cluster shows.

The one that needs certificates is asked for in `tests/e2e/test_security.py`.
"""

import httpx
from support.promql import read, shown, unresolved

from core import metrics


def test_every_query_finds_its_series(local):
    assert local.complete().status_code == 200
    lost = unresolved(httpx.get(f"{local.url}/metrics").text)
    of_certificates = {
        f"{where}: {query}"
        for where, query, _ in shown()
        if any(selector.name == metrics.CERTIFICATE_ENDS.name for selector in read(query)[0])
    }
    assert len(of_certificates) >= 3
    assert set(lost) == of_certificates, lost
