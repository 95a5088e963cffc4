"""Policies: the schema and its errors, matching, resolving against grids, and what is shipped."""

from __future__ import annotations

import copy
import json
import os
import pickle
import re
import socket
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gna_compile.geometry import Neighborhood
from gna_compile.planner import Workload, plan, speedups
from gna_compile.policy import (
    DeclaredLayout,
    LayerFacts,
    Parameters,
    Policy,
    PolicyError,
    PolicyMismatch,
    Rule,
    clear_cache,
    json_schema,
    load_policy,
    policy_text,
    shipped_policies,
)
from gna_compile.policy.rules import layer_index
from gna_compile.reasons import Reason
from gna_compile.simulate.cases import MODELS

ROOT = Path(__file__).resolve().parents[2]
DENSE = {"dense": True}


def make(*rules: dict[str, Any], **keys: Any) -> Policy:
    return load_policy({"version": 1, "rules": list(rules), **keys})


def only(**rule: Any) -> Rule:
    return make(rule).rules[0]


def errors(source: Any) -> list[str]:
    with pytest.raises(PolicyError) as caught:
        load_policy(source)
    assert str(caught.value) == "\n".join(caught.value.problems)
    return list(caught.value.problems)


@pytest.fixture
def yaml_errors(tmp_path: Path):  # type: ignore[no-untyped-def]
    def of(text: str) -> list[str]:
        path = tmp_path / "bad.yaml"
        path.write_text(text, encoding="utf-8")
        return [problem.replace(str(tmp_path) + "/", "") for problem in errors(path)]

    return of


# Errors


def test_errors_have_lines_and_come_together(yaml_errors) -> None:  # type: ignore[no-untyped-def]
    text = (
        "version: 1\n"
        "min_tokns: 3\n"
        "min_speedup: fast\n"
        "rules:\n"
        "  - layers: a\n"
        "    windw: 3\n"
        "  - window: [3,\n"
        "      0.5]\n"
        "    stride: '3'\n"
        "  - tokens: {mn: 3}\n"
        "    dense: true\n"
    )
    assert yaml_errors(text) == [
        "bad.yaml:2: min_tokns: is not a key of a policy; did you mean 'min_tokens'?",
        "bad.yaml:3: min_speedup: 'fast' should be a valid number",
        "bad.yaml:6: rules[0].windw: is not a key of a policy; did you mean 'window'?",
        "bad.yaml:7: rules[1].window: entry 1: 0.5 must be a number of tokens, `full`, or a share "
        "of the axis written as `1/2`",
        "bad.yaml:9: rules[1].stride: '3' must be a whole number",
        "bad.yaml:10: rules[2].tokens.mn: is not a key of a policy; did you mean 'min'?",
    ]


def test_contradictions_have_lines_and_come_together(yaml_errors) -> None:  # type: ignore[no-untyped-def]
    text = (
        "version: 1\n"
        "phases:\n"
        "  warmup: {first: 3, of: 2}\n"
        "  default:\n"
        "rules:\n"
        "  - phases: wramup\n"
        "    window: [8, 24]\n"
        "    stride: [8, 32]\n"
        "  - window: [8, 8]\n"
        "    dilation: [1, 1, 1]\n"
        "  - dense: true\n"
        "    window: 3\n"
        "  - layers: a\n"
        "  - tokens: {min: 9, max: 8}\n"
        "    dense: false\n"
    )
    assert yaml_errors(text) == [
        "bad.yaml:3: phases.warmup: first 3 is more than the 2 steps of the run",
        "bad.yaml:4: phases.default: always exists and covers the steps that no phase covers; "
        "remove it",
        "bad.yaml:6: rules[0].phases: 'wramup' is not a phase of the policy; did you mean "
        "'warmup'?",
        "bad.yaml:8: rules[0].stride: 32 on axis 1 is larger than the window 24; make it at most "
        "24",
        "bad.yaml:10: rules[1].dilation: has 3 entries where other keys of the rule have 2",
        "bad.yaml:12: rules[2].window: has no effect in a dense rule; remove it or `dense`",
        "bad.yaml:13: rules[3]: has no effect; give it `window` or `dense: true`",
        "bad.yaml:14: rules[4].tokens: min 9 is more than max 8",
        "bad.yaml:15: rules[4].dense: false says nothing; give a window instead, or `dense: true`",
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", r":1: is empty"),
        ("# only a comment\n", r":1: is empty"),
        ("- 1\n", r":1: must be keys and values"),
        ("3", r":1: must be keys and values"),
        ("version: 1\n", r":1: rules: is missing"),
        ("rules:\n- dense: true\n", r":1: version: is missing; write `version: 1`"),
        ("version: 2\nrules:\n- dense: true\n", r":1: version: 2 is not a version"),
        ("version: yes\nrules:\n- dense: true\n", r":1: version: True is not a version"),
        ("version: 1\nrules: []\n", r":2: rules: is empty"),
        ("version: 1\nrules:\n- layers:\n  dense: true\n", r":3: rules\[0\].layers: has no value"),
        ("version: 1\nversion: 1\n", r":2: version: is given twice, first in line 1"),
        ("version: 1\nrules:\n- {a: 1, a: 2}\n", r":3: rules\[0\].a: is given twice"),
        ("version: 1\nrules: [\n", r"is not valid YAML"),
        ("\x00", r":1: is not valid YAML"),
        ("a: &x [1]\nrules: *x\n", r":2: aliases \(\*x\) are not allowed"),
        ("version: 1\n---\nversion: 1\n", r":2: a second document"),
        ("[" * 5000, r":1: is nested deeper than 16"),
        ("x: " + "a" * 300_000, r":1: is larger than"),
        ("? [a]\n: 3\n", r"a key is a list"),
        ("version: 1\nrules: !!python/name:os.system []\n", r":2: rules: the tag .* not allowed"),
        ("!!python/object/apply:os.system ['false']\n", r":1: the tag .* not allowed"),
        ("version: 1\nrules:\n- dense: !!bool maybe\n", r":3: .*maybe is not true or false"),
        ("version: 1\nrules:\n- window: 1:30\n", r":3: .*1:30 is not a plain decimal"),
        ("version: 1\nrules:\n- window: 010\n", r":3: .*010 is not a plain decimal"),
        ("version: 1\nrules:\n- window: " + "9" * 5000, r":3: .*not a plain decimal"),
        ("version: 1\nmin_speedup: .nan\nrules:\n- dense: true\n", r":2: min_speedup: nan"),
    ],
)
def test_bad_files(yaml_errors, text: str, expected: str) -> None:  # type: ignore[no-untyped-def]
    problems = yaml_errors(text)
    assert re.search(r"^bad\.yaml.*" + expected, problems[0]), problems
    assert all("\n" not in problem for problem in problems)


