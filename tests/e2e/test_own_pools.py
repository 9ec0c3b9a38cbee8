"""A tier with a decode worker of its own, from a config file to where its requests ran."""

import httpx
import pytest
import yaml

TREE = {
    "tiers": {"batch": {"pools": {"decode": {"engine": {"num_blocks": 300}}}}},
    "placement": {"path": "pd"},
}


def pools_by_metrics(up):
    """Labels of the live pools of workers, and how many are in each."""
    lines = httpx.get(f"{up.url}/metrics").text.splitlines()
    found = [line.rpartition(" ") for line in lines if line.startswith("baton_pool_replicas{")]
    return {labels.partition("{")[2]: float(number) for labels, _, number in found}


@pytest.mark.parametrize("arguments", [("--local",), ()], ids=["local", "ray"])
def test_a_tier_with_a_decode_worker_of_its_own_runs_there_and_nobody_else_does(
    arguments, start, tmp_path
):
    path = tmp_path / "baton.yaml"
    path.write_text(yaml.safe_dump(TREE))
    up = start(*arguments, "--config", str(path))
    workers = {(r["role"], r["tier"]): r for r in up.status()}
    assert set(workers) == {("prefill", ""), ("decode", ""), ("decode", "batch")}
    assert workers["decode", "batch"]["load"]["total_blocks"] == 300
    ready = up.wait_ready()
    assert ready["state"] == "ready"
    (model,) = ready["models"].values()
    assert model["decode-batch"] == {"ready": 1, "total": 1, "configured": 1}
    texts = set()
    for tier, owner in (("batch", "batch"), ("standard", ""), ("batch", "batch")):
        reply = up.complete(service_tier=tier)
        assert reply.status_code == 200, reply.text
        texts.add(reply.json()["choices"][0]["text"])
        found = httpx.get(f"{up.url}/explain/{reply.headers['x-request-id']}").json()
        decision = found["decision"]
        assert decision["decode_worker"] == workers["decode", owner]["worker_id"]
        assert decision["prefill_worker"] == workers["prefill", ""]["worker_id"]
        assert decision["reason"].startswith(f"{'pools of batch' if owner else 'shared pools'}; ")
    assert len(texts) == 1, "whoever decodes"
    counts = pools_by_metrics(up)
    assert len(counts) == 3 and set(counts.values()) == {1.0}
    assert sum('tier="batch"' in labels for labels in counts) == 1
    assert up.end() == (0, set())
