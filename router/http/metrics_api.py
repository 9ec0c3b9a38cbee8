"""What monitoring reads of a router over HTTP.

Owns the answers, on the shared port and on the router's own. Does not know paths or rights.
"""

from __future__ import annotations

from typing import Any

from fastapi import Request
from fastapi.responses import PlainTextResponse, Response

from core.addresses import unmapped
from router.http.headers import NUM_ROUTERS_HEADER, ROUTER_HEADER
from router.service import GenerationService


class MetricsApi:
    """The endpoints over one service."""

    def __init__(self, service: GenerationService) -> None:
        """Show the metrics of `service`."""
        self.service = service

    async def health(self) -> Response:
        """`GET /health`: the process is alive."""
        return Response(status_code=200)

    async def metrics(self) -> PlainTextResponse:
        """`GET /metrics`: every metric, as Prometheus reads them."""
        return PlainTextResponse(
            self.service.telemetry.text(),
            media_type="text/plain; version=0.0.4",
            headers=self.own_name(),
        )

    async def metrics_targets(self, request: Request) -> list[dict[str, Any]]:
        """`GET /metrics/targets`: where each router shows its metrics, for `http_sd_configs`."""
        return self.service.status.routers.targets(reached_at(request))

    def own_name(self) -> dict[str, str]:
        """Return the headers that tell this router from others behind one address."""
        explanations = self.service.explanations
        return {
            ROUTER_HEADER: explanations.router_id,
            NUM_ROUTERS_HEADER: str(explanations.num_routers),
        }


def reached_at(request: Request) -> str:
    """Return the address of this machine to which a caller has connected."""
    # Of the socket and not of a header, which the caller may write.
    host, _ = request.scope.get("server") or ("", None)
    return unmapped(host)