def test_yaml_bomb_is_refused_at_once(yaml_errors) -> None:  # type: ignore[no-untyped-def]
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 30)]
    assert "aliases" in yaml_errors("\n".join(lines))[0]


@pytest.mark.parametrize(
    ("rule", "key"),
    [
        ({"window": True}, "window"),
        ({"window": "3"}, "window"),
        ({"window": "50%"}, "window"),
        ({"window": "3/2"}, "window"),
        ({"window": "1/0"}, "window"),
        ({"window": 0}, "window"),
        ({"window": -3}, "window"),
        ({"window": 10**9 + 1}, "window"),
        ({"window": []}, "window"),
        ({"window": [1, 1, 1, 1]}, "window"),
        ({"window": {"t": 3}}, "window"),
        ({"window": 3, "stride": 0}, "stride"),
        ({"window": 3, "stride": True}, "stride"),
        ({"window": 3, "stride": 4}, "stride"),
        ({"window": [3, "full"], "stride": [4, 4]}, "stride"),
        ({"window": 3, "dilation": -1}, "dilation"),
        ({"window": "full", "dilation": 2}, "dilation"),
        ({"window": 3, "causal": 1}, "causal"),
        ({"window": 3, "causal": "true"}, "causal"),
        ({"window": 9, "base_grid": [8]}, "window"),
        ({"window": 4, "dilation": 3, "base_grid": [11]}, "window"),
        ({"window": 4, "base_grid": ["full"]}, "base_grid"),
        ({"window": 4, "base_grid": 8}, "base_grid"),
        ({"window": [4, 4], "base_grid": [8]}, "base_grid"),
        ({"window": [4, 4, 4], "grid_rank": 2}, "grid_rank"),
        ({"window": 4, "grid_rank": True}, "grid_rank"),
        ({"layers": [], "dense": True}, "layers"),
        ({"layers": "", "dense": True}, "layers"),
        ({"layers": [3], "dense": True}, "layers"),
        ({"index": "3-", "dense": True}, "index"),
        ({"index": -1, "dense": True}, "index"),
        ({"index": True, "dense": True}, "index"),
        ({"index": [], "dense": True}, "index"),
        ({"tokens": {"min": -1}, "dense": True}, "tokens.min"),
        ({"tokens": {"min": 1.5}, "dense": True}, "tokens.min"),
        ({"window": 3, "layout": {"grid": [4, 0]}}, "layout.grid"),
        ({"window": 3, "layout": {"prefix": 4}}, "layout.grid"),
        ({"window": 3, "layout": [{"text": 3}]}, "layout"),
        ({"window": 3, "layout": []}, "layout"),
        ({"window": 3, "layout": [{"text": 3, "grid": [3]}]}, "layout[0]"),
        ({"window": 3, "layout": [{"text": 3}, {"grid": [4, 0]}]}, "layout[1].grid"),
        ({"window": 3, "layout": [{"txt": 3}, {"grid": [4, 4]}]}, "layout[0].txt"),
        ({"window": 3, "heads": "5-2"}, "heads"),
        ({"window": 3, "heads": []}, "heads"),
        ({"window": 3, "grids": "some"}, "grids"),
        ({"window": 3, "grids": -1}, "grids"),
        ({"window": 3, "between_grids": "half"}, "between_grids"),
        ({"dense": True, "grids": "first"}, "grids"),
        ({"window": 9, "layout": [{"grid": [16, 16]}, {"grid": [4, 4]}]}, "window"),
        ({"window": 3, "grids": 2, "layout": [{"grid": [4, 4]}, {"grid": [4, 4]}]}, "grids"),
        (
            {"window": 3, "layout": [{"grid": [4, 4]}, {"text": 2}], "global_tokens": "prefix"},
            "layout[1]",
        ),
        ({"window": 5, "layout": {"grid": [4, 8]}}, "window"),
        ({"window": [2, 2], "layout": {"grid": [4, 4, 8]}}, "window"),
        ({"window": 3, "global_tokens": "front"}, "global_tokens"),
        ({"window": 3, "key_mask": True}, "key_mask"),
        ({"window": 3, "phases": "warmup"}, "phases"),
        ({"dense": True, "key_mask": "none"}, "key_mask"),
        ({"dense": 1}, "dense"),
        (
            {"window": 3, "global_tokens": "prefix", "layout": {"grid": [4], "suffix": 2}},
            "layout.suffix",
        ),
    ],
)
def test_bad_rules_name_the_key(rule: dict[str, Any], key: str) -> None:
    problems = errors({"version": 1, "rules": [DENSE, rule]})
    assert len(problems) == 1
    assert problems[0].startswith(f"<dict>: rules[1].{key}: "), problems


def test_bad_dicts() -> None:
    assert errors({1: 2}) == ["<dict>: the key 1 is not a string"]
    assert "version" in errors({})[0]
    loop: dict[str, Any] = {}
    loop["layout"] = loop
    assert "nested deeper" in errors(loop)[0]
    assert "not int" in errors(3)[0]
    assert (
        "not a key"
        in errors(
            {"version": 1, "rules": [DENSE], "phases": {"a": {"frst": 1, "of": 2, "first": 1}}}
        )[0]
    )


