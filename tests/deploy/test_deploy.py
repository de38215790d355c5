"""What Kubernetes and Docker are told: fields that exist, options and addresses that the server has.

Nothing here has seen a cluster. With KSERVE_CRD=FILE, KServe's definition of InferenceService
(`serving.kserve.io_inferenceservices.yaml` of a release), the file is checked against that, too.
"""

from __future__ import annotations

import copy
import json
import os
import re
import tomllib
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from server import Server
from typer.main import get_command

from agln_fast.cli.app import app

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "deploy" / "Dockerfile").read_text("utf-8")
SERVICE: dict[str, Any] = yaml.safe_load((ROOT / "deploy" / "inference-service.yaml").read_text("utf-8"))
PREDICTOR = SERVICE["spec"]["predictor"]
[CONTAINER] = PREDICTOR["containers"]
ENGINE_S = 10  # what the end of an engine's process may take


def record(needed: str, **fields: Any) -> dict[str, Any]:
    """An object with these fields and no others; `needed`: those that must be there."""
    return {"type": "object", "properties": fields, "required": needed.split(), "additionalProperties": False}


TEXT, YES_OR_NO = {"type": "string"}, {"type": "boolean"}
COUNT, PORT = {"type": "integer", "minimum": 1}, {"type": "integer", "minimum": 1, "maximum": 65535}
TEXTS = {"type": "object", "additionalProperties": TEXT}
AMOUNT = {"type": "string", "pattern": r"^\d+(\.\d+)?(m|[KMG]i)?$"}
AMOUNTS = record("cpu memory", cpu=AMOUNT, memory=AMOUNT)
PROBE = record(
    "httpGet",
    httpGet=record("path port", path=TEXT, port=PORT),
    periodSeconds=COUNT,
    timeoutSeconds=COUNT,
    failureThreshold=COUNT,
)
# What the file uses of serving.kserve.io/v1beta1. Whoever adds a field looks it up there, and runs the test with the
# definition.
SCHEMA = record(
    "apiVersion kind metadata spec",
    apiVersion={"const": "serving.kserve.io/v1beta1"},
    kind={"const": "InferenceService"},
    metadata=record("name", name=TEXT, annotations=TEXTS),
    spec=record(
        "predictor",
        predictor=record(
            "containers terminationGracePeriodSeconds securityContext",
            minReplicas=COUNT,
            maxReplicas=COUNT,
            annotations=TEXTS,
            terminationGracePeriodSeconds=COUNT,
            securityContext=record(
                "runAsNonRoot seccompProfile",
                runAsNonRoot=YES_OR_NO,
                seccompProfile=record("type", type={"enum": ["RuntimeDefault"]}),
            ),
            containers={
                "type": "array",
                "items": record(
                    "name image args env ports resources startupProbe readinessProbe livenessProbe securityContext",
                    name={"const": "kserve-container"},
                    image=TEXT,
                    args={"type": "array", "items": TEXT},
                    env={"type": "array", "items": record("name value", name=TEXT, value=TEXT)},
                    ports={"type": "array", "items": record("name containerPort", name=TEXT, containerPort=PORT)},
                    resources=record("requests limits", requests=AMOUNTS, limits=AMOUNTS),
                    startupProbe=PROBE,
                    readinessProbe=PROBE,
                    livenessProbe=PROBE,
                    securityContext=record(
                        "runAsUser allowPrivilegeEscalation readOnlyRootFilesystem capabilities",
                        runAsUser=COUNT,
                        allowPrivilegeEscalation={"const": False},
                        readOnlyRootFilesystem={"const": True},
                        capabilities=record("drop", drop={"const": ["ALL"]}),
                    ),
                ),
            },
        ),
    ),
)


