"""deploy/kubernetes: what a cluster would be given, and whether it would take it."""

import copy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
import ray
import yaml
from conftest import ROOT
from linters import linted
from manifests import refuse_manifest, render
from ray.serve.schema import ServeDeploySchema

import evaluate_model
import pretrain_model
from raptide.config import load_settings, parse_settings
from raptide.training.planning.recipe import Recipe
from serve.settings import ServeSettings

KUBERNETES = ROOT / "deploy/kubernetes"
FOLDERS = ["base", "overlays/cpu-demo", "overlays/gpu"]
CRDS = ROOT.parent / "shared/data/kuberay"

REFUSED = (jsonschema.ValidationError, kubernetes_validate.ValidationError)

BAKED = "/home/ray/raptide/"
"""Where the image has the checkout."""


@pytest.fixture(scope="module")
def crds():
    if not CRDS.is_dir():
        pytest.skip(f"KubeRay's definitions are not beside the checkout, in {CRDS}")
    return CRDS


@pytest.fixture(params=FOLDERS)
def manifests(request):
    return {each["kind"]: each for each in render(KUBERNETES / request.param)}


def manifest(kind, folder="base"):
    return {each["kind"]: each for each in render(KUBERNETES / folder)}[kind]


def in_checkout(word):
    """An entrypoint's word with the image's checkout replaced by this one."""
    return word.replace(BAKED, f"{ROOT}/")


def pods(value):
    """Every pod template in a manifest."""
    if isinstance(value, dict):
        if "template" in value:
            yield value["template"]
        for each in value.values():
            yield from pods(each)
    elif isinstance(value, list):
        for each in value:
            yield from pods(each)


def test_a_cluster_takes_every_manifest(crds, manifests):
    assert set(manifests) == {
        "Namespace",
        "PersistentVolumeClaim",
        "NetworkPolicy",
        "PodDisruptionBudget",
        "RayCluster",
        "RayJob",
        "RayCronJob",
        "RayService",
    }
    for each in manifests.values():
        refuse_manifest(each, crds)


