{{- /* The operator: names, labels, and what the cluster must be asked for it. */ -}}

{{- define "nemoserve.operatorName" -}}
{{ include "nemoserve.fullname" . }}-autoscaler
{{- end -}}

{{- define "nemoserve.operatorLabels" -}}
{{ include "nemoserve.releaseLabels" . }}
app.kubernetes.io/component: autoscaler
{{- end -}}

{{- define "nemoserve.operatorChecks" -}}
{{- if include "nemoserve.hasOperator" . -}}
{{- if and .Release.IsUpgrade (not (.Capabilities.APIVersions.Has "autoscaling.nemoserve.dev/v1alpha1")) -}}
{{- fail "autoscaling.kind: queue needs the definition of QueueAutoscaler, which helm brings on install alone: kubectl apply --server-side --filename deploy/crds" -}}
{{- end -}}
{{- include "nemoserve.labelCheck" . -}}
{{- end -}}
{{- end -}}

{{- /* Services that chose pods by a label which these do not bear yet would be left without endpoints. */ -}}
{{- define "nemoserve.labelCheck" -}}
{{- $kind := ternary "StatefulSet" "Deployment" .Values.statefulSet.enabled -}}
{{- $service := lookup "v1" "Service" .Release.Namespace (include "nemoserve.fullname" .) -}}
{{- $servers := lookup "apps/v1" $kind .Release.Namespace (include "nemoserve.fullname" .) -}}
{{- if and $service $servers (not (hasKey $service.spec.selector "nemoserve.dev/serves")) -}}
{{- $labelled := hasKey $servers.spec.template.metadata.labels "nemoserve.dev/serves" -}}
{{- $status := default dict $servers.status -}}
{{- if not (and $labelled (ge (default 0 $status.updatedReplicas | int) (default 0 $status.replicas | int))) -}}
{{- fail "autoscaling.kind: queue chooses servers by the label nemoserve.dev/serves, and there are some without it: upgrade to this version of the chart with autoscaling.enabled=false first, wait for kubectl rollout status, then turn it on" -}}
{{- end -}}
{{- end -}}
{{- end -}}