def test_unknown_names_and_files(tmp_path: Path) -> None:
    assert "did you mean 'flux-4k'" in errors("flux4k")[0]
    assert all(name in errors("zzzzzz")[0] for name in shipped_policies())
    assert "cannot be read" in errors(tmp_path / "absent.yaml")[0]
    assert "cannot be read" in errors(tmp_path)[0]
    (tmp_path / "latin.yaml").write_bytes(b"name: \xe9\n")
    assert "not UTF-8" in errors(tmp_path / "latin.yaml")[0]


def policy_of(size: int, character: str) -> bytes:
    """A valid policy of that many bytes, filled up with a comment of one character."""
    head, tail = b"version: 1\nrules: [{dense: true}]\n# ", b"\n"
    filling = character.encode()
    count, rest = divmod(size - len(head) - len(tail), len(filling))
    return head + filling * count + b"a" * rest + tail


@pytest.mark.parametrize("character", ["a", "é", "窓", "🪟"])
def test_the_size_limit_counts_bytes(tmp_path: Path, character: str) -> None:
    path = tmp_path / "large.yaml"
    path.write_bytes(policy_of(256 * 1024, character))
    assert load_policy(path).rules
    path.write_bytes(policy_of(256 * 1024 + 1, character))
    clear_cache()
    assert errors(path) == [f"{path}:1: is larger than 262144 bytes; a policy is a short file"]
    with pytest.raises(PolicyError, match="is larger than 262144 bytes"):
        policy_text(path)


def test_a_file_over_the_limit_is_not_read_to_its_end(tmp_path: Path) -> None:
    path = tmp_path / "sparse.yaml"
    path.touch()
    os.truncate(path, 1 << 40)  # a hole: a terabyte to read, nothing on the disk
    assert "is larger than" in errors(path)[0]


def test_what_is_no_regular_file_is_refused_without_waiting(tmp_path: Path) -> None:
    fifo, link, address = tmp_path / "fifo.yaml", tmp_path / "link.yaml", tmp_path / "socket.yaml"
    os.mkfifo(fifo)
    link.symlink_to(fifo)
    (tmp_path / "folder.yaml").mkdir()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(address))
        for path in (fifo, link, address, tmp_path / "folder.yaml", Path("/dev/zero"), Path("/")):
            assert errors(path) == [f"{path}: cannot be read: is not a regular file"]


def test_a_fifo_in_place_of_the_file_that_was_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fifo, regular = tmp_path / "fifo.yaml", os.stat(__file__)
    os.mkfifo(fifo)
    monkeypatch.setattr(Path, "stat", lambda _: regular)
    assert "is empty" in errors(fifo)[0]


def test_paths_that_no_file_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in ("a\0b.yaml", "folder\0/a.yaml", Path("a\0.yaml")):
        assert errors(path) == [f"{str(path)!r} contains a NUL character; no file has such a path"]
    assert "no policy named 'a\\x00b'" in errors("a\0b")[0]
    assert "is not text" in errors("\ud800.yaml")[0]
    assert "cannot be made absolute" in errors("~nobody-has-this-name/a.yaml")[0]
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert "cannot be made absolute" in errors("a.yaml")[0]


def test_a_path_may_be_bytes(tmp_path: Path) -> None:
    class Entry:
        def __fspath__(self) -> bytes:
            return bytes(tmp_path / "a.yaml")

    (tmp_path / "a.yaml").write_bytes(policy_of(100, "a"))
    assert load_policy(Entry()).rules  # type: ignore[arg-type]


@pytest.mark.parametrize("phases", ["{'': }", "{'': {first: 1, of: 2}}", "{a: , '': }", "['']"])
def test_a_phase_has_a_name(yaml_errors, phases: str) -> None:  # type: ignore[no-untyped-def]
    problems = yaml_errors(f"version: 1\nphases: {phases}\nrules: [{{dense: true}}]\n")
    assert len(problems) == 1
    assert problems[0].startswith("bad.yaml:2: phases: ")


def test_errors_survive_pickling() -> None:
    error = PolicyError(["a:1: b", "c"])
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), again.problems) == (PolicyError, error.problems)
    mismatch = pickle.loads(pickle.dumps(PolicyMismatch(Reason.LAYOUT_MISMATCH, "x")))
    assert (mismatch.reason, str(mismatch)) == (Reason.LAYOUT_MISMATCH, "x")


# Loading


def test_a_file_is_read_once_until_the_cache_is_cleared(tmp_path: Path) -> None:
    path = tmp_path / "mine.yml"
    path.write_text("version: 1\nrules:\n- window: 7\n")
    policy = load_policy(path)
    assert (policy.name, policy.source, policy.rules[0].where) == ("mine", str(path), f"{path}:3")
    path.write_text("version: 1\nrules:\n- window: 9\n")
    assert load_policy(str(path)) is policy
    clear_cache()
    again = load_policy(path)
    assert again.rules[0].window == 9
    assert again != policy
    assert load_policy(again) is again


def test_a_failed_load_is_not_remembered(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("")
    errors(path)
    path.write_text("version: 1\nrules:\n- window: 7\n")
    assert load_policy(path).rules[0].window == 7


def test_yaml_and_dict_give_the_same_policy(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        "# a comment\nname: other\nrules:\n  - window: [1/2, full, 3]\n    index: [1, 3-4]\n"
        "    layers: a\nversion: 1\nphases: [warmup]\n"
    )
    same = make(
        {"layers": ["a"], "index": ["1-1", "3-4"], "window": ("2/4", "full", 3)},
        phases={"warmup": None},
    )
    assert load_policy(path) == same
    assert load_policy(path).fingerprint == same.fingerprint
    assert hash(load_policy(path)) == hash(same)
    assert load_policy(path).name == "other"
    assert same.name == "inline"


@pytest.mark.parametrize(
    "change",
    [
        {"min_tokens": 1},
        {"min_speedup": 1.5},
        {"allow_slow_providers": True},
        {"layout": {"grid": [8, 8]}},
        {"global_tokens": "prefix"},
        {"key_mask": "global_tokens"},
        {"phases": ["warmup"]},
        {"rules": [{"window": 6}]},
        {"rules": [{"window": 7, "stride": 2}]},
        {"rules": [{"window": 7, "dilation": 2}]},
        {"rules": [{"window": 7, "causal": True}]},
        {"rules": [{"window": 7, "layers": "a"}]},
        {"rules": [{"window": 7}, DENSE]},
        {"rules": [DENSE, {"window": 7}]},
    ],
)
def test_fingerprint_changes_with_the_content(change: dict[str, Any]) -> None:
    base = {"version": 1, "rules": [{"window": 7}]}
    assert load_policy({**base, **change}).fingerprint != load_policy(base).fingerprint


def test_fingerprint_is_the_same_in_another_process() -> None:
    code = "from gna_compile.policy import load_policy; print(load_policy('flux-4k').fingerprint)"
    output = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    ).stdout
    assert output.strip() == load_policy("flux-4k").fingerprint
    assert re.fullmatch("[0-9a-f]{64}", output.strip())


