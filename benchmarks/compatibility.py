"""Writes docs/compatibility.md from what tests and tools did on this machine. Run:
python -m benchmarks.compatibility

Owns the tables. A row is there because a test or a recorded run is; a failed one says so.
"""

import argparse
import json
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

from benchmarks.client_values import ROWS
from benchmarks.record import RESULTS, save

ROOT = Path(__file__).parent.parent
OUT = ROOT / "docs" / "compatibility.md"
TESTS = [
    "tests/component/test_model.py",
    "tests/component/test_exactness.py",
    "tests/component/test_sampling_exactness.py",
    "tests/component/test_tokenizing.py",
    "tests/component/test_chat_templates.py",
    "tests/e2e/golden",
    "tests/unit/router/test_request_builder.py",
    "tests/unit/router/test_tiers.py",
    "tests/unit/router/grpc/test_requests.py",
    "tests/unit/router/http/test_bodies.py",
    "tests/unit/router/http/test_other_fields.py",
    "tests/unit/router/http/test_app.py",
    "tests/unit/router/http/test_logprobs.py",
    "tests/component/test_http_versions.py",
    "tests/component/test_grpc_pings.py",
]
REPOSITORIES = (
    "\nBaton reads, and downloads, the same files of a repository as transformers does: "
    "`model.safetensors`, or the shards that `model.safetensors.index.json` names, and no other "
    "weights beside them. An output ends with the end tokens of `generation_config.json`, "
    "`config.json` and the tokenizer together. A value of the wrong type is refused at load, with "
    "its file and field.\n"
)
MODELS = {
    "llama": "Llama 2, 3, 3.x (`LlamaForCausalLM`)",
    "mistral": "Mistral, sliding window (`MistralForCausalLM`)",
    "qwen2": "Qwen 2, 2.5 (`Qwen2ForCausalLM`)",
    "qwen3": "Qwen 3 (`Qwen3ForCausalLM`)",
    "gemma": "Gemma (`GemmaForCausalLM`)",
    "gemma2": "Gemma 2 (`Gemma2ForCausalLM`)",
    "gemma3": "Gemma 3, text (`Gemma3ForCausalLM`)",
    "phi3": "Phi-3 (`Phi3ForCausalLM`)",
    "mixtral": "Mixtral (`MixtralForCausalLM`)",
    "qwen3-moe": "Qwen 3 MoE (`Qwen3MoeForCausalLM`)",
}


def outcomes():
    """Every test's outcome, by its id."""
    report = ROOT / ".compatibility.xml"
    try:
        command = [sys.executable, "-m", "pytest", *TESTS, f"--junitxml={report}"]
        subprocess.run(command, cwd=ROOT, check=False, stdout=subprocess.DEVNULL)
        cases = ET.parse(report).getroot().iter("testcase")
        return {
            f"{c.get('classname').rpartition('.')[2]}::{c.get('name')}": not (
                c.findall("failure") or c.findall("error")
            )
            for c in cases
        }
    finally:
        report.unlink(missing_ok=True)


def mark(found):
    """One cell: how many of the tests that are about it passed."""
    if not found:
        return "not run"
    good = sum(found)
    return (
        f"yes ({good} test{'s' * (good > 1)})"
        if good == len(found)
        else f"**no** ({len(found) - good} of {len(found)} failed)"
    )


def of_family(tests, name, stem):
    """Tests of one family: `qwen3` is not `qwen3-moe`."""
    others = [m for m in MODELS if m != stem and m.startswith(stem)]
    chosen = []
    for test, good in tests.items():
        if name in test and "[" in test:
            case = test.partition("[")[2].rstrip("]")
            if (case == stem or case.startswith(f"{stem}-")) and not any(
                case == o or case.startswith(f"{o}-") for o in others
            ):
                chosen.append(good)
    return chosen


def table(head, rows):
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(row) + " |" for row in lines) + "\n"


def name_of(test):
    """A test's function, whatever file it is in."""
    return test.partition("[")[0].rpartition("::")[2]


