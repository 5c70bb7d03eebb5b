"""deploy/manifests and deploy/examples against the product: what is asked for is what is needed."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
import yaml

from driver.app import STOP_PATIENCE, TAKEOVER_PATIENCE
from driver.cli.validate import check
from driver.kube.client import Resource
from driver.paths import Paths
from driver.settings import parse

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
MANIFESTS = DEPLOY / "manifests"
EXAMPLES = sorted((DEPLOY / "examples/claims").glob("*.yaml"))
VERBS = {
    "get": "get",
    "list_pages": "list",
    "create": "create",
    "replace": "update",
    "delete": "delete",
    "apply": "patch",
    "merge": "patch",
}
"""Methods of ApiClient and the verbs they need."""

Object = dict[str, Any]


def documents(path: Path) -> list[Object]:
    return [each for each in yaml.safe_load_all(path.read_text()) if each is not None]


@cache
def manifests() -> dict[tuple[str, str], Object]:
    kustomization = yaml.safe_load((MANIFESTS / "kustomization.yaml").read_text())
    found = [each for name in kustomization["resources"] for each in documents(MANIFESTS / name)]
    return {(each["kind"], each["metadata"]["name"]): each for each in found}


def pod_spec() -> Object:
    return dict(manifests()["DaemonSet", "knd-agent"]["spec"]["template"]["spec"])


def agent() -> Object:
    (container,) = pod_spec()["containers"]
    return dict(container)


def test_every_manifest_is_part_of_the_kustomization() -> None:
    kustomization = yaml.safe_load((MANIFESTS / "kustomization.yaml").read_text())
    generated = [name for each in kustomization["configMapGenerator"] for name in each["files"]]
    named = {"kustomization.yaml", *kustomization["resources"], *generated}
    assert {path.name for path in MANIFESTS.iterdir()} == named


# --- what the agent may ask ---------------------------------------------------------------------------


def _enum(node: ast.expr) -> str | None:
    match node:
        case ast.Attribute(value=ast.Name(id="Resource"), attr=name):
            return str(Resource[name].plural)
    return None


def _calls() -> set[tuple[str, str]]:
    """(verb, resource) of every request in driver/kube, from its source."""
    found: set[tuple[str, str]] = set()
    for path in (ROOT / "driver/kube").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            named = [plural for each in node.args if (plural := _enum(each))]
            match node.func:
                case ast.Attribute(attr=method) if named and method in VERBS:
                    below = {each.arg: each.value for each in node.keywords}.get("subresource")
                    plural = named[0]
                    if below is not None:
                        plural += f"/{ast.literal_eval(below)}"
                    found.add((VERBS[method], plural))
                case _ if named:  # a Mirror, which lists and watches
                    found |= {("list", named[0]), ("watch", named[0])}
    return found


def _granted() -> set[tuple[str, str]]:
    rules = manifests()["ClusterRole", "knd-agent"]["rules"]
    return {(verb, each) for rule in rules for each in rule["resources"] for verb in rule["verbs"]}


def test_the_agent_may_do_what_its_code_does_and_nothing_else() -> None:
    """resourceclaims/driver is not requested: the server asks for it where status.devices changes."""
    hidden = {(f"associated-node:{verb}", "resourceclaims/driver") for verb in ("patch", "update")}
    assert _granted() == _calls() | hidden


def test_rules_name_the_group_their_resource_is_in() -> None:
    groups = {each.plural: each.value[0].partition("/apis/")[2].partition("/")[0] for each in Resource}
    for rule in manifests()["ClusterRole", "knd-agent"]["rules"]:
        for resource in rule["resources"]:
            assert rule["apiGroups"] == [groups[resource.partition("/")[0]]], resource


def test_only_this_driver_and_this_service_account_are_meant() -> None:
    driver, account = Paths().driver, "system:serviceaccount:knd-system:knd-agent"
    (rule,) = [
        each
        for each in manifests()["ClusterRole", "knd-agent"]["rules"]
        if each["resources"] == ["resourceclaims/driver"]
    ]
    assert rule["resourceNames"] == [driver]
    for name in ("slices.knd.internal", "claims.knd.internal"):
        policy = manifests()["ValidatingAdmissionPolicy", name]["spec"]
        assert [each["expression"] for each in policy["matchConditions"]] == [
            f'request.userInfo.username == "{account}"'
        ]
        assert policy["failurePolicy"] == "Fail"
        binding = manifests()["ValidatingAdmissionPolicyBinding", name]["spec"]
        assert binding == {"policyName": name, "validationActions": ["Deny"]}
    assert (pod_spec()["serviceAccountName"], "knd-system") == ("knd-agent", account.split(":")[2])


# --- what the agent has of its node -------------------------------------------------------------------


def _mounts(container: Object) -> dict[PurePosixPath, Object]:
    return {PurePosixPath(each["mountPath"]): each for each in container["volumeMounts"]}


def _host_paths() -> dict[str, PurePosixPath]:
    return {
        each["name"]: PurePosixPath(each["hostPath"]["path"])
        for each in pod_spec()["volumes"]
        if "hostPath" in each
    }


def _paths() -> dict[str, PurePosixPath]:
    paths = Paths()
    names = [name for name, value in vars(Paths).items() if isinstance(value, property)]
    return {name: PurePosixPath(str(getattr(paths, name))) for name in names}


@pytest.mark.parametrize("name", sorted(_paths()))
def test_every_path_the_driver_touches_is_the_hosts_at_the_same_place(name: str) -> None:
    path = _paths()[name]
    over = [(at, mount) for at, mount in _mounts(agent()).items() if at in (path, *path.parents)]
    assert over, f"{path} is below no mount"
    at, mount = over[0]
    assert _host_paths()[mount["name"]] == at
    assert not mount.get("readOnly"), f"{path} is written to"


def test_nothing_of_the_host_is_mounted_without_a_use() -> None:
    """Beside driver/paths.py: namespaces of pods, and what of /sys is written to."""
    beside = {PurePosixPath(path) for path in ("/run/netns", "/sys/devices", "/sys/bus/pci")}
    used = {at for at in _mounts(agent()) for path in _paths().values() if at in (path, *path.parents)}
    assert set(_host_paths().values()) == used | beside


def test_sockets_are_reached_through_their_folder_since_a_restart_makes_new_ones() -> None:
    assert Paths().nri_socket.parent in map(Path, _host_paths().values())


def test_namespaces_of_pods_that_start_later_appear_in_the_agent() -> None:
    assert _mounts(agent())[PurePosixPath("/run/netns")]["mountPropagation"] == "HostToContainer"


def test_the_helper_is_put_where_the_runtime_is_told_to_find_it() -> None:
    (put,) = pod_spec()["initContainers"]
    folder = PurePosixPath(put["command"][1])
    assert folder == PurePosixPath(str(Paths().netns_check.parent))
    (at,) = _mounts(put)
    assert at in folder.parents
    script = (DEPLOY / "image/put-netns-check.sh").read_text()
    assert f'"$folder/{Paths().netns_check.name}"' in script


def test_privileges_are_two_capabilities() -> None:
    context = agent()["securityContext"]
    assert context["capabilities"] == {"drop": ["ALL"], "add": ["NET_ADMIN", "SYS_ADMIN"]}
    assert "privileged" not in context
    assert (context["readOnlyRootFilesystem"], context["allowPrivilegeEscalation"]) == (True, False)
    assert context["seccompProfile"] == {"type": "RuntimeDefault"}
    spec = pod_spec()
    assert spec["hostNetwork"] is True
    assert {"hostPID", "hostIPC"} & spec.keys() == set()


# --- how it is run --------------------------------------------------------------------------------------


def test_the_command_line_is_one_the_agent_takes() -> None:
    command, *flags = agent()["args"]
    assert command == "agent"
    settings = parse([*flags, "--node-name=node-a"])
    (policy,) = [each for each in pod_spec()["volumes"] if each["name"] == "policy"]
    (mount,) = [each for each in agent()["volumeMounts"] if each["name"] == "policy"]
    assert settings.policy is not None
    assert str(settings.policy.parent) == mount["mountPath"]
    # A file mounted by subPath is never updated.
    assert "subPath" not in mount
    assert "items" not in policy["configMap"]
    assert (MANIFESTS / settings.policy.name).is_file()


def test_probes_ask_where_the_agent_answers() -> None:
    container = agent()
    (port,) = container["ports"]
    assert port["containerPort"] == port["hostPort"] == parse(["--node-name=node-a"]).metrics_port
    paths = {"startupProbe": "/livez", "livenessProbe": "/livez", "readinessProbe": "/readyz"}
    for probe, path in paths.items():
        assert container[probe]["httpGet"] == {"host": "127.0.0.1", "port": port["name"], "path": path}


def test_an_agent_is_given_time_to_start_and_to_stop() -> None:
    assert pod_spec()["terminationGracePeriodSeconds"] > STOP_PATIENCE
    startup = agent()["startupProbe"]
    assert startup["periodSeconds"] * startup["failureThreshold"] > 2 * TAKEOVER_PATIENCE


def test_two_agents_never_share_a_node() -> None:
    update = manifests()["DaemonSet", "knd-agent"]["spec"]["updateStrategy"]
    assert update == {"rollingUpdate": {"maxSurge": 0, "maxUnavailable": 1}}


def test_the_agent_runs_wherever_a_pod_with_a_claim_may() -> None:
    assert pod_spec()["tolerations"] == [{"operator": "Exists"}]
    assert pod_spec()["priorityClassName"] == "system-node-critical"


@pytest.mark.parametrize("overlay", ["deploy/cleanup", "ci/kind-sriov-sim/overlays/test"])
def test_an_overlay_is_the_manifests_with_a_change(overlay: str) -> None:
    kustomization = yaml.safe_load((ROOT / overlay / "kustomization.yaml").read_text())
    assert [(ROOT / overlay / each).resolve() for each in kustomization["resources"]] == [MANIFESTS]


@pytest.mark.parametrize(
    "policy", [MANIFESTS / "policy.yaml", ROOT / "ci/kind-sriov-sim/overlays/test/policy.yaml"], ids=str
)
def test_policies_are_valid(policy: Path) -> None:
    assert check(policy.read_text(), str(policy), Paths().driver) == {"NodePolicy": 1}


# --- examples -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.stem)
def test_examples_name_classes_claims_and_templates_that_exist(file: Path) -> None:
    own = {(each["kind"], each["metadata"]["name"]) for each in documents(file)}
    text = file.read_text()
    wanted = {("DeviceClass", name) for name in re.findall(r"deviceClassName: (\S+)", text)}
    wanted |= {("ResourceClaim", name) for name in re.findall(r"resourceClaimName: (\S+)", text)}
    wanted |= {
        ("ResourceClaimTemplate", name) for name in re.findall(r"resourceClaimTemplateName: (\S+)", text)
    }
    assert wanted - own - manifests().keys() == set()


def test_no_example_brings_a_class_that_the_manifests_have() -> None:
    """Applied, it would take the place of a class that the administrator has changed."""
    brought = {(each["kind"], each["metadata"]["name"]) for file in EXAMPLES for each in documents(file)}
    assert brought & manifests().keys() == set()


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.stem)
def test_examples_use_one_image_that_can_be_replaced(file: Path) -> None:
    assert set(re.findall(r"image: (\S+)", file.read_text())) == {"busybox:stable"}
