"""Kubernetes manifests as the cluster would see them: rendered, and judged by their schemas."""

from __future__ import annotations

import copy
import lzma
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import yaml

KEPT_OPEN = "x-kubernetes-preserve-unknown-fields"


def render(folder: Path) -> list[dict[str, Any]]:
    """What `kubectl kustomize FOLDER` prints, for as much of kustomize as deploy/ uses: resources,
    namespace, images by name, patches by JSON Patch (RFC 6902). Another field is an error."""
    kustomization = yaml.safe_load((folder / "kustomization.yaml").read_text())
    known = {"apiVersion", "kind", "resources", "namespace", "images", "patches"}
    assert set(kustomization) <= known, set(kustomization) - known
    found: list[dict[str, Any]] = []
    for name in kustomization["resources"]:
        path = folder / name
        if path.is_dir():
            found += render(path)
        else:  # copies, so that a patch changes nothing that YAML's anchors share
            found += [copy.deepcopy(each) for each in map(_unshared, _documents(path))]
    for resource in found:
        if "namespace" in kustomization and resource["kind"] != "Namespace":
            resource["metadata"]["namespace"] = kustomization["namespace"]
        for image in kustomization.get("images", []):
            _rename(resource, image)
    for patch in kustomization.get("patches", []):
        target = patch["target"]
        (resource,) = [
            each
            for each in found
            if (each["kind"], each["metadata"]["name"]) == (target["kind"], target["name"])
        ]
        for operation in yaml.safe_load((folder / patch["path"]).read_text()):
            _apply(resource, **operation)
    return found


def _documents(path: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(path.read_text()))


def _unshared(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _unshared(each) for name, each in value.items()}
    return [_unshared(each) for each in value] if isinstance(value, list) else value


def _rename(value: Any, image: dict[str, str]) -> None:
    """Give an image that containers name the name and the tag that it has in an overlay."""
    for each in value.values() if isinstance(value, dict) else value:
        if isinstance(each, dict | list):
            _rename(each, image)
    if isinstance(value, dict) and value.get("image") == image["name"]:
        value["image"] = f"{image.get('newName', image['name'])}:{image['newTag']}"


def _apply(resource: dict[str, Any], op: str, path: str, value: Any = None) -> None:
    *way, last = [part.replace("~1", "/").replace("~0", "~") for part in path[1:].split("/")]
    place: Any = resource
    for part in way:
        place = place[int(part) if isinstance(place, list) else part]
    key = int(last) if isinstance(place, list) else last
    if op == "remove":
        del place[key]
        return
    assert op == "add" or place[key] is not None  # one that replaces nothing is an error
    place[key] = copy.deepcopy(value)


def refuse_manifest(manifest: dict[str, Any], crds: Path) -> None:
    """
    Raises:
        jsonschema.ValidationError, kubernetes_validate.ValidationError: what a cluster with
            strict field validation would say.
    """
    if not manifest["apiVersion"].startswith("ray.io/"):
        kubernetes_validate.validate(manifest, kubernetes_validate.latest_version(), strict=True)
        return
    version = manifest["apiVersion"].partition("/")[2]
    ray_validator(crds, manifest["kind"], version).validate(manifest)


@cache
def ray_validator(crds: Path, kind: str, version: str) -> jsonschema.Draft202012Validator:
    """By the schema of KubeRay's kind, closed against fields that it does not name."""
    file = crds / f"ray.io_{kind.lower()}s.yaml.xz"
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    definition = yaml.load(lzma.decompress(file.read_bytes()), loader)
    (found,) = [each for each in definition["spec"]["versions"] if each["name"] == version]
    schema = found["schema"]["openAPIV3Schema"]
    _close(schema)
    # Kubernetes' own, which the definition leaves open.
    schema["properties"]["metadata"] = {
        "type": "object",
        "required": ["name"],
        "additionalProperties": False,
        "properties": {name: {"type": "string"} for name in ("name", "namespace")}
        | {
            name: {"type": "object", "additionalProperties": {"type": "string"}}
            for name in ("labels", "annotations")
        },
    }
    schema["required"] = ["apiVersion", "kind", "metadata", "spec"]
    schema["properties"]["kind"] = {"const": kind}
    return jsonschema.Draft202012Validator(schema)


def _close(schema: Any) -> None:
    """Refuse what a schema does not name, as an API server does that is asked to be strict."""
    if isinstance(schema, list):
        for each in schema:
            _close(each)
    if not isinstance(schema, dict):
        return
    if "properties" in schema and "additionalProperties" not in schema:
        schema["additionalProperties"] = bool(schema.get(KEPT_OPEN))
    for each in schema.values():
        _close(each)