def closed(schema: Any) -> Any:
    """As the API server is asked to take it with strict validation: objects have no fields but those described."""
    if isinstance(schema, list):
        return [closed(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    inner = {key: closed(value) for key, value in schema.items()}
    if isinstance(schema.get("properties"), dict) and not schema.get("x-kubernetes-preserve-unknown-fields"):
        inner.setdefault("additionalProperties", False)
    return inner


def definition() -> Any:
    """KServe's own schema."""
    path = os.environ.get("KSERVE_CRD")
    if not path:
        pytest.skip("needs KSERVE_CRD=FILE, KServe's definition of InferenceService")
    with Path(path).open(encoding="utf-8") as file:
        versions = yaml.load(file, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))["spec"]["versions"]
    [found] = [version["schema"]["openAPIV3Schema"] for version in versions if version["name"] == "v1beta1"]
    schema = closed(found)
    schema["properties"]["metadata"] = {"type": "object"}  # of every resource, and not described here
    return schema


@pytest.fixture(scope="module", params=["ours", "KServe's"])
def schema(request: pytest.FixtureRequest) -> Any:
    return SCHEMA if request.param == "ours" else definition()


def is_valid(document: Any, schema: Any) -> bool:
    return jsonschema.Draft202012Validator(schema).is_valid(document)


def test_the_service_fits_the_schema(schema):
    assert is_valid(SERVICE, schema)


BROKEN = {
    "a number as text": (("spec", "predictor", "minReplicas"), "one"),
    "a field of a probe misspelt": (
        ("spec", "predictor", "containers", 0, "readinessProbe", "failureTreshold"),
        2,
    ),
    "a field of the container misspelt": (("spec", "predictor", "containers", 0, "argz"), []),
    "a probe without its port": (("spec", "predictor", "containers", 0, "livenessProbe", "httpGet", "port"), None),
    "an environment that is a table": (("spec", "predictor", "containers", 0, "env"), {"PROTOCOL": "v2"}),
    "no predictor": (("spec",), {}),
}


@pytest.mark.parametrize("where", BROKEN)
def test_a_broken_field_is_noticed(schema, where):
    path, value = BROKEN[where]
    document = copy.deepcopy(SERVICE)
    place: Any = document
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    assert not is_valid(document, schema)


def instruction(name: str) -> list[str]:
    """The words of the Dockerfile's last instruction of that name, which has exec form: signals reach the program."""
    found: list[str] = json.loads(re.findall(rf"^{name} (\[.*\])$", DOCKERFILE, re.MULTILINE)[-1])
    return found


def options(arguments: list[str]) -> dict[str, str]:
    """By name; `--x y` and `--x=y`."""
    return dict(re.findall(r"(--[\w-]+)[ =](\S+)", " ".join(arguments)))


@pytest.mark.parametrize("arguments", [CONTAINER["args"], instruction("CMD")], ids=["Kubernetes", "Docker"])
def test_the_server_is_called_as_it_can_be(arguments):
    assert instruction("ENTRYPOINT") == ["agln-fast", "serve"]
    verb = get_command(app).commands["serve"]  # type: ignore[attr-defined]
    parsed = verb.make_context("serve", list(arguments)).params
    assert parsed["bundles"] == ["agln=/mnt/models"]
    assert parsed["host"] == "0.0.0.0"
    ports = [parsed[f"{kind}_port"] for kind in ("http", "grpc", "metrics")]
    assert ports == [8080, 8081, 8082]
    assert re.search(r"^EXPOSE (.*)$", DOCKERFILE, re.MULTILINE)[1].split() == [str(port) for port in ports]


def test_kserve_is_told_of_the_protocol_and_the_ports():
    environment = {each["name"]: each["value"] for each in CONTAINER["env"]}
    assert environment["PROTOCOL"] == "v2"
    assert "://" in environment["STORAGE_URI"]
    told = options(CONTAINER["args"])
    assert [(port["name"], str(port["containerPort"])) for port in CONTAINER["ports"]] == [
        ("http", told["--http-port"]),
        ("grpc", told["--grpc-port"]),
    ]
    assert PREDICTOR["annotations"]["prometheus.io/port"] == told["--metrics-port"]
    assert all(CONTAINER[f"{kind}Probe"]["httpGet"]["port"] == 8080 for kind in ("startup", "readiness", "liveness"))


def test_there_is_time_to_end_and_to_notice_it():
    told = options(CONTAINER["args"])
    linger, drain = float(told["--linger-s"]), float(told["--drain-s"])
    assert PREDICTOR["terminationGracePeriodSeconds"] > linger + drain + ENGINE_S
    probe = CONTAINER["readinessProbe"]
    assert linger > probe["periodSeconds"] * probe["failureThreshold"]


def test_it_is_no_root_here_and_there():
    user = re.search(r"^USER (\d+):\d+$", DOCKERFILE, re.MULTILINE)
    assert user
    assert int(user[1]) == CONTAINER["securityContext"]["runAsUser"] > 0
    assert PREDICTOR["securityContext"]["runAsNonRoot"]


def test_the_image_holds_what_the_metadata_says():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert CONTAINER["image"] == f"agln-fast:{project['version']}"
    assert {"openvino", "onnxruntime", "serve"} <= set(project["optional-dependencies"])
    copied = re.findall(r"^COPY (?!--from)(.*) \S+$", DOCKERFILE, re.MULTILINE)
    assert all((ROOT / name).exists() for line in copied for name in line.split())


@pytest.mark.skipif(find_spec("mlserver") is None, reason="needs the package mlserver")
def test_the_probes_are_answered(bundle):
    server = Server(f"agln={bundle.path}", "--backend", "onnxruntime", "--threads", 1)
    try:
        for kind in ("startup", "readiness", "liveness"):
            assert server.ask("GET", CONTAINER[f"{kind}Probe"]["httpGet"]["path"])[0] == 200
        [check] = re.findall(r"urlopen\('(http://127.0.0.1:8080)(\S+)', timeout=4\)", DOCKERFILE)
        assert server.ask("GET", check[1])[0] == 200
    finally:
        assert server.end() == 0
