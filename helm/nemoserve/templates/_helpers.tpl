{{- /* Names, labels, and what is worked out from values. */ -}}

{{- define "nemoserve.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 53 | trimSuffix "-" -}}
{{- end -}}

{{- /* 52 letters: a StatefulSet's pods bear a label of its name with a hash of ten and a dash behind it. */ -}}
{{- define "nemoserve.fullname" -}}
{{- $name := include "nemoserve.name" . -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 52 | trimSuffix "-" -}}
{{- else if contains $name .Release.Name -}}
{{- .Release.Name | trunc 52 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name $name | trunc 52 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- /* Of what never changes in the life of a release: selectors and volume claim templates are immutable. */ -}}
{{- define "nemoserve.releaseLabels" -}}
app.kubernetes.io/name: {{ include "nemoserve.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "nemoserve.selectorLabels" -}}
{{ include "nemoserve.releaseLabels" . }}
app.kubernetes.io/component: server
{{- end -}}

{{- /* Every server is born with it. The operator takes it from those that drain, and bears it while it holds requests. */ -}}
{{- define "nemoserve.servesLabel" -}}
nemoserve.dev/serves: {{ include "nemoserve.fullname" . }}
{{- end -}}

{{- /* What Services choose: not all at once, a release of before may have pods without the label (nemoserve.checks). */ -}}
{{- define "nemoserve.endpointLabels" -}}
{{- if include "nemoserve.hasOperator" . }}{{ include "nemoserve.servesLabel" . }}{{ else }}{{ include "nemoserve.selectorLabels" . }}{{ end -}}
{{- end -}}

{{- define "nemoserve.hasOperator" -}}
{{- if and .Values.autoscaling.enabled (eq .Values.autoscaling.kind "queue") }}true{{ end -}}
{{- end -}}

{{- define "nemoserve.labels" -}}
{{ include "nemoserve.labelsWith" (list . dict) }}
{{- end -}}

{{- /* Those of an object that has some of its own. */ -}}
{{- define "nemoserve.labelsWith" -}}
{{- with index . 0 -}}
{{ include "nemoserve.releaseLabels" . }}
app.kubernetes.io/part-of: nemoserve
app.kubernetes.io/managed-by: {{ .Release.Service }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end }}
{{- with include "nemoserve.furtherLabels" . }}
{{ . }}
{{- end }}
{{- end -}}

{{- /* Those that are not ours: of this object or pod, and of all. */ -}}
{{- define "nemoserve.furtherLabels" -}}
{{- with merge dict (index . 1) (index . 0).Values.commonLabels }}{{ toYaml . }}{{ end -}}
{{- end -}}

{{- define "nemoserve.serviceAccountName" -}}
{{- if .Values.serviceAccount.create -}}
{{- default (include "nemoserve.fullname" .) .Values.serviceAccount.name -}}
{{- else -}}
{{- default "default" .Values.serviceAccount.name -}}
{{- end -}}
{{- end -}}

{{- define "nemoserve.image" -}}
{{- include "nemoserve.imageOf" (list . .Values.image (ternary "-cpu" "" (eq .Values.gpu.product "none"))) -}}
{{- end -}}

{{- define "nemoserve.imageOf" -}}
{{- $root := index . 0 -}}
{{- $suffix := index . 2 -}}
{{- with index . 1 -}}
{{- $repository := default $root.Values.image.repository .repository -}}
{{- if .digest -}}
{{- printf "%s@%s" $repository .digest -}}
{{- else -}}
{{- printf "%s:%s" $repository (default (print $root.Chart.AppVersion $suffix) .tag) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "nemoserve.model" -}}
{{- $default := ternary "smollm2-135m-instruct" "mistral-nemo-12b-instruct-fp8" (eq .Values.gpu.product "none") -}}
{{- default $default .Values.model.name -}}
{{- end -}}

{{- /* As the server calls it where servedName does not say: a catalogue's whole name, a repository's or folder's last part. */ -}}
{{- define "nemoserve.servedAs" -}}
{{- $model := include "nemoserve.model" . -}}
{{- $short := get (.Files.Get "files/models.yaml" | fromYaml) "short" -}}
{{- if hasPrefix "hf://" $model -}}
{{- regexReplaceAll "@.*$" $model "" | base | lower -}}
{{- else if hasPrefix "/" $model -}}
{{- base $model -}}
{{- else -}}
{{- get $short $model | default $model -}}
{{- end -}}
{{- end -}}

{{- /* fp8 where tensor cores multiply it, fp8-weight-only where they do not; elsewhere the file has the say. */ -}}
{{- define "nemoserve.precision" -}}
{{- if ne .Values.model.precision "byNode" -}}
{{- .Values.model.precision -}}
{{- else if has .Values.gpu.product (list "h100" "h200") -}}
fp8
{{- else if eq .Values.gpu.product "a100" -}}
fp8-weight-only
{{- else -}}
auto
{{- end -}}
{{- end -}}

{{- define "nemoserve.tls" -}}
{{- if .Values.security.tlsSecret.name }}true{{ end -}}
{{- end -}}

{{- /* What `serve --config` reads: settings by name. */ -}}
{{- define "nemoserve.config" -}}
{{- $config := dict
  "model" (include "nemoserve.model" .)
  "device" (ternary "cpu" "cuda" (eq .Values.gpu.product "none"))
  "precision" (include "nemoserve.precision" .)
  "kv_precision" .Values.model.kvPrecision
  "host" "0.0.0.0"
  "http_port" "8000"
  "grpc_port" "8001"
  "log_level" .Values.model.logLevel
  "log_json" .Values.model.jsonLogging
  "lame_duck" .Values.drain.lameDuckSeconds
  "drain_timeout" .Values.drain.timeoutSeconds
-}}
{{- with .Values.model.servedName }}{{ $_ := set $config "served_model_name" . }}{{ end -}}
{{- if gt (int .Values.gpu.count) 1 }}{{ $_ := set $config "tensor_parallel_size" .Values.gpu.count }}{{ end -}}
{{- if .Values.security.apiKeysSecret.name -}}
{{- $_ := set $config "api_keys_file" "/etc/nemoserve/keys/keys.yaml" -}}
{{- if .Values.metrics.withoutKey }}{{ $_ := set $config "metrics_without_key" true }}{{ end -}}
{{- else -}}
{{- $_ := set $config "allow_anonymous" true -}}
{{- end -}}
{{- if include "nemoserve.tls" . -}}
{{- $_ := set $config "tls_cert" "/etc/nemoserve/tls/tls.crt" -}}
{{- $_ := set $config "tls_key" "/etc/nemoserve/tls/tls.key" -}}
{{- end -}}
{{- if .Values.lora.existingClaim -}}
{{- $_ := set $config "lora_dir" "/lora" -}}
{{- $_ := set $config "lora_refresh" .Values.lora.refreshSeconds -}}
{{- end -}}
{{- with .Values.tracing.otlpEndpoint }}{{ $_ := set $config "otlp_endpoint" . }}{{ end -}}
{{- range $name, $value := merge $config .Values.settings }}
{{ $name }}: {{ include "nemoserve.scalar" $value | quote }}
{{- end -}}
{{- end -}}

{{- /* Numbers of values are floats: 16777216 would be printed as 1.6777216e+07. */ -}}
{{- define "nemoserve.scalar" -}}
{{- if and (kindIs "float64" .) (eq . (floor .)) }}{{ int64 . }}{{ else }}{{ . }}{{ end -}}
{{- end -}}

{{- define "nemoserve.fetches" -}}
{{- if not (or .Values.model.offline (hasPrefix "/" (include "nemoserve.model" .))) }}true{{ end -}}
{{- end -}}

{{- define "nemoserve.claimPerPod" -}}
{{- if and .Values.persistence.enabled .Values.statefulSet.enabled (not .Values.persistence.existingClaim) }}true{{ end -}}
{{- end -}}

{{- define "nemoserve.claimSpec" -}}
accessModes:
  - {{ default (ternary "ReadWriteOnce" "ReadWriteMany" .Values.statefulSet.enabled) .Values.persistence.accessMode }}
{{- with .Values.persistence.storageClass }}
storageClassName: {{ . }}
{{- end }}
resources:
  requests:
    storage: {{ .Values.persistence.size }}
{{- end -}}

{{- /* Seconds from the start of a container to ready: a minute or two of warm-up and compiling, a model that is fetched and
read at the least speeds. Models without a name or a size count as the largest that has one. */ -}}
{{- define "nemoserve.startupSeconds" -}}
{{- if .Values.startup.seconds -}}
{{- int .Values.startup.seconds -}}
{{- else -}}
{{- $sizes := get (.Files.Get "files/models.yaml" | fromYaml) "mebibytes" -}}
{{- $model := include "nemoserve.servedAs" . -}}
{{- $mebibytes := 0 -}}
{{- if .Values.model.sizeGiB -}}
{{- $mebibytes = mulf .Values.model.sizeGiB 1024 | ceil | int -}}
{{- else if hasKey $sizes $model -}}
{{- $mebibytes = get $sizes $model | int -}}
{{- else -}}
{{- range $size := values $sizes }}{{ $mebibytes = max $mebibytes (int $size) }}{{ end -}}
{{- end -}}
{{- $seconds := add 180 (div $mebibytes (int .Values.startup.readMiBps)) -}}
{{- if include "nemoserve.fetches" . -}}
{{- $seconds = add $seconds (div $mebibytes (int .Values.startup.downloadMiBps)) -}}
{{- end -}}
{{- $seconds -}}
{{- end -}}
{{- end -}}

{{- /* What schemas cannot compare. */ -}}
{{- define "nemoserve.checks" -}}
{{- if .Values.multiNode.enabled -}}
{{- fail "multiNode.enabled: a server runs on one node, LeaderWorkerSets and MPIJobs are not supported; use gpu.count for several GPUs of a node" -}}
{{- end -}}
{{- if gt (float64 .Values.drain.lameDuckSeconds) (float64 .Values.drain.timeoutSeconds) -}}
{{- fail (printf "drain.lameDuckSeconds: %v must be at most the %v of drain.timeoutSeconds, which include it" .Values.drain.lameDuckSeconds .Values.drain.timeoutSeconds) -}}
{{- end -}}
{{- with .Values.autoscaling -}}
{{- if gt (int .minReplicas) (int .maxReplicas) -}}
{{- fail (printf "autoscaling.minReplicas: %v must be at most the %v of autoscaling.maxReplicas" .minReplicas .maxReplicas) -}}
{{- end -}}
{{- range .schedules -}}
{{- if gt (int .minReplicas) (int $.Values.autoscaling.maxReplicas) -}}
{{- fail (printf "autoscaling.schedules: minReplicas: %v must be at most the %v of autoscaling.maxReplicas" .minReplicas $.Values.autoscaling.maxReplicas) -}}
{{- end -}}
{{- end -}}
{{- if gt (float64 (default 0 .target.queueWaitSeconds)) (float64 .target.ttftSeconds) -}}
{{- fail (printf "autoscaling.target.queueWaitSeconds: %v must be at most the %v of autoscaling.target.ttftSeconds, which include it" .target.queueWaitSeconds .target.ttftSeconds) -}}
{{- end -}}
{{- end -}}
{{- include "nemoserve.operatorChecks" . -}}
{{- end -}}
