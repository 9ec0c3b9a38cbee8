"""Bugs of the network: open sockets, secrets inside Ray, and a Redis that may do too much."""

from planted.bug import Bug

BINARY = "tests/unit/cluster/redis/test_binary.py::"
REDIS = "tests/component/test_redis_server.py::"
CHECK = "tests/unit/cluster/test_network_check.py::"
PROBE = "tests/component/test_ray_probe.py::"
CLUSTER = "tests/component/test_ray_cluster.py::"
ADDRESSES = "tests/unit/core/test_addresses.py::"
PORTS = "tests/component/test_server_ports.py::"
KERNELS = "tests/unit/process/test_kernel_cache.py::"
ON_RAY = (
    "tests/e2e/test_network.py::"
    "test_a_fresh_cluster_on_ray_listens_on_loopback_alone_and_keeps_secrets_out_of_ray"
)

BUGS = [
    Bug(
        "a higher version with known faults goes before a safe one",
        "cluster/redis/binary.py",
        "key=lambda binary: (binary.is_safe, binary.version)",
        "key=lambda binary: binary.version",
        BINARY + "test_a_safe_version_goes_before_a_higher_one_with_known_faults",
    ),
    Bug(
        "a line that gets no fixes any more is safe",
        "cluster/redis/binary.py",
        "lines.get(line, patch + 1)",
        "lines.get(line, 0)",
        BINARY + "test_a_version_is_judged_by_its_own_line",
    ),
    Bug(
        "a server on the path is not looked for",
        "cluster/redis/binary.py",
        "    return on_path + in_wheels\n",
        "    return in_wheels\n",
        BINARY + "test_a_wheel_s_server_yields_to_a_newer_one_on_the_path_and_serves_without",
    ),
    Bug(
        "Redis listens on a port",
        "cluster/redis/server.py",
        '"port 0"',
        '"port 17399"',
        REDIS + "test_nobody_enters_without_the_password_and_no_port_is_open",
    ),
    Bug(
        "Redis lets in whoever has no password",
        "cluster/redis/server.py",
        '"user default off"',
        '"user default on nopass ~* +@all"',
        REDIS + "test_nobody_enters_without_the_password_and_no_port_is_open",
    ),
    Bug(
        "others may read the password of Redis",
        "cluster/redis/server.py",
        "reference.touch(mode=0o600)",
        "reference.touch(mode=0o644)",
        REDIS + "test_nobody_enters_without_the_password_and_no_port_is_open",
    ),
    Bug(
        "routers may do everything in Redis",
        "cluster/redis/server.py",
        "-@all +set +get",
        "+@all",
        REDIS + "test_routers_write_and_read_our_keys_and_may_do_nothing_else",
    ),
    Bug(
        "routers may touch every key in Redis",
        "cluster/redis/server.py",
        '"~baton:* ',
        '"~* ',
        REDIS + "test_routers_write_and_read_our_keys_and_may_do_nothing_else",
    ),
    Bug(
        "Redis keeps answers that nobody reads",
        "cluster/redis/server.py",
        '    "client-output-buffer-limit normal 1mb 256kb 10",\n',
        "",
        REDIS + "test_a_client_that_never_logs_in_and_never_reads_is_cut_and_takes_no_memory",
    ),
    Bug(
        "a dead Redis stays dead",
        "cluster/redis/server.py",
        "        while not self._is_stopping.is_set():\n",
        "        while False:\n",
        REDIS + "test_a_server_that_ends_is_started_again_and_takes_what_routers_write",
    ),
    Bug(
        "a Redis that cannot be started is given up",
        "cluster/redis/server.py",
        "            except OSError as error:",
        "            except KeyError as error:",
        REDIS + "test_a_server_that_cannot_be_started_is_tried_again",
    ),
    Bug(
        "Redis comes back ever faster or slower as it likes",
        "cluster/redis/server.py",
        "            pause_s = min(pause_s * 2, MAX_PAUSE_S)\n",
        "",
        REDIS + "test_a_server_that_ends_is_started_again_and_takes_what_routers_write",
    ),
    Bug(
        "a long TMPDIR makes a socket that cannot be bound",
        "cluster/redis/server.py",
        "    if len(bytes(folder)) > ",
        "    if not len(bytes(folder)) > ",
        REDIS + "test_a_long_temporary_folder_does_not_keep_the_socket_from_being_made",
    ),
    Bug(
        "a Ray without tokens is taken if one is set here",
        "cluster/ray/probe.py",
        "        return RayEndpoint(has_tokens=code is grpc.StatusCode.UNAUTHENTICATED,"
        " has_tls=False)",
        '        return RayEndpoint(os.environ.get("RAY_AUTH_MODE") == "token", has_tls=False)',
        PROBE + "test_a_cluster_that_answers_anybody_has_no_tokens_although_one_is_set_here",
    ),
    Bug(
        "TLS is taken for a token",
        "cluster/ray/probe.py",
        "    return RayEndpoint(has_tokens=code is grpc.StatusCode.UNAUTHENTICATED, has_tls=True)",
        "    return RayEndpoint(has_tokens=True, has_tls=True)",
        PROBE + "test_a_cluster_behind_tls_is_asked_over_tls",
    ),
    Bug(
        "an open Ray on one machine is deployed to",
        "cluster/network_check.py",
        "        faults = [OPEN_RAY] if is_open else []\n",
        "        faults = []\n",
        CLUSTER + "test_a_ray_without_tokens_is_refused_whatever_is_set_here",
    ),
    Bug(
        "who was refused takes somebody else's application away",
        "cluster/ray/app.py",
        "        if self._address and self._is_deployed:",
        "        if self._address:",
        CLUSTER + "test_a_ray_without_tokens_is_refused_whatever_is_set_here",
    ),
    Bug(
        "Ray's own traffic may be read",
        "cluster/network_check.py",
        "        if not ray.has_tls:\n",
        "        if False:\n",
        CHECK + "test_between_machines_every_plane_needs_tls_ray_s_own_too",
    ),
    Bug(
        "secrets of the config may travel inside Ray",
        "cluster/network_check.py",
        "        if not is_reference(value) and",
        "        if False and",
        CHECK + "test_between_machines_every_plane_needs_tls_ray_s_own_too",
    ),
    Bug(
        "secrets stand in arguments of replicas",
        "cluster/ray/app.py",
        "            self.config = with_secrets_in_files(\n"
        "                with_cluster_keys(self.config), Path(self._secrets.name)\n            )\n",
        "            self.config = with_cluster_keys(self.config)\n",
        CLUSTER + "test_who_deployed_takes_it_away_and_its_secrets_with_it",
    ),
    Bug(
        "a named key may be guessed",
        "cluster/secrets.py",
        '        check_key("security.cluster_key", found["security.cluster_key"])\n',
        "",
        CHECK + "test_named_secrets_are_read_where_they_are_used",
    ),
    Bug(
        "check-config shows the address of Redis",
        "cli/main.py",
        'v if is_reference(v) else "***"',
        "v",
        CHECK + "test_check_config_tells_what_keeps_it_from_several_machines_and_shows_no_secret",
    ),
    Bug(
        "a fresh Ray listens on every address",
        "cluster/ray/env.py",
        '{"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}',
        "{}",
        ON_RAY,
    ),
    Bug(
        "the password of Redis travels inside Ray",
        "cluster/ray/replicas.py",
        "        return self._server.reference\n",
        "        return self._server.url\n",
        ON_RAY,
    ),
    Bug(
        "an IPv6 address is written without brackets",
        "core/addresses.py",
        'f"[{bare}]:{port}" if',
        'f"{bare}:{port}" if',
        ADDRESSES + "test_a_host_is_joined_bound_and_judged",
    ),
    Bug(
        "a free port of IPv6 cannot be used",
        "cluster/server_ports.py",
        "    claim = socket.socket(family_of(host))",
        "    claim = socket.socket()",
        ADDRESSES + "test_a_port_of_ipv6_is_free_or_taken_and_told",
    ),
    Bug(
        "the HTTP server cannot bind IPv6",
        "cluster/http_servers.py",
        "socket.socket(family_of(host), ",
        "socket.socket(socket.AF_INET, ",
        "tests/e2e/test_network.py::test_servers_on_an_ipv6_address_answer_where_they_say_they_are",
    ),
    Bug(
        "a read-only image has no kernels",
        "process/kernel_cache.py",
        "    os.environ[VARIABLE] = folder\n",
        "",
        KERNELS + "test_an_image_that_cannot_be_written_still_has_its_kernels",
    ),
    Bug(
        "a full or forbidden disk is a stack trace",
        "process/kernel_cache.py",
        "    except OSError as error:\n        raise",
        "    except KeyError as error:\n        raise",
        KERNELS + "test_where_nothing_may_be_written_the_start_says_what_to_set",
    ),
    Bug(
        "a second cluster of the same user joins the routers of the first at their port",
        "cluster/server_ports.py",
        "        claim.bind((host, port))\n",
        "        claim.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)\n"
        "        claim.bind((host, port))\n",
        PORTS + "test_a_port_is_held_before_and_between_routers_and_they_share_it",
    ),
    Bug(
        "two clusters that start at once both get the port",
        "cluster/server_ports.py",
        "        claim.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)\n",
        "",
        PORTS + "test_a_port_is_held_before_and_between_routers_and_they_share_it",
    ),
    Bug(
        "the port of a cluster is looked at once and not held",
        "cli/up.py",
        "        if address:\n            claims.close()",
        "        if True:\n            claims.close()",
        PORTS + "test_up_holds_its_ports_while_it_runs",
    ),
    Bug(
        "Ctrl-C on a terminal ends Redis before its keeper, who tells it as lost",
        "cluster/redis/server.py",
        "            start_new_session=True,",
        "            start_new_session=False,",
        REDIS + "test_what_a_terminal_sends_reaches_no_server_of_ours",
    ),
]