MUTATIONS = {
    "an unknown field of a job": ("RayJob", "spec/retries", 3),
    "an unknown field deep in a pod": (
        "RayJob",
        "spec/rayClusterSpec/workerGroupSpecs/0/template/spec/containers/0/securityContext/root",
        False,
    ),
    "a number for a text": ("RayJob", "spec/entrypoint", 7),
    "a text for a number": ("RayJob", "spec/backoffLimit", "three"),
    "a policy there is none of": ("RayJob", "spec/deletionStrategy/onFailure/policy", "KeepAll"),
    "no head": ("RayJob", "spec/rayClusterSpec/headGroupSpec", None),
    "no name of a container": (
        "RayCluster",
        "spec/workerGroupSpecs/0/template/spec/containers/0/name",
        None,
    ),
    "a mode of tokens there is none of": ("RayCluster", "spec/authOptions/mode", "password"),
    "a memory that is none": (
        "RayCluster",
        "spec/headGroupSpec/template/spec/containers/0/resources/limits/memory",
        "much",
    ),
    "no schedule": ("RayCronJob", "spec/schedule", None),
    "a job's field beside its template": ("RayCronJob", "spec/entrypoint", "true"),
    "an upgrade without its step": (
        "RayService",
        "spec/upgradeStrategy/clusterUpgradeOptions",
        {"gatewayClassName": "istio", "intervalSeconds": 30},
    ),
    "a configuration that is no text": ("RayService", "spec/serveConfigV2", {"applications": []}),
    "a probe's unknown field": (
        "RayService",
        "spec/rayClusterConfig/workerGroupSpecs/0/template/spec/containers/0/livenessProbe/every",
        5,
    ),
    "another kind of a budget's field": ("PodDisruptionBudget", "spec/minAvailable", [1]),
    "a budget's unknown field": ("PodDisruptionBudget", "spec/atLeast", 1),
    "a policy for no pods": ("NetworkPolicy", "spec/ingress/0/from/0/podSelector", "all"),
    "a claim's unknown field": ("PersistentVolumeClaim", "spec/size", "2Ti"),
    "an unknown field of metadata": ("RayCluster", "metadata/label", {}),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_cluster_refuses_what_is_wrong(crds, mutation):
    kind, path, value = MUTATIONS[mutation]
    sound = manifest(kind)
    refuse_manifest(sound, crds)
    mutated = copy.deepcopy(sound)
    *way, last = path.split("/")
    place = mutated
    for part in way:
        place = place[int(part) if isinstance(place, list) else part]
    if value is None:
        del place[last]
    else:
        place[last] = value
    with pytest.raises(REFUSED):
        refuse_manifest(mutated, crds)


@pytest.mark.parametrize("folder", FOLDERS)
def test_kustomize_renders_the_same(folder):
    kustomize = next(
        (
            command
            for command in (["kustomize", "build"], ["kubectl", "kustomize"])
            if shutil.which(command[0])
        ),
        None,
    )
    if kustomize is None:
        pytest.skip("neither kustomize nor kubectl is installed")
    command = [*kustomize, str(KUBERNETES / folder)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout

    def by_name(manifests):
        return sorted(manifests, key=lambda each: each["kind"])

    assert by_name(yaml.safe_load_all(printed)) == by_name(render(KUBERNETES / folder))


def test_a_patch_that_hits_nothing_is_an_error(tmp_path):
    (tmp_path / "claim.yaml").write_text("{kind: A, metadata: {name: a}, spec: {size: 1}}")
    (tmp_path / "kustomization.yaml").write_text(
        "{resources: [claim.yaml], patches: [{path: patch.yaml, target: {kind: A, name: a}}]}"
    )
    (tmp_path / "patch.yaml").write_text("[{op: replace, path: /spec/size, value: 2}]")
    assert render(tmp_path) == [{"kind": "A", "metadata": {"name": "a"}, "spec": {"size": 2}}]
    (tmp_path / "patch.yaml").write_text("[{op: replace, path: /spec/width, value: 2}]")
    with pytest.raises(KeyError):
        render(tmp_path)


def test_every_pod_is_one_that_restricted_namespaces_take(manifests):
    assert (
        manifests["Namespace"]["metadata"]["labels"]["pod-security.kubernetes.io/enforce"]
        == "restricted"
    )
    found = list(pods(list(manifests.values())))
    assert len(found) >= 7
    for pod in found:
        security = pod["spec"]["securityContext"]
        assert (security["runAsNonRoot"], security["runAsUser"]) == (True, 1000)
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in pod["spec"]["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "capabilities": {"drop": ["ALL"]},
            }
    for kind, field in (("RayCluster", None), ("RayService", "rayClusterConfig")):
        cluster = manifests[kind]["spec"][field] if field else manifests[kind]["spec"]
        sidecar = cluster["autoscalerOptions"]["securityContext"]
        assert sidecar["allowPrivilegeEscalation"] is False


def test_shared_memory_counts_in_a_containers_memory(manifests):
    units = {"Mi": 2**20, "Gi": 2**30}
    for pod in pods(list(manifests.values())):
        (shm,) = [volume for volume in pod["spec"]["volumes"] if volume["name"] == "shm"]
        assert shm["emptyDir"]["medium"] == "Memory"
        container = pod["spec"]["containers"][0]
        assert {"name": "shm", "mountPath": "/dev/shm"} in container["volumeMounts"]
        size, memory = (
            int(amount[:-2]) * units[amount[-2:]]
            for amount in (shm["emptyDir"]["sizeLimit"], container["resources"]["limits"]["memory"])
        )
        assert size <= memory / 2


def test_a_pod_that_is_to_go_has_time_to_say_so(manifests):
    found = [pod for kind in ("RayJob", "RayService") for pod in pods(manifests[kind])]
    for pod in found:
        (container,) = pod["spec"]["containers"]
        variables = {each["name"]: each.get("value") for each in container["env"]}
        before = container.get("lifecycle", {}).get(
            "preStop", {"exec": {"command": ["sleep", "0"]}}
        )
        needs_s = int(variables["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"])
        needs_s += int(before["exec"]["command"][1])
        assert needs_s < pod["spec"]["terminationGracePeriodSeconds"]


def shell_commands(value):
    """Scripts that hooks and probes of pods give to bash."""
    if isinstance(value, dict):
        command = value.get("command")
        if isinstance(command, list) and command[:2] == ["bash", "-c"]:
            yield command[2]
        value = list(value.values())
    for each in value if isinstance(value, list) else []:
        yield from shell_commands(each)


def test_the_commands_of_hooks_and_probes_are_clean():
    found = set(shell_commands(render(KUBERNETES / "base")))
    assert len(found) == 2
    for each in found:
        assert linted("shellcheck", "--shell=bash", "-", text=each) == ""


def test_every_pod_is_reached_by_its_policy_and_found_by_prometheus(manifests):
    policy = manifests["NetworkPolicy"]["spec"]
    assert set(policy["policyTypes"]) == {"Ingress", "Egress"}
    for pod in pods(list(manifests.values())):
        labels = pod["metadata"]["labels"]
        assert policy["podSelector"]["matchLabels"].items() <= labels.items()
        ports = {
            port["name"]: port["containerPort"] for port in pod["spec"]["containers"][0]["ports"]
        }
        assert ports["metrics"] == 8080
    opened = {port["port"] for rule in policy["ingress"] for port in rule.get("ports", [])}
    assert opened == {8265, 8080, 8000}


def clusters(manifests):
    """The Ray clusters that manifests describe, by kind."""
    return {
        "RayCluster": manifests["RayCluster"]["spec"],
        "RayJob": manifests["RayJob"]["spec"]["rayClusterSpec"],
        "RayCronJob": manifests["RayCronJob"]["spec"]["jobTemplate"]["rayClusterSpec"],
        "RayService": manifests["RayService"]["spec"]["rayClusterConfig"],
    }


def test_every_cluster_is_of_this_ray_asks_for_its_token_and_exports_metrics(manifests):
    for cluster in clusters(manifests).values():
        assert cluster["rayVersion"] == ray.__version__
        assert cluster["authOptions"]["mode"] == "token"
        for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
            assert group["rayStartParams"]["metrics-export-port"] == "8080"
        assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"


def gpus(cluster):
    limits = [
        group["template"]["spec"]["containers"][0]["resources"]["limits"]
        for group in cluster["workerGroupSpecs"]
    ]
    return sum(int(each.get("nvidia.com/gpu", 0)) for each in limits)


def test_the_overlays_are_what_they_are_called():
    for name, asks in (("gpu", True), ("cpu-demo", False)):
        rendered = {each["kind"]: each for each in render(KUBERNETES / "overlays" / name)}
        images = {pod["spec"]["containers"][0]["image"] for pod in pods(list(rendered.values()))}
        (image,) = images
        assert image.endswith("-cuda" if asks else "-cpu")
        assert all(bool(gpus(each)) == asks for each in clusters(rendered).values())


def read_entrypoint(spec, main, module, monkeypatch):
    """What a job's own parser makes of an entrypoint."""
    python, script, *arguments = shlex.split(spec["entrypoint"])
    assert (python, in_checkout(script)) == ("python", str(Path(module.__file__)))
    monkeypatch.setattr(sys, "argv", [script, *map(in_checkout, arguments)])
    return main()


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_pretraining_job_is_one_that_the_job_itself_takes(folder, monkeypatch):
    spec = manifest("RayJob", folder)["spec"]
    seen = {}

    class Parsed(Exception):
        pass

    def stop(model, file, overrides):
        seen.update(recipe=load_settings(model, file, overrides), file=file)
        raise Parsed

    monkeypatch.setattr(pretrain_model, "load_settings", stop)
    monkeypatch.setattr(
        pretrain_model, "_refuse_contradictions", lambda args: seen.update(args=args)
    )
    with pytest.raises(Parsed):
        read_entrypoint(spec, pretrain_model.main, pretrain_model, monkeypatch)
    args, recipe = seen["args"], seen["recipe"]
    assert args.start_or_resume
    assert spec["backoffLimit"] > 0
    assert str(args.output).startswith("/shared/runs/")
    (corpus,) = recipe.corpus
    assert corpus.path.startswith("/shared/corpora/")
    cluster = spec["rayClusterSpec"]
    assert recipe.cluster.device == ("cuda" if gpus(cluster) else "cpu")  # `auto` cannot tell there
    for name in [str(args.output), corpus.path]:
        assert len(Path(name).parts) == 4  # in the shared folder


def test_the_pretraining_job_ends_as_kueue_and_the_operator_ask(manifests):
    spec = manifests["RayJob"]["spec"]
    assert spec["shutdownAfterJobFinishes"] is True  # Kueue's condition
    strategy = spec["deletionStrategy"]
    assert "deletionRules" not in strategy  # which the operator refuses beside it
    policies = {strategy[end]["policy"] for end in ("onSuccess", "onFailure")}
    assert policies == {"DeleteCluster"}
    assert not spec["rayClusterSpec"].get("enableInTreeAutoscaling")  # Kueue reserves fixed sizes
    for group in spec["rayClusterSpec"]["workerGroupSpecs"]:
        assert group["replicas"] == group["minReplicas"] == group["maxReplicas"]


def test_the_pretraining_jobs_workers_fit_its_cluster():
    spec = manifest("RayJob", "overlays/gpu")["spec"]
    overrides = [word for word in shlex.split(spec["entrypoint"]) if "=" in word]
    file = shlex.split(spec["entrypoint"])[3]
    recipe = load_settings(Recipe, Path(in_checkout(file)), overrides).cluster
    (group,) = [g for g in spec["rayClusterSpec"]["workerGroupSpecs"] if g["groupName"] == "gpu"]
    resources = group["template"]["spec"]["containers"][0]["resources"]
    a_node = int(resources["limits"]["nvidia.com/gpu"])
    assert recipe.max_workers == group["replicas"] * a_node
    assert int(resources["requests"]["cpu"]) >= a_node * recipe.cpus_per_worker
    assert recipe.min_workers <= a_node
    tolerated = {each["key"] for each in group["template"]["spec"]["tolerations"]}
    assert {"nvidia.com/gpu", "cloud.google.com/gke-spot"} <= tolerated


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_nightly_evaluation_is_one_that_the_job_itself_takes(folder, monkeypatch):
    spec = manifest("RayCronJob", folder)["spec"]["jobTemplate"]
    args = read_entrypoint(spec, evaluate_model.read_arguments, evaluate_model, monkeypatch)
    assert args.benchmark == ROOT / "jobs/benchmarks/tiny.yaml"
    trained = shlex.split(manifest("RayJob", folder)["spec"]["entrypoint"])
    assert [str(path) for path in args.model] == [trained[trained.index("--output") + 1]]
    assert spec["activeDeadlineSeconds"] < 24 * 3600


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_endpoint_is_one_that_serve_and_the_application_take(folder):
    service = manifest("RayService", folder)["spec"]
    config = ServeDeploySchema.model_validate(yaml.safe_load(service["serveConfigV2"]))
    (application,) = config.applications
    settings = parse_settings(ServeSettings, application.args, source="serveConfigV2")
    (model,) = settings.model_settings()
    assert application.import_path == "serve.app:build"
    assert (config.http_options.host, config.http_options.port) == ("0.0.0.0", 8000)
    cluster = service["rayClusterConfig"]
    assert bool(model.gpus_per_replica) == bool(gpus(cluster))
    trained = shlex.split(manifest("RayJob", folder)["spec"]["entrypoint"])
    assert model.path == trained[trained.index("--output") + 1]
    (group,) = cluster["workerGroupSpecs"]
    resources = group["template"]["spec"]["containers"][0]["resources"]
    assert model.cpus_per_replica <= int(resources["requests"]["cpu"])
    assert (model.max_replicas or model.replicas) <= group["maxReplicas"]


def test_the_endpoint_has_keys_probes_and_a_budget(manifests):
    service, budget = manifests["RayService"]["spec"], manifests["PodDisruptionBudget"]["spec"]
    cluster = service["rayClusterConfig"]
    assert cluster["enableInTreeAutoscaling"] is True
    (group,) = cluster["workerGroupSpecs"]
    (container,) = group["template"]["spec"]["containers"]
    keys = {each["name"]: each for each in container["env"]}["RAPTIDE_API_KEYS"]
    assert keys["valueFrom"]["secretKeyRef"]["name"] == "api-keys"
    assert {"startupProbe", "livenessProbe", "readinessProbe"} <= set(container)
    assert (
        budget["selector"]["matchLabels"].items() <= group["template"]["metadata"]["labels"].items()
    )
    assert budget["minAvailable"] == 1


def test_a_step_by_step_upgrade_has_what_the_operator_asks_for():
    service = manifest("RayService", "overlays/gpu")["spec"]
    strategy = service["upgradeStrategy"]
    assert strategy["type"] == "NewClusterWithIncrementalUpgrade"
    options = strategy["clusterUpgradeOptions"]
    assert {"gatewayClassName", "stepSizePercent", "intervalSeconds"} <= set(options)
    assert service["rayClusterConfig"]["enableInTreeAutoscaling"] is True
    assert manifest("RayService")["spec"]["upgradeStrategy"] == {"type": "NewCluster"}