def test_a_policy_does_not_change_with_the_dict_it_came_from() -> None:
    source = {"version": 1, "rules": [{"window": [3, 3], "layers": ["a"]}]}
    policy = load_policy(source)
    source["rules"][0]["window"][0] = 1  # type: ignore[index]
    assert policy.rules[0].window == (3, 3)
    with pytest.raises(AttributeError):
        policy.min_tokens = 3  # type: ignore[misc]


def test_policies_survive_pickle_and_deepcopy() -> None:
    for name in shipped_policies():
        policy = load_policy(name)
        for again in (pickle.loads(pickle.dumps(policy)), copy.deepcopy(policy)):
            assert again == policy
            assert again.rules == policy.rules
            assert hash(again.rules) == hash(policy.rules)


def test_importing_is_light() -> None:
    code = (
        "import sys, gna_compile.policy; "
        "print([m for m in ('torch', 'pydantic', 'yaml') if m in sys.modules])"
    )
    output = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    ).stdout
    assert output.strip() == "[]"


# Matching


@pytest.mark.parametrize(
    ("glob", "name", "matches"),
    [
        ("blocks.*.attn1", "blocks.3.attn1", True),
        ("blocks.*.attn1", "blocks.3.attn1.processor", True),
        ("blocks.*.attn1", "model.blocks.3.attn1", True),
        ("blocks.*.attn1", "blocks.3.attn2", False),
        ("blocks.*.attn1", "single_blocks.3.attn1", False),
        ("blocks.*.attn1", "blocks.3.attn10", False),
        ("*.attn1", "blocks.3.attn1", True),
        ("attn1", "blocks.3.attn1", True),
        ("blocks.1", "blocks.1.attn", True),
        ("blocks.1", "blocks.11.attn", False),
        ("blocks.1?", "blocks.11.attn", True),
        ("blocks.[13]", "blocks.3.attn", True),
        ("Blocks", "blocks.3.attn", False),
        ("blocks..attn", "blocks.3.attn", False),
        ("*", "", True),
        ("attn", "", False),
    ],
)
def test_globs(glob: str, name: str, matches: bool) -> None:
    assert only(layers=glob, window=3).matches_module(name, ()) is matches
    assert only(layers=["zz", glob], window=3).matches_module(name, ()) is matches


def test_layer_index() -> None:
    assert layer_index("transformer_blocks.11.attn1.2") == 11
    assert layer_index("block1.3") == 3
    assert layer_index("attn") is None
    assert layer_index("a.²") is None
    rule = only(index=[0, "3-4", 9], window=3)
    hits = [i for i in range(12) if rule.matches_module(f"blocks.{i}.attn", ())]
    assert hits == [0, 3, 4, 9]
    assert not rule.matches_module("attn", ())


def test_module_classes() -> None:
    rule = only(module=["Flux*Block", "WanAttention"], window=3)
    assert rule.matches_module("a", ("FluxTransformer2DModel", "FluxSingleTransformerBlock"))
    assert rule.matches_module("a", ("WanAttention",))
    assert not rule.matches_module("a", ("FluxAttention",))
    assert not rule.matches_module("a", ())


def test_first_match_wins_and_conditions_combine() -> None:
    policy = make(
        {"layers": "blocks", "index": "0-1", **DENSE},
        {"layers": "blocks", "tokens": {"min": 100, "max": 200}, "window": 5},
        {"layers": "blocks", "grid_rank": 2, "window": 6},
        {"module": "Late", "window": 7},
    )

    def index(name: str, classes: tuple[str, ...] = (), **sizes: Any) -> int | None:
        rule = policy.rule_for(LayerFacts(name, classes, **sizes))
        return None if rule is None else rule.index

    assert index("blocks.1.attn", tokens=150) == 0
    assert index("blocks.2.attn", tokens=100) == 1
    assert index("blocks.2.attn", tokens=200) == 1
    assert index("blocks.2.attn", tokens=99) is None
    assert index("blocks.2.attn", tokens=201, grid=(3, 67)) == 2
    assert index("blocks.2.attn", tokens=201, grid=(1, 3, 67)) is None
    assert index("blocks.2.attn") is None
    assert index("blocks.2.attn", ("Late",), tokens=1, grid=(1,)) == 3
    assert index("elsewhere", tokens=150) is None


def test_a_declared_layout_tells_the_grid_rank() -> None:
    policy = make({"grid_rank": 2, "window": 2}, layout={"grid": [4, 4]})
    assert policy.rule_for(LayerFacts("a", tokens=16)) is not None


