"""Pydantic models of the operators' custom resources: of the fields that the manifests use only.

They are not the CustomResourceDefinitions. They were written by hand from those of KEDA 2.20,
Prometheus operator 0.93, Gateway API 1.6, Argo Rollouts 1.10, Kubeflow Trainer 2.3 and KServe:
names, types, enumerations, patterns and required fields. They find a misspelt or misplaced field,
not one that an operator has changed since, nor what its webhooks reject; `kubectl apply
--dry-run=server` on a cluster with the operators does.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


Name = Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$", max_length=253)]
Seconds = Annotated[
    str, Field(pattern=r"^(0|([0-9]+y)?([0-9]+w)?([0-9]+d)?([0-9]+h)?([0-9]+m)?([0-9]+s)?)$")
]
Port = Annotated[int, Field(ge=1, le=65535)]


class Metadata(Strict):
    name: Name
    namespace: Name
    labels: dict[str, str]


class Resource(Strict):
    apiVersion: str
    kind: str
    metadata: Metadata


class Selector(Strict):
    matchLabels: dict[str, str]


# Prometheus operator


class Endpoint(Strict):
    port: str
    path: str = "/metrics"
    interval: Seconds | None = None


class PodMonitorSpec(Strict):
    selector: Selector
    podMetricsEndpoints: list[Endpoint]


class PodMonitor(Resource):
    apiVersion: Literal["monitoring.coreos.com/v1"]
    spec: PodMonitorSpec


class ServiceMonitorSpec(Strict):
    selector: Selector
    endpoints: list[Endpoint]


class ServiceMonitor(Resource):
    apiVersion: Literal["monitoring.coreos.com/v1"]
    spec: ServiceMonitorSpec


class Rule(Strict):
    alert: str
    expr: str
    for_: Seconds | None = Field(None, alias="for")
    labels: dict[str, str]
    annotations: dict[str, str]


class Group(Strict):
    name: str = Field(min_length=1)
    rules: list[Rule]


class PrometheusRuleSpec(Strict):
    groups: list[Group]


class PrometheusRule(Resource):
    apiVersion: Literal["monitoring.coreos.com/v1"]
    spec: PrometheusRuleSpec


# KEDA


class Trigger(Strict):
    type: str
    metricType: Literal["AverageValue", "Value", "Utilization"]
    metadata: dict[str, str]


class Target(Strict):
    apiVersion: str | None = None
    kind: str | None = None
    name: str


class Fallback(Strict):
    failureThreshold: int
    replicas: int
    behavior: Literal[
        "static", "currentReplicas", "currentReplicasIfHigher", "currentReplicasIfLower"
    ] = "static"


class Advanced(Strict):
    horizontalPodAutoscalerConfig: dict[str, Any]  # an autoscaling/v2 HPA; test_schema.py checks it


class ScaledObjectSpec(Strict):
    scaleTargetRef: Target
    minReplicaCount: int
    maxReplicaCount: int
    pollingInterval: int
    cooldownPeriod: int
    fallback: Fallback
    advanced: Advanced
    triggers: list[Trigger]


class ScaledObject(Resource):
    apiVersion: Literal["keda.sh/v1alpha1"]
    spec: ScaledObjectSpec


# Gateway API


class Parent(Strict):
    group: str
    kind: str
    name: Name
    namespace: Name


class PathMatch(Strict):
    type: Literal["Exact", "PathPrefix", "RegularExpression"]
    value: str = Field(max_length=1024)


class Match(Strict):
    path: PathMatch


class Timeouts(Strict):
    request: str = Field(pattern=r"^([0-9]{1,5}(h|m|s|ms)){1,4}$")


class Backend(Strict):
    group: str
    kind: str
    name: Name
    port: Port
    weight: int


class RouteRule(Strict):
    matches: list[Match]
    timeouts: Timeouts
    backendRefs: list[Backend]


class HTTPRouteSpec(Strict):
    parentRefs: list[Parent]
    hostnames: list[Name]
    rules: list[RouteRule]


class HTTPRoute(Resource):
    apiVersion: Literal["gateway.networking.k8s.io/v1"]
    spec: HTTPRouteSpec


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
    replicas: int | None = None  # unset where an autoscaler sets it
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
    """Empty: from 2.2 on the TrainJob alone sets the processes per node."""


class MLPolicy(Strict):
    numNodes: int
    torch: Torch


class JobTemplate(Strict):
    metadata: dict[str, dict[str, str]]
    spec: dict[str, Any]  # a batch/v1 Job; test_schema.py checks it


class ReplicatedJob(Strict):
    name: str
    groupName: str
    replicas: int
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


# KServe


class ModelFormat(Strict):
    name: str
    version: str
    autoSelect: bool | None = None


class ServingRuntimeSpec(Strict):
    annotations: dict[str, str]
    supportedModelFormats: list[ModelFormat]
    protocolVersions: list[Literal["v1", "v2", "grpc-v2"]]
    containers: list[dict[str, Any]]  # of a pod; test_kserve.py checks them
    volumes: list[dict[str, Any]]


class ServingRuntime(Resource):
    apiVersion: Literal["serving.kserve.io/v1alpha1"]
    spec: ServingRuntimeSpec


class PredictorModel(Strict):
    modelFormat: ModelFormat
    runtime: Name
    protocolVersion: Literal["v1", "v2", "grpc-v2"]
    storageUri: str


class Predictor(Strict):
    minReplicas: int
    maxReplicas: int
    serviceAccountName: Name
    model: PredictorModel


class InferenceServiceSpec(Strict):
    predictor: Predictor


class AnnotatedMetadata(Metadata):
    annotations: dict[str, str]


class InferenceService(Resource):
    apiVersion: Literal["serving.kserve.io/v1beta1"]
    metadata: AnnotatedMetadata
    spec: InferenceServiceSpec


def custom_resource_models() -> dict[str, type[Resource]]:
    """The model of each custom resource by its kind."""
    return {model.__name__: model for model in Resource.__subclasses__()}
