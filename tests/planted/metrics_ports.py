"""Bugs of the routers' own ports for metrics: shared, hidden, forgotten or open."""

from planted.bug import Bug

PORTS = "tests/component/test_metrics_ports.py::"
ROUTERS = "tests/unit/router/observe/test_routers.py::"
NETWORK = "tests/e2e/test_network.py::"

BUGS = [
    Bug(
        "routers share the port of their metrics, too",
        "cluster/http_servers.py",
        "    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)\n    return listener\n",
        "    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)\n"
        "    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)\n"
        "    return listener\n",
        PORTS + "test_each_router_takes_the_first_free_port_of_its_range_and_no_further_one",
    ),
    Bug(
        "two routers bind one port, and the second cannot listen",
        "cluster/http_servers.py",
        "            listener.listen()\n",
        "",
        PORTS + "test_each_router_takes_the_first_free_port_of_its_range_and_no_further_one",
    ),
    Bug(
        "the port for metrics asks nobody for a key",
        "router/http/app.py",
        "MetricsApi(service), METRICS_READERS)\n    _guard(app, service)\n",
        "MetricsApi(service), [(path, of, None) for path, of, _ in METRICS_READERS])\n",
        PORTS + "test_the_own_port_wants_the_keys_that_the_shared_one_wants",
    ),
    Bug(
        "any key reads the targets",
        "router/http/app.py",
        '("/metrics/targets", MetricsApi.metrics_targets, Right.OBSERVE)',
        '("/metrics/targets", MetricsApi.metrics_targets, Right.ANY_KEY)',
        PORTS + "test_the_own_port_wants_the_keys_that_the_shared_one_wants",
    ),
    Bug(
        "the port for metrics answers all that the shared one does",
        "cluster/router_process.py",
        "            make_metrics_app(self.service),\n",
        "            app,\n",
        NETWORK + "test_every_router_tells_where_all_show_their_metrics_and_keeps_its_port",
    ),
    Bug(
        "a router on every address is a target that nobody can reach",
        "router/observe/routers.py",
        "replace(entry, host=entry.host or reached_at)",
        "entry",
        ROUTERS + "test_a_router_on_every_address_is_where_the_caller_has_reached_this_one",
    ),
    Bug(
        "the id of a router is a label of all its series",
        "router/observe/routers.py",
        '"__meta_baton_router"',
        '"router"',
        ROUTERS + "test_every_router_is_a_target_once_with_its_own_port",
    ),
    Bug(
        "a router is told of itself by those who know it from before",
        "router/observe/routers.py",
        "(*self._told, *own)",
        "(*own, *self._told)",
        ROUTERS + "test_a_router_knows_of_itself_before_it_is_told_and_better_than_whoever_tells",
    ),
    Bug(
        "routers are not told of one another",
        "cluster/local.py",
        '            "routers": [asdict(entry) for entry in self.routers.values()],\n',
        '            "routers": [],\n',
        NETWORK + "test_every_router_tells_where_all_show_their_metrics_and_keeps_its_port",
    ),
    Bug(
        "a router on Ray that once got no answer asks nobody again",
        "cluster/ray/replicas.py",
        'log.debug("routers did not answer", extra={"error": str(error)})\n',
        "return\n",
        "tests/component/test_ray_cluster.py"
        "::test_a_router_on_ray_asks_the_others_where_they_listen_until_it_stops",
    ),
    Bug(
        "a router that is started again shows its metrics elsewhere",
        "cluster/local.py",
        'for name in ("http_port", "grpc_port", "metrics_port")}',
        'for name in ("http_port", "grpc_port")}',
        NETWORK + "test_every_router_tells_where_all_show_their_metrics_and_keeps_its_port",
    ),
    Bug(
        "check-config passes a range of metrics that holds a server's port",
        "core/config/router.py",
        "        if router.metrics_port <= port <= last:\n",
        "        if router.metrics_port == port:\n",
        "tests/unit/core/test_config.py::test_a_wrong_value_is_named",
    ),
]