NAMES = st.lists(st.sampled_from(["blocks", "0", "1", "7", "attn", "x"]), min_size=1, max_size=4)
CONDITIONS = st.fixed_dictionaries(
    {},
    optional={
        "layers": st.sampled_from(["blocks", "attn", "blocks.*.attn", "*.x", "blocks.1"]),
        "index": st.sampled_from([0, "0-1", [1, 7]]),
        "module": st.sampled_from(["A", "B", "*"]),
        "tokens": st.sampled_from([{"min": 50}, {"max": 60}, {"min": 10, "max": 55}]),
        "grid_rank": st.sampled_from([1, 2]),
        "phases": st.sampled_from(["p", ["default"], ["p", "q"]]),
    },
)
CLASSES = st.lists(st.sampled_from(["A", "B", "C"]), max_size=2).map(tuple)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    rules=st.lists(CONDITIONS, min_size=1, max_size=6),
    first=st.tuples(NAMES, CLASSES),
    second=st.tuples(NAMES, CLASSES),
    tokens=st.integers(1, 100),
    rank=st.sampled_from([None, 1, 2, 3]),
)
def test_layers_of_equal_signature_get_equal_rules(
    rules: list[dict[str, Any]],
    first: tuple[list[str], tuple[str, ...]],
    second: tuple[list[str], tuple[str, ...]],
    tokens: int,
    rank: int | None,
) -> None:
    policy = make(*({**rule, **DENSE} for rule in rules), phases=["p", "q"])
    grid = None if rank is None else (2,) * rank
    found = []
    for parts, classes in (first, second):
        name = ".".join(parts)
        signature = policy.signature(name, classes)
        for phase in policy.phases:
            facts = LayerFacts(name, classes, tokens, grid)
            rule = policy.rule_for(facts, phase)
            nameless = LayerFacts("", (), tokens, grid)
            assert policy.rule_for(nameless, phase, candidates=signature) is rule
            expected = [
                r
                for r in policy.rules
                if r.matches_module(name, classes)
                and r.matches_sizes(tokens, grid)
                and (not r.phases or phase in r.phases)
            ]
            assert rule is (expected[0] if expected else None)
            found.append((signature, phase, rule))
    for signature, phase, rule in found:
        assert all(r is rule for s, p, r in found if (s, p) == (signature, phase))


def test_signature_ends_where_nothing_further_can_apply() -> None:
    policy = make({"phases": "p", **DENSE}, {"layers": "a", "window": 3}, DENSE, phases=["p"])
    assert policy.signature("a.0") == (0, 1)
    assert policy.signature("b.0") == (0, 2)


# Phases


def test_phases() -> None:
    policy = make(
        {"phases": "warmup", **DENSE},
        {"window": 3},
        phases={"warmup": {"first": 9, "of": 28}, "late": None},
    )
    assert policy.phases == ("default", "warmup", "late")
    facts = LayerFacts("a")
    assert [policy.rule_for(facts, p).index for p in policy.phases] == [1, 0, 1]  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="no phase 'wramup'"):
        policy.rule_for(facts, "wramup")
    assert [policy.phase_at(step, 28) for step in (0, 8, 9, 27)] == ["warmup"] * 2 + ["default"] * 2
    # 9/28 of 10 steps is 3.2: the fourth is still dense.
    assert [policy.phase_at(step, 10) for step in (3, 4)] == ["warmup", "default"]


def test_phases_follow_each_other() -> None:
    policy = make(DENSE, phases={"a": {"first": 1, "of": 4}, "b": {"first": 1, "of": 2}})
    assert [policy.phase_at(step, 8) for step in range(8)] == ["a"] * 2 + ["b"] * 2 + [
        "default"
    ] * 4


# Resolving against a grid


def test_parameters() -> None:
    rule = only(
        window=[18, "full", "1/2"],
        stride=[16, 5, 9],
        dilation=[1, 1, 2],
        causal=[True, False, False],
    )
    assert rule.parameters((30, 48, 81)) == Parameters(
        (18, 48, 40), (16, 1, 9), (1, 1, 2), (True, False, False)
    )
    assert only(window=7, stride=2).parameters((9, 9)) == ((7, 7), (2, 2), (1, 1), (False, False))
    assert only(window="1/1").window == "full"
    assert only(window="2/6").window == Fraction(1, 3)
    with pytest.raises(ValueError, match="dense"):
        only(**DENSE).parameters((3,))


@pytest.mark.parametrize(
    ("grid", "window", "stride", "dilation"),
    [
        ((24, 44, 80), (24, 12, 16), (1, 4, 1), (1, 1, 5)),
        ((20, 22, 40), (20, 6, 8), (1, 2, 1), (1, 1, 5)),
        ((24, 88, 160), (24, 24, 32), (1, 8, 2), (1, 1, 5)),
        ((24, 30, 52), (24, 8, 10), (1, 3, 1), (1, 1, 5)),
        ((9, 1, 2), (9, 1, 1), (1, 1, 1), (1, 1, 2)),
    ],
)
def test_base_grid(grid: Any, window: Any, stride: Any, dilation: Any) -> None:
    rule = only(
        window=["full", 12, 16], stride=[1, 4, 1], dilation=[1, 1, 5], base_grid=["full", 44, 80]
    )
    assert rule.parameters(grid) == (window, stride, dilation, (False,) * 3)


def test_mismatches_have_reasons() -> None:
    def reason(rule: Rule, *grid: int) -> Reason:
        with pytest.raises(PolicyMismatch) as caught:
            rule.parameters(grid)
        return caught.value.reason

    assert reason(only(window=[4, 4]), 8, 8, 8) is Reason.LAYOUT_MISMATCH
    assert reason(only(window=[4, 4, 4]), 8, 8) is Reason.LAYOUT_MISMATCH
    assert reason(only(window=[4, 4]), 8, 1, 8) is Reason.LAYOUT_MISMATCH
    assert reason(only(window=[4, 4, 4]), 1, 8, 8) is Reason.WINDOW_EXCEEDS_GRID
    assert reason(only(window=[4, 4], dilation=[1, 3]), 8, 11) is Reason.WINDOW_EXCEEDS_GRID
    with pytest.raises(PolicyMismatch, match="axis 1: window 4 x dilation 3 = 12 is larger"):
        only(window=[4, 4], dilation=[1, 3]).parameters((8, 11))


