"""A cluster's own secrets: made once, equal for all its processes, never shown."""

from operator import attrgetter

import pytest

from cluster.local import Child, LocalCluster
from cluster.secrets import with_cluster_keys
from cluster.worker_process import RunningWorker
from core.config import BatonConfig, load_config
from core.errors import ConfigError, WorkerLost
from core.ids import seed_of
from core.session import PoolId, Role

KEY = "a secret of sufficient length"


@pytest.mark.parametrize("name", ["security.cluster_key", "seed_key"])
def test_secrets_of_a_cluster_are_made_if_there_are_none_and_never_shown(name):
    config = load_config(None, {}, {})
    made = [with_cluster_keys(config) for _ in range(2)]
    keys = {attrgetter(name)(m) for m in made}
    assert len(keys) == 2 and min(map(len, keys)) >= 32
    assert BatonConfig.model_validate_json(made[0].model_dump_json()) == made[0]
    chosen = load_config(None, {name: KEY}, {})
    assert attrgetter(name)(with_cluster_keys(chosen)) == KEY
    assert with_cluster_keys(made[0]) == made[0]
    assert KEY not in repr(chosen)
    with pytest.raises(ConfigError, match=f"{name} has 5 characters") as refused:
        load_config(None, {name: "12345"}, {})
    assert "12345" not in refused.value.message


def test_a_seed_key_that_the_hash_cannot_take_is_refused_before_the_first_request():
    assert seed_of("id", load_config(None, {"seed_key": "k" * 64}, {}).seed_key.encode()) > 0
    with pytest.raises(ConfigError, match="seed_key has 65 bytes"):
        load_config(None, {"seed_key": "k" * 65}, {})


async def test_all_children_of_a_cluster_get_the_same_secrets(monkeypatch):
    handed = []

    async def refuse(kind, config):
        handed.append((config.security.cluster_key, config.seed_key))
        raise WorkerLost("enough seen")

    monkeypatch.setattr(Child, "spawn", refuse)
    flags = {"redis.enabled": False, "pools.decode.replicas": 2}
    with pytest.raises(WorkerLost):
        await LocalCluster(load_config(None, flags, {})).start()
    assert len(handed) == 4 and len(set(handed)) == 1 and min(map(len, handed[0])) >= 32


async def test_a_worker_without_a_cluster_key_does_not_start():
    with pytest.raises(ConfigError, match="without security.cluster_key"):
        await RunningWorker.start(load_config(None, {}, {}), PoolId(Role.DECODE), node="n")