def client_values(tests):
    """What clients send, what becomes of it, and whether its test passed."""
    return [
        [
            sent,
            sender,
            fate,
            mark([good for t, good in tests.items() if name_of(t) == name_of(test)]),
        ]
        for sent, sender, fate, test in ROWS
    ]


def client_calls():
    """What other people's clients did, as `benchmarks.clients` recorded it."""
    recorded = RESULTS / "clients.json"
    rows = [
        [f"{c['client']} {c['version']}", c["call"], "**no**" if c["fault"] else "yes"]
        for c in json.loads(recorded.read_text())["calls"]
    ]
    origin = (
        "Unchanged, with pinned versions in an environment of their own, against a cluster with an "
        f"API key: `python -m benchmarks.clients`, raw [{recorded.name}](../benchmarks/results/"
        f"{recorded.name}).\n\n"
    )
    head = ["client", "call", "right"]
    return ["\n## Clients as published\n\n", origin, table(head, rows)]


def main():
    argparse.ArgumentParser(description=__doc__).parse_args()
    tests = outcomes()
    write(tests, save("compatibility", {"tests": tests}))
    print(OUT.relative_to(ROOT), mark(list(tests.values())))


def write(tests, path):
    """Write the tables of these outcomes, which are kept in the file at `path`."""
    parts = [
        (
            "# Compatibility\n\nGenerated from test results by `python -m benchmarks.compatibility`"
            "; do not edit. "
        ),
        f"Raw outcomes: [{path.name}](../benchmarks/results/{path.name}).\n\n## Models\n\n",
        "Small random checkpoints written by transformers, fp32, on CPU; logits within 1e-4.\n\n",
    ]
    rows = [
        [
            title,
            mark(of_family(tests, "test_logits_and_greedy", stem)),
            mark(of_family(tests, "test_every_family", stem)),
            mark(of_family(tests, "test_half_precision", stem)),
        ]
        for stem, title in MODELS.items()
    ]
    head = [
        "family",
        "logits and greedy tokens equal transformers",
        "disaggregated = colocated",
        "bf16 and fp16, sharded files",
    ]
    parts += [
        table(head, rows),
        (
            "\nOther architectures, quantised weights, and rope scalings besides linear and llama3 "
            "are refused by name.\n"
        ),
        REPOSITORIES,
    ]
    parts += [
        "\n## Clients\n\n",
        "The golden suite, against `baton up` with `--local` and on Ray.\n\n",
    ]
    golden = {t: good for t, good in tests.items() if t.startswith("test_golden") and "[" in t}
    rows = []
    for name in sorted({name_of(t) for t in golden}):
        cells = [
            mark([good for t, good in golden.items() if f"::{name}[{kind}" in t])
            for kind in ("local", "ray")
        ]
        rows.append([name.removeprefix("test_").replace("_", " "), *cells])
    parts += [table(["what", "--local", "Ray"], rows)]
    parts += client_calls()
    parts += [
        "\n## What clients send\n\n",
        "The [reference](reference.md) lists every field. Where clients differ:\n\n",
        table(["sent", "by", "what Baton does", "tested"], client_values(tests)),
    ]
    parts += ["\n## Templates and sampling\n\n"]
    rows = [
        [t.partition("::")[2].removeprefix("test_").replace("_", " "), "yes" if good else "**no**"]
        for t, good in tests.items()
        if t.startswith(
            ("test_tokenizing::test_chats", "test_chat_templates::", "test_sampling_exactness::")
        )
    ]
    parts += [table(["what", "passed"], rows), "\n## Tools, unchanged\n\n"]
    runs = sorted(RESULTS.glob("tool_*.txt"))
    rows = [
        [
            (
                f"[{run.stem.removeprefix('tool_').replace('_', ' ')}](../benchmarks/results/"
                f"{run.name})"
            ),
            run.read_text().splitlines()[0],
        ]
        for run in runs
    ]
    parts += [table(["tool (its output)", "command"], rows)]
    OUT.write_text("".join(parts))


if __name__ == "__main__":
    main()