def test_leading_unit_axes_are_left_whole() -> None:
    image = (1, 44, 80)
    assert only(window=[12, 24], stride=[4, 8]).parameters(image) == (
        (1, 12, 24),
        (1, 4, 8),
        (1, 1, 1),
        (False,) * 3,
    )
    assert only(window=7).parameters(image).window == (1, 7, 7)
    assert only(window=7).parameters((1, 1, 80)).window == (1, 1, 7)
    assert only(window=[7]).parameters((1, 1, 80)).window == (1, 1, 7)
    assert only(window=1).parameters((1,)).window == (1,)
    assert only(window=["full", 24, 24]).parameters(image).window == (1, 24, 24)


def test_a_symbol_is_not_asked_whether_it_is_one() -> None:
    class Symbol:
        def __eq__(self, other: object) -> bool:
            raise AssertionError("asking would install a guard")

    with pytest.raises(PolicyMismatch):
        only(window=[2, 2]).parameters((Symbol(), 4, 4))


WINDOWS = st.one_of(
    st.just("full"), st.sampled_from(["1/2", "1/3", "7/9", "1/97"]), st.integers(1, 40)
)


@settings(max_examples=400, deadline=None, derandomize=True)
@given(data=st.data(), rank=st.integers(1, 3))
def test_what_loads_is_legal_on_every_grid_or_says_why(data: st.DataObject, rank: int) -> None:
    def column(entry: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
        return st.lists(entry, min_size=rank, max_size=rank)

    rule = {"window": data.draw(column(WINDOWS))}
    for key, most in (("stride", 12), ("dilation", 4)):
        if data.draw(st.booleans()):
            rule[key] = data.draw(column(st.integers(1, most)))
    if data.draw(st.booleans()):
        rule["causal"] = data.draw(column(st.booleans()))
    scaled = data.draw(st.booleans())
    if scaled:
        rule["base_grid"] = data.draw(column(st.integers(10, 60)))
    try:
        policy = make(rule)
    except PolicyError:
        return
    grid = tuple(data.draw(column(st.integers(1, 70))))
    resolved: Parameters | PolicyMismatch
    try:
        resolved = policy.rules[0].parameters(grid)
    except PolicyMismatch as mismatch:
        resolved = mismatch
    if isinstance(resolved, PolicyMismatch):
        assert resolved.reason is Reason.WINDOW_EXCEEDS_GRID
        assert not scaled
        assert len(policy.check(grid)) == 1
        return
    found = resolved
    neighborhood = Neighborhood.of(grid, *found)  # raises for anything illegal
    problems = policy.check(grid)
    assert bool(problems) == neighborhood.is_full
    for window, given_window, length in zip(found.window, rule["window"], grid, strict=True):
        if given_window == "full":
            assert window == length
        elif not scaled and isinstance(given_window, int):
            assert window == given_window


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    base=st.integers(1, 200), factor=st.integers(1, 6), length=st.integers(1, 300), data=st.data()
)
def test_scaling_rounds_to_nearest(
    base: int, factor: int, length: int, data: st.DataObject
) -> None:
    window = data.draw(st.integers(1, base))
    stride = data.draw(st.integers(1, window))
    rule = only(window=window, stride=stride, base_grid=[base])
    assert rule.parameters((base,))[:2] == ((window,), (stride,))
    assert rule.parameters((base * factor,))[:2] == ((window * factor,), (stride * factor,))
    (scaled,), (step,) = rule.parameters((length,))[:2]
    for exact, got in (
        (Fraction(window * length, base), scaled),
        (Fraction(stride * length, base), step),
    ):
        assert got == 1 or abs(got - exact) <= Fraction(1, 2)
    assert 1 <= step <= scaled <= length


def test_symbolic_grids_stay_symbolic() -> None:
    rule = only(
        window=["full", 12, "1/2"], stride=[1, 4, 2], dilation=[1, 2, 1], base_grid=["full", 44, 80]
    )
    plain = only(window=[4, 5, 6])
    seen: list[Any] = []

    def look(gm: torch.fx.GraphModule, _inputs: Any) -> Any:
        sizes = next(
            n
            for n in gm.graph.nodes
            if n.op == "placeholder" and hasattr(n.meta["example_value"], "shape")
        )
        grid = tuple(sizes.meta["example_value"].shape)
        policy = make({"tokens": {"min": 50}, "window": 3})
        tokens = grid[0] * grid[1] * grid[2]
        assert policy.rule_for(LayerFacts("a", tokens=tokens, grid=grid)) is not None
        seen.append((grid, rule.parameters(grid), plain.parameters(grid)))
        return gm.forward

    torch._dynamo.reset()
    compiled = torch.compile(lambda x: x + 1, backend=look, dynamic=True)
    for shape in ((7, 30, 52), (9, 44, 80)):
        compiled(torch.zeros(shape))
    assert len(seen) == 1  # one graph serves both
    grid, found, fixed = seen[0]
    assert all(isinstance(size, torch.SymInt) for size in (*grid, *found.window))
    assert [size.node.hint for size in found.window] == [7, 8, 26]
    assert fixed.window == (4, 5, 6)


# Declared layouts


def test_rules_override_the_policy() -> None:
    policy = make(
        {"window": 2},
        {"window": 2, "layout": {"grid": [9]}, "key_mask": "none", "global_tokens": "suffix"},
        layout={"grid": [4]},
        key_mask="global_tokens",
        global_tokens="prefix",
    )
    facts = [(rule.key_mask, rule.global_tokens) for rule in policy.rules]
    assert facts == [("global_tokens", "prefix"), (None, "suffix")]
    grids = [rule.layout.grid for rule in policy.rules if rule.layout]
    assert grids == [(4,), (9,)]


# Checking against a grid


