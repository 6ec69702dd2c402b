"""The fields of KubeRay's resources that our manifests use, and nothing else: an unknown or misspelt one is refused.

Pod templates are left to Kubernetes' own schemas.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Group(Strict):
    rayStartParams: dict[str, str]
    template: dict[str, Any]


class WorkerGroup(Group):
    groupName: str
    replicas: int = Field(ge=0)
    minReplicas: int = Field(ge=0)
    maxReplicas: int = Field(ge=1)

    @model_validator(mode="after")
    def _within(self) -> WorkerGroup:
        if not self.minReplicas <= self.replicas <= self.maxReplicas:
            raise ValueError(f"{self.replicas} replicas are not between {self.minReplicas} and {self.maxReplicas}")
        return self


class AutoscalerOptions(Strict):
    idleTimeoutSeconds: int = Field(gt=0)
    upscalingMode: Literal["Default", "Aggressive", "Conservative"]


class AuthOptions(Strict):
    mode: Literal["token", "disabled"]


class RayClusterSpec(Strict):
    rayVersion: str
    enableInTreeAutoscaling: bool
    autoscalerOptions: AutoscalerOptions
    authOptions: AuthOptions
    headGroupSpec: Group
    workerGroupSpecs: list[WorkerGroup] = Field(min_length=1)

    def groups(self) -> list[Group]:
        return [self.headGroupSpec, *self.workerGroupSpecs]


class RayJobSpec(Strict):
    entrypoint: str
    submissionMode: Literal["K8sJobMode", "HTTPMode", "SidecarMode"]
    shutdownAfterJobFinishes: bool
    ttlSecondsAfterFinished: int
    activeDeadlineSeconds: int = Field(gt=0)
    backoffLimit: int = Field(ge=0)
    rayClusterSpec: RayClusterSpec


class Manifest(Strict):
    apiVersion: Literal["ray.io/v1"]
    metadata: dict[str, str]


class RayCluster(Manifest):
    kind: Literal["RayCluster"]
    spec: RayClusterSpec

    def cluster(self) -> RayClusterSpec:
        return self.spec


class RayJob(Manifest):
    kind: Literal["RayJob"]
    spec: RayJobSpec

    def cluster(self) -> RayClusterSpec:
        return self.spec.rayClusterSpec
