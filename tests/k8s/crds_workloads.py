"""The resources of Argo Rollouts and Kubeflow Trainer, as crds.py has the others."""

from typing import Any, Literal

from crds import Name, Resource, Strict
from pydantic import Field

# Argo Rollouts


class WorkloadRef(Strict):
    apiVersion: str
    kind: str
    name: str
    scaleDown: Literal["never", "onsuccess", "progressively"]


class Pause(Strict):
    duration: str | int | None = None


class Step(Strict):
    setWeight: int | None = Field(None, ge=0, le=100)
    pause: Pause | None = None


class FieldRef(Strict):
    fieldPath: str


class ValueFrom(Strict):
    fieldRef: FieldRef | None = None
    podTemplateHashValue: Literal["Stable", "Latest"] | None = None


class Argument(Strict):
    name: str
    value: str | None = None
    valueFrom: ValueFrom | None = None


class Template(Strict):
    templateName: str


class Analysis(Strict):
    startingStep: int
    templates: list[Template]
    args: list[Argument]


class Canary(Strict):
    maxUnavailable: int | str
    maxSurge: int | str
    analysis: Analysis
    steps: list[Step]


class Strategy(Strict):
    canary: Canary


class RolloutSpec(Strict):
    replicas: int | None = None  # an autoscaler's, where there is one
    revisionHistoryLimit: int
    progressDeadlineSeconds: int
    progressDeadlineAbort: bool
    workloadRef: WorkloadRef
    strategy: Strategy


class Rollout(Resource):
    apiVersion: Literal["argoproj.io/v1alpha1"]
    spec: RolloutSpec


class PrometheusQuery(Strict):
    address: str
    query: str


class Provider(Strict):
    prometheus: PrometheusQuery


class Metric(Strict):
    name: str
    interval: str
    initialDelay: str
    failureLimit: int | str
    inconclusiveLimit: int | str | None = None
    successCondition: str
    failureCondition: str | None = None
    provider: Provider


class Parameter(Strict):
    name: str
    value: str | None = None


class AnalysisTemplateSpec(Strict):
    args: list[Parameter]
    metrics: list[Metric]


class AnalysisTemplate(Resource):
    apiVersion: Literal["argoproj.io/v1alpha1"]
    spec: AnalysisTemplateSpec


# Kubeflow Trainer


class Torch(Strict):
    """How many processes a node has is said by the TrainJob alone, from 2.2 on."""


class MLPolicy(Strict):
    numNodes: int
    torch: Torch


class JobTemplate(Strict):
    metadata: dict[str, dict[str, str]]
    spec: dict[str, Any]  # that of a batch/v1 Job: test_schema.py looks at it


class ReplicatedJob(Strict):
    name: str
    template: JobTemplate


class JobSetSpec(Strict):
    replicatedJobs: list[ReplicatedJob]


class JobSet(Strict):
    spec: JobSetSpec


class TrainingRuntimeSpec(Strict):
    mlPolicy: MLPolicy
    template: JobSet


class TrainingRuntime(Resource):
    apiVersion: Literal["trainer.kubeflow.org/v1alpha1"]
    spec: TrainingRuntimeSpec


class RuntimeRef(Strict):
    apiGroup: Literal["trainer.kubeflow.org"]
    kind: Literal["TrainingRuntime", "ClusterTrainingRuntime"]
    name: Name


class Trainer(Strict):
    numNodes: int
    numProcPerNode: int | None = Field(None, ge=1)
    command: list[str]
    args: list[str]


class TrainJobSpec(Strict):
    runtimeRef: RuntimeRef
    trainer: Trainer


class TrainJob(Resource):
    apiVersion: Literal["trainer.kubeflow.org/v1alpha1"]
    spec: TrainJobSpec