def test_check() -> None:
    policy = make(
        {"layers": "a", "window": [18, 24, 24]},
        {"layers": "b", "grid_rank": 2, "window": [99, 99]},
        {"layers": "c", "window": "full"},
        {"window": [4, 4]},
        DENSE,
    )
    assert policy.check((30, 48, 80)) == [
        "<dict>: rules[2].window: covers the whole grid, which is dense attention",
        "<dict>: rules[3].window: the rule is for 2 axes, the token grid 30x48x80 has 3",
        "<dict>: rules[4]: is never reached, since rules[3] matches every layer",
    ]
    assert policy.check((16, 48, 80))[0] == (
        "<dict>: rules[0].window: axis 0: window 18 is larger than the grid's 16 tokens"
    )
    assert make({"window": 2}, layout={"grid": [4, 4]}).check((4, 4)) == []
    assert (
        "declared as 4x4, not 8x2" in make({"window": 2}, layout={"grid": [4, 4]}).check((8, 2))[0]
    )


# JSON Schema


def test_the_json_schema_in_docs_is_the_generated_one() -> None:
    written = json.loads((ROOT / "docs" / "policy.schema.json").read_text())
    assert written == json_schema()


def test_the_json_schema_knows_every_key() -> None:
    from gna_compile.policy.schema import PolicyFile, RuleEntry

    schema = json_schema()
    assert set(schema["properties"]) == set(PolicyFile.model_fields)
    assert schema["additionalProperties"] is False
    assert set(schema["$defs"]["RuleEntry"]["properties"]) == set(RuleEntry.model_fields)
    documented = (ROOT / "docs" / "policy.md").read_text()
    for key in (*PolicyFile.model_fields, *RuleEntry.model_fields):
        assert f"`{key}`" in documented, key


# Shipped policies

LAYERS = {
    "flux-4k": {
        "transformer_blocks.18.attn": True,
        "single_transformer_blocks.37.attn": True,
        "context_embedder": False,
    },
    "hunyuan-video-720p": {
        "transformer_blocks.0.attn": True,
        "single_transformer_blocks.39.attn": True,
        "context_embedder.token_refiner.refiner_blocks.0.attn": False,
    },
    "cosmos-7b-720p": {"transformer_blocks.27.attn1": True, "transformer_blocks.27.attn2": False},
    "wan2.1-720p": {"blocks.39.attn1": True, "blocks.39.attn2": False},
}
LAYERS["wan2.2-a14b-720p"] = LAYERS["wan2.1-720p"]
LAYERS["flux2-4k"] = {
    "transformer_blocks.7.attn": True,
    "single_transformer_blocks.47.attn": True,
    "context_embedder": False,
}
LAYERS["flux3-4k"] = {
    "mode_blocks.image.4.attn": True,
    "mode_blocks.image_cond.4.attn": False,
    "txt_mode_blocks.4.attn": False,
    "single_transformer_blocks.27.attn": True,
}
LAYERS["hunyuan-video-720p-58"] = LAYERS["hunyuan-video-720p"]
LAYERS["cosmos-7b-720p-89"] = LAYERS["cosmos-predict2-2b"] = LAYERS["cosmos-7b-720p"]

BOUND = re.compile(
    r"^# flop-bound: (\S+) on (\d+(?:x\d+)*)(?: prefix (\d+))?(?: suffix (\d+))? = (\d+\.\d\d)$",
    re.MULTILINE,
)
# The line after each bound.
PREDICTED = re.compile(
    r"^# flop-bound: (\S+) on .*\n# predicted: sm90 (\S+), sm100 (\S+), with (\d+) heads of (\d+)$",
    re.MULTILINE,
)


def test_the_shipped_policies_are_the_documented_ones() -> None:
    assert set(shipped_policies()) == set(LAYERS)
    documented = (ROOT / "docs" / "policy.md").read_text()
    assert all(f"| `{name}` |" in documented for name in shipped_policies())


@pytest.mark.parametrize("name", sorted(LAYERS))
def test_shipped_policy(name: str) -> None:
    policy = load_policy(name)
    assert policy.name == name
    for layer, sparse in LAYERS[name].items():
        for prefix in ("", "transformer."):
            rule = policy.rule_for(LayerFacts(prefix + layer, tokens=100_000))
            assert (rule is not None and not rule.dense) is sparse, layer
            if "warmup" in policy.phases and sparse:
                warm = policy.rule_for(LayerFacts(prefix + layer, tokens=100_000), "warmup")
                assert warm is not None
                assert warm.dense


@pytest.mark.parametrize("name", sorted(LAYERS))
def test_the_bounds_in_shipped_comments_are_right(name: str) -> None:
    policy, text = load_policy(name), policy_text(name)
    assert text.count("flop-bound") == len(BOUND.findall(text))
    covered = set()
    for layer, grid_text, prefix, suffix, bound in BOUND.findall(text):
        grid = tuple(int(length) for length in grid_text.split("x"))
        assert policy.check(grid) == []
        rule = policy.rule_for(LayerFacts(layer, grid=grid))
        assert rule is not None
        parameters = rule.parameters(grid)
        found = Neighborhood.of(grid, *parameters, prefix=int(prefix or 0), suffix=int(suffix or 0))
        assert f"{1 / found.flop_share:.2f}" == bound
        if rule.layout:
            around = (rule.layout.prefix or 0, rule.layout.suffix or 0)
            assert (rule.layout.grid, *around) == (grid, found.prefix, found.suffix)
        covered.add(rule.index)
    assert covered == {rule.index for rule in policy.rules if not rule.dense}


@pytest.mark.parametrize("name", sorted(LAYERS))
def test_the_predictions_in_shipped_comments_are_right(name: str) -> None:
    policy, text, model = load_policy(name), policy_text(name), MODELS[name]
    bounds, predictions = BOUND.findall(text), PREDICTED.findall(text)
    assert [bound[0] for bound in bounds] == [layer for layer, *_ in predictions]
    for (layer, grid_text, prefix, suffix, _), (_, *printed, heads, size) in zip(
        bounds, predictions, strict=True
    ):
        grid = tuple(int(length) for length in grid_text.split("x"))
        assert (grid, str(model.heads), str(model.head_dim)) == (model.grid, heads, size)
        rule = policy.rule_for(LayerFacts(layer, grid=grid))
        assert rule is not None
        found = Neighborhood.of(grid, *rule.parameters(grid), int(prefix or 0), int(suffix or 0))
        masked = rule.key_mask is not None and found.global_tokens > 0
        assert model.key_mask == (rule.key_mask is not None)
        workload = Workload(found, model.heads, model.head_dim, key_mask=masked)
        plans = [plan(workload, architecture) for architecture in ("sm90", "sm100")]
        assert printed == [f"{speedups(cut).predicted:.2f}" for cut in plans]


