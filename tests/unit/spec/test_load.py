"""Spec files are read strictly: each fault is reported with its place, all of them at once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.common.errors import InvalidInput
from voidbox.spec import SpecError, client_env, input_files, load_spec, parse_spec, resolve_env
from voidbox.spec.models import Provider, PullPolicy, SandboxMode, Spec
from voidbox.spec.problems import MAX_REPORTED

ROOT = Path(__file__).parents[3]
AGENT = "kind: agent\nname: a\nagent:\n  prompt: hi\n"


def messages(text: str, name: str = "s.yaml") -> list[str]:
    with pytest.raises(SpecError) as caught:
        parse_spec(text, name, "/base")
    return [str(problem) for problem in caught.value.problems]


def one(text: str, name: str = "s.yaml") -> str:
    found = messages(text, name)
    assert len(found) == 1, found
    return found[0]


@pytest.mark.parametrize("path", sorted((ROOT / "examples/specs").glob("*.*")), ids=lambda path: path.name)
def test_every_example_is_valid_and_its_files_exist(path: Path) -> None:
    for file in input_files(load_spec(path)):
        assert Path(file).exists()


def test_defaults_are_those_of_the_reference() -> None:
    spec = parse_spec(AGENT, "s.yaml", "/base")
    assert (spec.api_version, spec.sandbox.memory_mb, spec.sandbox.vcpus) == ("v1", 1024, 1)
    assert spec.sandbox.network is None
    assert spec.sandbox.mode is SandboxMode.AUTO


def test_unknown_key_has_place_and_suggestion() -> None:
    assert one(AGENT + "sandbox:\n  memroy_mb: 1\n") == (
        "s.yaml:6:3: sandbox.memroy_mb: unknown key 'memroy_mb'; did you mean 'memory_mb'?"
    )


def test_all_problems_are_reported_in_file_order_and_bounded() -> None:
    lines = "".join(f"key{number}: 1\n" for number in range(50))
    with pytest.raises(InvalidInput) as caught:
        parse_spec(AGENT + lines, "s.yaml", "/base")
    shown = caught.value.message.splitlines()
    assert len(shown) == MAX_REPORTED + 1
    assert shown[0].startswith("s.yaml:5:1: key0")
    assert shown[-1] == "... and 30 more"
    assert caught.value.metadata["line"] == "5"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "kind: agent\nname: a\nagent: {prompt: 5}\n",
            "expected a string, found the integer 5; put it in quotes",
        ),
        (AGENT + "sandbox: {memory_mb: big}\n", "expected an integer, found the string 'big'"),
        (AGENT + "sandbox: {memory_mb: 15}\n", "15 is too small; at least 16"),
        (AGENT + "sandbox: {vcpus: 257}\n", "257 is too large; at most 256"),
        (AGENT + "sandbox: {network: 1}\n", "expected true or false"),
        (AGENT + "sandbox: {network: yes}\n", "found the string 'yes'"),
        (AGENT + "sandbox: []\n", "expected a map, found a list"),
        (AGENT + "sandbox:\n", "found nothing"),
        (AGENT + "sandbox: {env: {A: 1}}\n", "put it in quotes"),
        (AGENT + "sandbox: {env: {'A B': x}}\n", "a variable's name"),
        (AGENT + "sandbox: {mode: lokal}\n", "did you mean 'local'?"),
        (
            AGENT + "sandbox: {mounts: [{host: a, guest: /b, mode: wr}]}\n",
            "unknown value 'wr'. Known: ro, rw",
        ),
        (AGENT + "sandbox: {mounts: [{host: a, guest: b}]}\n", "not an absolute path"),
        (AGENT + "sandbox: {mounts: [{host: a, guest: /b/../c}]}\n", "must not hold '..'"),
        (AGENT + "sandbox: {mounts: [{host: ~/a, guest: /b}]}\n", "'~' is not expanded"),
        (AGENT + "sandbox: {mounts: [{host: a, guest: /b}, {host: b, guest: /b/}]}\n", "mounted twice"),
        (
            AGENT + "llm: {provider: cloude}\n",
            "did you mean 'claude'? Known: claude, claude-personal, codex, ollama",
        ),
        (AGENT + "api_version: v2\n", "unsupported api_version 'v2', expected 'v1'"),
        (
            AGENT + "pipeline: {boxes: [{name: b, prompt: x}]}\n",
            "kind: agent does not accept a pipeline block",
        ),
        ("kind: sandbox\nname: a\nagent: {prompt: x}\n", "kind: sandbox does not accept an agent block"),
        ("kind: agent\nname: a\n", "kind: agent requires the block 'agent'"),
        ("kind: agents\nname: a\n", "did you mean 'agent'?"),
        ("kind: sandbox\n", "key 'name' is missing"),
        ("kind: sandbox\nname: ../x\n", "is not 1 to 63 letters"),
        ("kind: agent\nname: a\nagent: {prompt: ' '}\n", "agent.prompt cannot be empty"),
        ("kind: agent\nname: a\nagent: {}\n", "needs either a 'prompt'"),
        ("kind: agent\nname: a\nagent: {prompt: x, run: {program: y}}\n", "has both"),
        ("kind: agent\nname: a\nagent: {prompt: x, mode: service}\n", "mode: service requires output_file"),
        (
            "kind: agent\nname: a\nagent: {prompt: x, mode: interactive, timeout_secs: 1}\n",
            "mutually exclusive",
        ),
        ("kind: agent\nname: a\nagent: {prompt: x, timeout_secs: -1}\n", "too small"),
        (
            "kind: agent\nname: a\nagent: {prompt: x, skills: [foo]}\n",
            "invalid skill 'foo', expected '<type>:<value>'",
        ),
        ("kind: agent\nname: a\nagent: {prompt: x, skills: ['foo:x']}\n", "use agent|file|remote|cli|mcp"),
        ("kind: agent\nname: a\nagent: {prompt: x, skills: [{name: a}]}\n", "exactly one of the keys"),
        (
            "kind: agent\nname: a\nagent: {prompt: x, skills: ['file:a.md', {name: a, content: x}]}\n",
            "already a skill",
        ),
        ("kind: agent\nname: a\nagent: {run: {program: x}, skills: ['cli:a']}\n", "skills are for agents"),
    ],
)
def test_fault_is_named(text: str, expected: str) -> None:
    assert expected in one(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "1:1: invalid yaml: the file is empty"),
        ("a: [1\n", "invalid yaml"),
        ("a: 1\na: 2\n", "2:1: invalid yaml: key 'a' is given twice, first on line 1"),
        ("{1: 2}\n", "a key must be a string"),
        ("a: !!python/object:os.system x\n", "is not allowed"),
        ("a: !thing x\n", "is not allowed"),
        ("a: \x07\n", "1:4: invalid yaml: character"),
        ("\ta: 1\n", "tabs"),
        ("a: 1\n---\nb: 2\n", "invalid yaml"),
        ("a: " + "[" * 5000, "nested deeper than"),
        ("a: &a [*a]\n", "nested deeper than"),
        ("a: &a [1,1,1,1,1,1,1,1,1]\n" + "".join(
            f"{chr(98 + n)}: &{chr(98 + n)} [{','.join(['*' + chr(97 + n)] * 9)}]\n" for n in range(9)
        ), "counting each use of an alias"),
        ("a: !!int x\n", "'x' is no int"),
        ('a: "\\ud800"\n', "is no str"),
        ("#" * ((1 << 20) + 1), "larger than 1048576 bytes"),
    ],
)  # fmt: skip
def test_hostile_yaml_is_refused(text: str, expected: str) -> None:
    assert expected in one(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "the file is empty"),
        ("{", "1:2"),
        ('{"a": 1,}', "1:9: invalid json: expected a key in double quotes"),
        ('{"a": 1\n "b": 2}', "2:2: invalid json: expected ',' or '}'"),
        ('{"a": 1, "a": 2}', "1:10: invalid json: key 'a' is given twice"),
        ('{"a": 01}', "expected ',' or '}'"),
        ('{"a": NaN}', "expected a JSON value"),
        ('{"a": "x\ny"}', "Invalid control character"),
        ('{"a": "\\ud800"}', "surrogate"),
        ("[" * 5000, "nested deeper"),
        ("{} x", "text after the end"),
        ("9" * 5000, "too many digits"),
        ("[1, 2]", "expected a map, found a list"),
    ],
)
def test_hostile_json_is_refused(text: str, expected: str) -> None:
    assert expected in one(text, "s.json")


def test_format_is_by_extension_only() -> None:
    assert "name the file .yaml, .yml or .json" in one(AGENT, "s.txt")
    assert parse_spec(AGENT, "S.YML", "/").name == "a"
    assert parse_spec(AGENT, "s.txt", "/", "yaml").name == "a"


def test_bytes_that_are_not_utf8_have_a_place(tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    path.write_bytes(b"kind: agent\nname: \xff\n")
    with pytest.raises(SpecError, match=r"2:7: invalid yaml: byte 0xff is not UTF-8"):
        load_spec(path)


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"nope\.yaml: cannot be read: No such file"):
        load_spec(tmp_path / "nope.yaml")


def test_relative_paths_start_at_the_spec_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "deep" / "s.yaml"
    path.parent.mkdir()
    path.write_text(
        "kind: agent\nname: a\nsandbox: {kernel: k, mounts: [{host: ../m, guest: /m}]}\n"
        "agent: {prompt: x, skills: ['file:s.md'], inputs: [{file: d/x}, {file: /abs}]}\n"
    )
    monkeypatch.chdir("/")
    spec = load_spec(path)
    assert spec.sandbox.kernel == str(tmp_path / "deep/k")
    assert spec.sandbox.mounts[0].host == str(tmp_path / "m")
    assert input_files(spec) == (str(tmp_path / "deep/d/x"), "/abs", str(tmp_path / "deep/s.md"))


@pytest.mark.parametrize(
    ("text", "resolved"),
    [
        ("oci:layout:t", "oci:/deep/layout:t"),
        ("oci:./a/../b", "oci:/deep/b"),
        ("oci-archive:../x.tar:docker.io/a:1", "oci-archive:/x.tar:docker.io/a:1"),
        ("docker-archive:/x.tar:@0", "docker-archive:/x.tar:@0"),
        ("alpine:3", "alpine:3"),
        ("localhost:5000/a@sha256:0", "localhost:5000/a@sha256:0"),
    ],
)
def test_images_in_files_are_found_from_the_spec_file(text: str, resolved: str) -> None:
    spec = parse_spec(f"kind: sandbox\nname: a\nsandbox: {{image: '{text}'}}\n", "s.yaml", "/deep")
    assert spec.sandbox.image == resolved
    if resolved != text:
        with pytest.raises(SpecError, match="relative"):
            parse_spec(f"kind: sandbox\nname: a\nsandbox: {{image: '{text}'}}\n", "s.yaml", None)


def test_the_pull_policy_is_one_of_three_words() -> None:
    text = "kind: sandbox\nname: a\nsandbox: {image: x, pull_policy: %s}\n"
    for word, policy in (("always", PullPolicy.ALWAYS), ("Never", PullPolicy.NEVER)):
        assert parse_spec(text % word, "s.yaml", "/").sandbox.pull_policy is policy
    with pytest.raises(SpecError, match="pull_policy"):
        parse_spec(text % "sometimes", "s.yaml", "/")


def test_relative_mount_without_a_base_is_a_fault_but_an_upload_is_not() -> None:
    text = AGENT + "sandbox: {mounts: [{host: m, guest: /m}]}\n"
    with pytest.raises(SpecError, match="relative"):
        parse_spec(text, "s.yaml", None)
    spec = parse_spec("kind: agent\nname: a\nagent: {prompt: x, inputs: [{file: d/x}]}\n", "s.yaml", None)
    assert input_files(spec) == ("/d/x",)


def test_empty_env_value_is_copied_from_the_client() -> None:
    spec = parse_spec(
        "kind: pipeline\nname: a\nsandbox: {env: {A: '', B: x}}\n"
        "pipeline: {boxes: [{name: b, prompt: x, sandbox: {env: {C: ''}}}]}\n",
        "s.yaml",
        "/",
    )
    assert client_env(spec, {"A": "1", "C": "", "D": "no"}) == {"A": "1", "C": ""}
    with pytest.raises(SpecError, match=r"sandbox\.env\.A: variable A .*not set"):
        client_env(spec, {"C": "1"})
    resolved = resolve_env(spec, {"A": "1", "C": "2"})
    assert resolved.sandbox.env == {"A": "1", "B": "x"}
    assert resolved.pipeline is not None
    assert resolved.pipeline.boxes[0].sandbox.env == {"C": "2"}


def test_llm_variables_override_the_spec() -> None:
    spec = parse_spec(AGENT, "s.yaml", "/")
    env = client_env(spec, {"VOIDBOX_LLM_PROVIDER": "Mock", "VOIDBOX_LLM_MODEL": "m"})
    llm = resolve_env(spec, env).llm
    assert llm is not None
    assert (llm.provider, llm.model) == (Provider.MOCK, "m")
    with pytest.raises(SpecError, match="VOIDBOX_LLM_PROVIDER: unknown value 'x'"):
        resolve_env(spec, {"VOIDBOX_LLM_PROVIDER": "x"})


@given(st.text() | st.binary())
def test_any_text_is_a_spec_or_a_spec_error(text: str | bytes) -> None:
    for name in ("s.yaml", "s.json"):
        try:
            parse_spec(text, name, "/")
        except SpecError as error:
            found = error.problems
        else:
            found = ()
        assert all(problem.message for problem in found)


_TREES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["kind", "name", "agent", "prompt", "run", "pipeline", "boxes", "stages", "skills", "type"]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@given(_TREES)
def test_any_json_is_read_as_the_standard_parser_reads_it_and_judged_like_yaml(tree: object) -> None:
    text = json.dumps(tree)

    def judge(name: str) -> Spec | list[str]:
        try:
            return parse_spec(text, name, "/")
        except SpecError as error:
            return [problem.path + problem.message for problem in error.problems]

    as_json, as_yaml = judge("s.json"), judge("s.yaml")
    if isinstance(as_yaml, list) and any("invalid yaml" in line for line in as_yaml):
        return  # control characters and surrogate escapes are JSON but not YAML 1.1
    assert as_json == as_yaml
