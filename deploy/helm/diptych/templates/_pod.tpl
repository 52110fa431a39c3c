{{/* Parts of pods, and the one template of all workers' pods. */}}

{{- define "diptych.podSecurity" -}}
{{- range $key := list "runAsNonRoot" "runAsUser" "runAsGroup" "fsGroup" }}
{{- $value := get $.Values.podSecurityContext $key }}
{{- if not (kindIs "invalid" $value) }}
{{ $key }}: {{ if kindIs "bool" $value }}{{ $value }}{{ else }}{{ int64 $value }}{{ end }}
{{- end }}
{{- end }}
{{- if not (kindIs "invalid" .Values.podSecurityContext.fsGroup) }}
# A volume with a large model is not walked through at every start.
fsGroupChangePolicy: OnRootMismatch
{{- end }}
seccompProfile: {type: RuntimeDefault}
{{- end }}

{{/* Argument: rdma of a pool, or nothing. */}}
{{- define "diptych.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
  {{- if .enabled }}
  add: [IPC_LOCK]
  {{- end }}
{{- if and .enabled .runAsRoot }}
runAsNonRoot: false
runAsUser: 0
{{- end }}
{{- end }}

{{/* The root file system is read-only: whatever a library caches goes to volumes. Some ask for the user's
name, which no file in the image knows. */}}
{{- define "diptych.homeEnv" -}}
- {name: USER, value: diptych}
- {name: HOME, value: /cache}
- {name: XDG_CACHE_HOME, value: /cache}
- {name: TMPDIR, value: /tmp}
{{- end }}

{{/* Arguments: root, variable (prefix of the process's settings). */}}
{{- define "diptych.tokenEnv" -}}
{{- if .root.Values.grpc.auth.enabled -}}
- name: {{ .variable }}_AUTH_TOKEN
  valueFrom: {secretKeyRef: {name: {{ include "diptych.authSecret" .root }}, key: {{ include "diptych.authSecretKey" .root | quote }}}}
{{- end -}}
{{- end }}

{{/* A sleep before the process is told to stop. Arguments: root, seconds. */}}
{{- define "diptych.preStop" -}}
{{- if .seconds -}}
lifecycle:
  preStop:
    {{- if semverCompare ">=1.30.0-0" .root.Capabilities.KubeVersion.Version }}
    sleep: {seconds: {{ .seconds }}}
    {{- else }}
    exec: {command: [sleep, {{ .seconds | quote }}]}
    {{- end }}
{{- end -}}
{{- end }}

{{/* What SIGTERM and preStop need, 15 s in which processes end, and as much for those that wait for them
on other nodes. Argument: router or a pool. */}}
{{- define "diptych.gracePeriod" -}}
{{- $end := ternary 30 15 (gt (int .nodes) 1) -}}
{{- .terminationGracePeriodSeconds | default (add .preStopSeconds .drainTimeoutSeconds $end) -}}
{{- end }}

{{/* Where pods may run. Arguments: place (router or pool), selector, affinity. */}}
{{- define "diptych.scheduling" -}}
{{- with .place.priorityClassName }}
priorityClassName: {{ . | quote }}
{{- end }}
{{- with .place.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .place.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .place.topologySpreadConstraints }}
topologySpreadConstraints:
  {{- range . }}
  {{- $own := dict "labelSelector" (dict "matchLabels" (fromYaml $.selector)) }}
  - {{ toYaml (merge (deepCopy .) $own) | nindent 4 | trim }}
  {{- end }}
{{- end }}
{{- end }}

{{/* The pool's affinity, and that to the release's other workers as YAML. Arguments: root, pool. */}}
{{- define "diptych.poolAffinity" -}}
{{- $affinity := deepCopy .pool.affinity -}}
{{- $mode := .root.Values.sameZone.mode -}}
{{- if ne $mode "none" -}}
{{- /* The term matches the pod itself, so that the first one of all can be placed. */ -}}
{{- $selector := include "diptych.anyWorkerSelector" .root | fromYaml -}}
{{- $term := dict "topologyKey" .root.Values.sameZone.topologyKey "labelSelector" $selector -}}
{{- if eq $mode "required" -}}
{{- $_ := set $affinity "podAffinity" (dict "requiredDuringSchedulingIgnoredDuringExecution" (list $term)) -}}
{{- else -}}
{{- $weighted := dict "weight" 100 "podAffinityTerm" $term -}}
{{- $_ := set $affinity "podAffinity" (dict "preferredDuringSchedulingIgnoredDuringExecution" (list $weighted)) -}}
{{- end -}}
{{- end -}}
{{- toYaml $affinity -}}
{{- end }}

{{/*
A pod of a pool. Arguments: root, name, pool, part (`single`, or `leader` and `follower` of a worker on
several nodes).
*/}}
{{- define "diptych.workerPod" -}}
{{- $root := .root }}
{{- $pool := .pool }}
{{- $variable := printf "DIPTYCH_%s" (upper $pool.role) }}
{{- $selector := include "diptych.poolSelector" . }}
metadata:
  labels:
    {{- $selector | nindent 4 }}
    {{- include "diptych.podLabels" $root | nindent 4 }}
    {{- with $pool.podLabels }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  annotations:
    checksum/config: {{ include "diptych.poolSettings" . | sha256sum }}
    {{- with include "diptych.secretsChecksum" $root }}
    {{- . | nindent 4 }}
    {{- end }}
    {{- with $pool.podAnnotations }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
spec:
  serviceAccountName: {{ include "diptych.workerAccount" $root }}
  automountServiceAccountToken: false
  # Variables that Kubernetes adds for Services would be taken for settings, and refused.
  enableServiceLinks: false
  terminationGracePeriodSeconds: {{ include "diptych.gracePeriod" $pool }}
  {{- if $pool.hostIPC }}
  hostIPC: true
  {{- end }}
  {{- with $root.Values.imagePullSecrets }}
  imagePullSecrets:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with $pool.runtimeClassName }}
  runtimeClassName: {{ . | quote }}
  {{- end }}
  {{- with $pool.schedulerName }}
  schedulerName: {{ . | quote }}
  {{- end }}
  securityContext:
    {{- include "diptych.podSecurity" $root | trim | nindent 4 }}
  {{- $affinity := include "diptych.poolAffinity" . | fromYaml }}
  {{- include "diptych.scheduling" (dict "place" $pool "selector" $selector "affinity" $affinity) | trim | nindent 2 }}
  {{- with include "diptych.modelDownload" (dict "root" $root "model" $pool.model "image" $pool.image "resources" $pool.resources "exclude" list) }}
  initContainers:
    {{- . | nindent 4 }}
  {{- end }}
  containers:
    - name: worker
      image: {{ include "diptych.image" (dict "root" $root "image" $pool.image) }}
      imagePullPolicy: {{ $root.Values.image.pullPolicy }}
      command: [diptych, {{ $pool.role }}]
      args:
        - --config=/etc/diptych/config.yaml
        {{- if ne .part "single" }}
        - --nodes=$(LWS_GROUP_SIZE)
        - --node-rank=$(LWS_WORKER_INDEX)
        - --leader-address=$(LWS_LEADER_ADDRESS):9001
        {{- end }}
        {{- range $pool.extraArgs }}
        - {{ . | quote }}
        {{- end }}
      env:
        - {name: {{ $variable }}_WORKER_ID, valueFrom: {fieldRef: {fieldPath: metadata.name}}}
        - {name: {{ $variable }}_ADVERTISE_HOST, valueFrom: {fieldRef: {fieldPath: status.podIP}}}
        - {name: {{ $variable }}_NODE, valueFrom: {fieldRef: {fieldPath: spec.nodeName}}}
        {{- if and (not $pool.gpus) (not (hasKey $pool.config "num_threads")) (dig "limits" "cpu" "" $pool.resources) }}
        # Not every core of the node that it may run on, but as many as its quota lasts for.
        - {name: {{ $variable }}_NUM_THREADS, valueFrom: {resourceFieldRef: {containerName: worker, resource: limits.cpu}}}
        {{- end }}
        {{- with include "diptych.tokenEnv" (dict "root" $root "variable" $variable) }}
        {{- . | nindent 8 }}
        {{- end }}
        {{- include "diptych.homeEnv" $root | nindent 8 }}
        - {name: FLASHINFER_WORKSPACE_BASE, value: /cache}
        {{- with $pool.extraEnv }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
      ports:
        - {name: grpc, containerPort: 9001}
        - {name: metrics, containerPort: 9101}
      {{- include "diptych.workerProbes" . | nindent 6 }}
      {{- with include "diptych.preStop" (dict "root" $root "seconds" $pool.preStopSeconds) }}
      {{- . | nindent 6 }}
      {{- end }}
      securityContext:
        {{- include "diptych.containerSecurity" $pool.rdma | nindent 8 }}
      resources:
        {{- include "diptych.workerResources" $pool | nindent 8 }}
      volumeMounts:
        - {name: config, mountPath: /etc/diptych/config.yaml, subPath: config.yaml, readOnly: true}
        {{- if $root.Values.grpc.tls.enabled }}
        - {name: tls, mountPath: /etc/diptych/tls, readOnly: true}
        {{- end }}
        {{- with include "diptych.modelMount" $pool.model }}
        {{- . | nindent 8 }}
        {{- end }}
        - {name: cache, mountPath: /cache}
        - {name: tmp, mountPath: /tmp}
        {{- if $pool.shmSize }}
        - {name: shm, mountPath: /dev/shm}
        {{- end }}
        {{- with $pool.extraVolumeMounts }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
  volumes:
    - name: config
      configMap: {name: {{ include "diptych.fullname" $root }}-{{ .name }}}
    {{- if $root.Values.grpc.tls.enabled }}
    - name: tls
      secret: {secretName: {{ include "diptych.tlsSecret" $root }}, defaultMode: 0440}
    {{- end }}
    {{- with include "diptych.modelVolume" $pool.model }}
    {{- . | nindent 4 }}
    {{- end }}
    - name: cache
      {{- if $pool.cacheClaim }}
      persistentVolumeClaim: {claimName: {{ $pool.cacheClaim | quote }}}
      {{- else if $pool.cacheSizeLimit }}
      emptyDir: {sizeLimit: {{ $pool.cacheSizeLimit | quote }}}
      {{- else }}
      emptyDir: {}
      {{- end }}
    - name: tmp
      emptyDir: {}
    {{- with $pool.shmSize }}
    - name: shm
      emptyDir: {medium: Memory, sizeLimit: {{ . | quote }}}
    {{- end }}
    {{- with $pool.extraVolumes }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
{{- end }}

{{/*
Alive is an engine loop that turns, which only /healthz knows; ready is a worker that would admit. The
long wait for the model belongs to the startup probe alone. A kubelet has no certificate for a gRPC port
with TLS, and a follower serves nobody by gRPC. Arguments: those of workerPod.
*/}}
{{- define "diptych.workerProbes" -}}
startupProbe:
  {{- if or .root.Values.grpc.tls.enabled (eq .part "follower") }}
  httpGet: {path: /readyz, port: metrics}
  {{- else }}
  grpc: {port: 9001}
  {{- end }}
  periodSeconds: 5
  timeoutSeconds: 5
  failureThreshold: {{ add 1 (ceil (divf .pool.startTimeoutSeconds 5)) }}
livenessProbe:
  httpGet: {path: /healthz, port: metrics}
  periodSeconds: 10
  timeoutSeconds: 5
  failureThreshold: 3
readinessProbe:
  httpGet: {path: /readyz, port: metrics}
  periodSeconds: 5
  timeoutSeconds: 5
  failureThreshold: 2
{{- end }}

{{/* Argument: pool. */}}
{{- define "diptych.workerResources" -}}
{{- $resources := deepCopy .resources -}}
{{- $devices := dict -}}
{{- if .gpus }}{{ $_ := set $devices .gpuResource (int .gpus) }}{{ end -}}
{{- if .rdma.enabled }}{{ $_ := set $devices .rdma.resource (int .rdma.count) }}{{ end -}}
{{- range $field := list "requests" "limits" -}}
{{- if $devices -}}
{{- $_ := set $resources $field (merge (get $resources $field | default dict) $devices) -}}
{{- end -}}
{{- end -}}
{{- toYaml $resources -}}
{{- end }}

{{/* Lets pods restart when a token given in values changes; one kept in the cluster can't be seen here. */}}
{{- define "diptych.secretsChecksum" -}}
{{- with .Values.grpc.auth.token -}}
checksum/token: {{ printf "%s %s" $.Release.Name . | sha256sum }}
{{- end -}}
{{- end }}