@pytest.mark.parametrize(
    ("name", "dense", "steps"),
    [
        ("flux-4k", 9, 28),
        ("hunyuan-video-720p", 15, 50),
        ("hunyuan-video-720p-58", 15, 50),
        ("cosmos-7b-720p", 12, 35),
        ("cosmos-predict2-2b", 0, 35),
    ],
)
def test_dense_steps_of_shipped_policies(name: str, dense: int, steps: int) -> None:
    phases = [load_policy(name).phase_at(step, steps) for step in range(steps)]
    assert phases == ["warmup"] * dense + ["default"] * (steps - dense)


def test_predict2_follows_the_published_table() -> None:
    policy = load_policy("cosmos-predict2-2b")
    by_layer = {0: 98, 1: 98, 2: 95, 5: 95, 10: 95, 23: 55}
    by_layer |= dict.fromkeys((3, 4, 6, 7, 8, 9, 27), 92)
    by_layer |= dict.fromkeys((*range(11, 23), 24, 25, 26), 77)
    assert sorted(by_layer) == list(range(28))
    grid = (24, 44, 80)
    for layer, percent in by_layer.items():
        rule = policy.rule_for(LayerFacts(f"transformer_blocks.{layer}.attn1", grid=grid))
        assert rule is not None
        share = Neighborhood.of(grid, *rule.parameters(grid)).flop_share
        assert abs(100 * (1 - share) - percent) < 1
    names = [f"transformer_blocks.{i}.attn1" for i in range(28)]
    assert len({policy.signature(name) for name in names}) == 5
    assert policy.rule_for(LayerFacts("transformer_blocks.28.attn1")) is None


def _tiny_models() -> dict[str, Any]:
    diffusers = pytest.importorskip("diffusers")
    hidden = {"num_attention_heads": 1, "attention_head_dim": 16}
    return {
        "flux-4k": lambda: diffusers.FluxTransformer2DModel(
            num_layers=1,
            num_single_layers=1,
            joint_attention_dim=8,
            pooled_projection_dim=8,
            axes_dims_rope=(4, 6, 6),
            in_channels=4,
            **hidden,
        ),
        "hunyuan-video-720p": lambda: diffusers.HunyuanVideoTransformer3DModel(
            num_layers=1,
            num_single_layers=1,
            num_refiner_layers=1,
            text_embed_dim=8,
            pooled_projection_dim=8,
            rope_axes_dim=(4, 6, 6),
            in_channels=4,
            **hidden,
        ),
        "cosmos-7b-720p": lambda: diffusers.CosmosTransformer3DModel(
            num_layers=1, text_embed_dim=8, adaln_lora_dim=4, in_channels=4, **hidden
        ),
        "wan2.1-720p": lambda: diffusers.WanTransformer3DModel(
            num_layers=1, text_dim=8, freq_dim=8, ffn_dim=8, in_channels=4, **hidden
        ),
    }


@pytest.mark.parametrize(
    ("name", "sparse", "dense"),
    [
        ("flux-4k", 2, 0),
        ("hunyuan-video-720p", 2, 1),
        ("cosmos-7b-720p", 1, 1),
        ("wan2.1-720p", 1, 1),
    ],
)
def test_shipped_globs_meet_the_layers_of_real_models(name: str, sparse: int, dense: int) -> None:
    with torch.device("meta"):
        model = _tiny_models()[name]()
    policy = load_policy(name)
    layers = [n for n, module in model.named_modules() if hasattr(module, "to_q")]
    effects = [policy.rule_for(LayerFacts(layer)) for layer in layers]
    rewritten = [rule for rule in effects if rule is not None and not rule.dense]
    assert (len(rewritten), len(layers) - len(rewritten)) == (sparse, dense)


def test_the_docs_list_every_reason() -> None:
    text = (ROOT / "docs" / "decisions.md").read_text()
    assert [code for code in Reason if f"\n| `{code.value}` |" not in text] == []


def test_a_layout_of_several_segments() -> None:
    def layout(*segments: Any) -> DeclaredLayout | None:
        return make({"window": 2}, layout=list(segments)).layout

    one, two = {"grid": [4, 6]}, {"grid": [2, 3]}
    assert layout({"text": 7}, one, two) == DeclaredLayout(((4, 6), (2, 3)), 7, 0)
    assert layout({"text": 7}, {"text": 1}, one) == DeclaredLayout(((4, 6),), 8, 0)
    assert layout(one, {"text": 1}, {"text": 2}, two) == DeclaredLayout(((4, 6), 3, (2, 3)))
    assert layout(one, two, {"text": 5}) == DeclaredLayout(((4, 6), (2, 3)), 0, 5)
    assert layout(one) == DeclaredLayout.of_grid((4, 6))


def test_rules_of_heads() -> None:
    policy = make(
        {"heads": ["0-1", 5], "window": 3}, {"heads": "3-40", "dense": True}, {"window": 5}
    )
    groups = [(n, rule and rule.index) for n, rule in policy.rules_of_heads(LayerFacts("a"), 8)]
    assert groups == [(2, 0), (1, 2), (2, 1), (1, 0), (2, 1)]
    assert sum(n for n, _ in groups) == 8
    assert policy.signature("a") == (0, 1, 2)
    partly = make({"heads": "2-3", "window": 3})
    assert [n for n, _ in partly.rules_of_heads(LayerFacts("a"), 6)] == [2, 2, 2]
    assert make({"window": 3}).rules_of_heads(LayerFacts("a"), "h")[0][0] == "h"  # held to nothing
