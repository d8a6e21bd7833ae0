{{- /* Parts of pods: the server's of a Deployment or StatefulSet, and the Job's that fetches a model. */ -}}

{{- define "nemoserve.podTemplate" -}}
metadata:
  labels:
    {{- include "nemoserve.selectorLabels" . | nindent 4 }}
    {{- include "nemoserve.servesLabel" . | nindent 4 }}
    {{- with include "nemoserve.furtherLabels" (list . .Values.podLabels) }}
    {{- . | nindent 4 }}
    {{- end }}
  annotations:
    kubectl.kubernetes.io/default-container: server
    checksum/config: {{ include "nemoserve.config" . | sha256sum }}
    {{- with .Values.podAnnotations }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
spec:
  {{- include "nemoserve.podSpec" . | nindent 2 }}
  {{- with .Values.gpu.runtimeClassName }}
  runtimeClassName: {{ . }}
  {{- end }}
  # lame duck and drain are the server's answer to SIGTERM, so there is no preStop hook to wait in
  terminationGracePeriodSeconds: {{ add (ceil .Values.drain.timeoutSeconds) 5 }}
  topologySpreadConstraints:
    {{- if .Values.topologySpreadConstraints }}
    {{- toYaml .Values.topologySpreadConstraints | nindent 4 }}
    {{- else }}
    {{- range list "kubernetes.io/hostname" "topology.kubernetes.io/zone" }}
    - topologyKey: {{ . }}
      maxSkew: 1
      whenUnsatisfiable: ScheduleAnyway
      labelSelector:
        matchLabels:
          {{- include "nemoserve.selectorLabels" $ | nindent 10 }}
    {{- end }}
    {{- end }}
  containers:
    - name: server
      image: {{ include "nemoserve.image" . }}
      imagePullPolicy: {{ .Values.image.pullPolicy }}
      args: [serve, --config, /etc/nemoserve/config/nemoserve.yaml]
      env:
        {{- include "nemoserve.env" . | nindent 8 }}
        {{- with .Values.env }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
      ports:
        - {name: http-openai, containerPort: 8000, protocol: TCP}
        - {name: grpc, containerPort: 8001, protocol: TCP}
      startupProbe:
        {{- include "nemoserve.probe" (list . "ready") | nindent 8 }}
        periodSeconds: 5
        timeoutSeconds: 5
        failureThreshold: {{ add 1 (div (int (include "nemoserve.startupSeconds" .)) 5) }}
      readinessProbe:
        {{- include "nemoserve.probe" (list . "ready") | nindent 8 }}
        periodSeconds: 5
        timeoutSeconds: 5
        failureThreshold: 2
      livenessProbe:
        {{- include "nemoserve.probe" (list . "live") | nindent 8 }}
        periodSeconds: 10
        timeoutSeconds: 10
        failureThreshold: 3
      resources:
        {{- $resources := deepCopy .Values.resources }}
        {{- if ne .Values.gpu.product "none" }}
        {{- $_ := set $resources "limits" (merge (dict .Values.gpu.resource (int .Values.gpu.count)) (default dict $resources.limits)) }}
        {{- end }}
        {{- toYaml $resources | nindent 8 }}
      securityContext:
        {{- toYaml .Values.containerSecurityContext | nindent 8 }}
      # exit code and reason are the last line of the log
      terminationMessagePolicy: FallbackToLogsOnError
      volumeMounts:
        - {name: config, mountPath: /etc/nemoserve/config, readOnly: true}
        {{- include "nemoserve.storeMounts" . | nindent 8 }}
        - {name: shm, mountPath: /dev/shm}
        {{- if .Values.security.apiKeysSecret.name }}
        - {name: keys, mountPath: /etc/nemoserve/keys, readOnly: true}
        {{- end }}
        {{- if include "nemoserve.tls" . }}
        - {name: tls, mountPath: /etc/nemoserve/tls, readOnly: true}
        {{- end }}
        {{- if .Values.lora.existingClaim }}
        - name: lora
          mountPath: /lora
          readOnly: true
          {{- with .Values.lora.subPath }}
          subPath: {{ . }}
          {{- end }}
        {{- end }}
  volumes:
    - name: config
      configMap:
        name: {{ include "nemoserve.fullname" . }}
    {{- include "nemoserve.storeVolumes" . | trim | nindent 4 }}
    - name: shm
      emptyDir: {medium: Memory, sizeLimit: {{ .Values.gpu.sharedMemory }}}
    {{- with .Values.security.apiKeysSecret }}
    {{- if .name }}
    - name: keys
      secret:
        secretName: {{ .name }}
        defaultMode: 0440
        items: [{key: {{ .key }}, path: keys.yaml}]
    {{- end }}
    {{- end }}
    {{- if include "nemoserve.tls" . }}
    - name: tls
      secret:
        secretName: {{ .Values.security.tlsSecret.name }}
        defaultMode: 0440
    {{- end }}
    {{- with .Values.lora.existingClaim }}
    - name: lora
      persistentVolumeClaim:
        claimName: {{ . }}
        readOnly: true
    {{- end }}
{{- end -}}

{{- /* Who a pod runs as, and where. The Job runs where servers may, so that its volume comes into being in their zone. */ -}}
{{- define "nemoserve.podSpec" -}}
serviceAccountName: {{ include "nemoserve.serviceAccountName" . }}
automountServiceAccountToken: false
# else a Service called nemoserve-grpc would set NEMOSERVE_GRPC_PORT
enableServiceLinks: false
{{- with .Values.imagePullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
securityContext:
  {{- toYaml .Values.podSecurityContext | nindent 2 }}
{{- with .Values.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with .Values.schedulerName }}
schedulerName: {{ . }}
{{- end }}
{{- with .Values.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with include "nemoserve.affinity" . }}
affinity:
  {{- . | nindent 2 }}
{{- end }}
{{- end -}}

{{- define "nemoserve.affinity" -}}
{{- $products := .Values.gpu.productLabels -}}
{{- if not $products }}{{ $products = get (.Files.Get "files/gpus.yaml" | fromYaml) .Values.gpu.product }}{{ end -}}
{{- $affinity := dict -}}
{{- if $products -}}
{{- $term := dict "matchExpressions" (list (dict "key" "nvidia.com/gpu.product" "operator" "In" "values" $products)) -}}
{{- $required := dict "requiredDuringSchedulingIgnoredDuringExecution" (dict "nodeSelectorTerms" (list $term)) -}}
{{- $_ := set $affinity "nodeAffinity" $required -}}
{{- end -}}
{{- $affinity = merge (deepCopy .Values.affinity) (ternary dict $affinity (hasKey .Values.affinity "nodeAffinity")) -}}
{{- if $affinity }}{{ toYaml $affinity }}{{ end -}}
{{- end -}}

{{- define "nemoserve.env" -}}
- {name: NEMOSERVE_CACHE, value: /model-store}
- {name: HOME, value: /home/nemoserve}
{{- if .Values.model.offline }}
- {name: NIM_DISABLE_MODEL_DOWNLOAD, value: "1"}
{{- end }}
{{- with .Values.model.tokenSecret }}
{{- if .name }}
- name: HF_TOKEN
  valueFrom:
    secretKeyRef: {name: {{ .name }}, key: {{ .key }}}
{{- end }}
{{- end }}
{{- end -}}

{{- define "nemoserve.storeMounts" -}}
- {name: model-store, mountPath: /model-store}
- {name: home, mountPath: /home/nemoserve}
- {name: tmp, mountPath: /tmp}
{{- with .Values.extraVolumeMounts }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "nemoserve.storeVolumes" -}}
{{- if not (include "nemoserve.claimPerPod" .) }}
- name: model-store
  {{- if .Values.persistence.enabled }}
  persistentVolumeClaim:
    claimName: {{ default (printf "%s-models" (include "nemoserve.fullname" .)) .Values.persistence.existingClaim }}
  {{- else if .Values.hostPath.enabled }}
  hostPath: {path: {{ .Values.hostPath.path }}, type: DirectoryOrCreate}
  {{- else }}
  emptyDir: {}
  {{- end }}
{{- end }}
# compiled kernels
- name: home
  emptyDir: {}
- name: tmp
  emptyDir: {}
{{- with .Values.extraVolumes }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- /* kubelet's gRPC probe speaks no TLS. */ -}}
{{- define "nemoserve.probe" -}}
{{- $health := index . 1 -}}
{{- if include "nemoserve.tls" (index . 0) -}}
httpGet: {path: /v1/health/{{ $health }}, port: http-openai, scheme: HTTPS}
{{- else -}}
grpc: {port: 8001, service: nemoserve.{{ $health }}}
{{- end -}}
{{- end -}}
