{{/* Names, labels and images. Whatever one object needs to know of another is named here. */}}

{{- define "diptych.name" -}}
{{- .Values.nameOverride | default .Chart.Name | trunc 63 | trimSuffix "-" -}}
{{- end }}

{{/* At most 40 characters: pools add their names to it. */}}
{{- define "diptych.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- $name := include "diptych.name" . -}}
{{- $full := contains $name .Release.Name | ternary .Release.Name (printf "%s-%s" .Release.Name $name) -}}
{{- $full | trunc 40 | trimSuffix "-" -}}
{{- end -}}
{{- end }}

{{/* Labels that never change: selectors are made of these. */}}
{{- define "diptych.selectorLabels" -}}
app.kubernetes.io/name: {{ include "diptych.name" . }}
app.kubernetes.io/instance: {{ .Release.Name | quote }}
{{- end }}

{{- define "diptych.labels" -}}
{{ include "diptych.selectorLabels" . }}
app.kubernetes.io/part-of: diptych
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- with .Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{/* What pods have beside their selectors: nothing that changes with the chart, which would restart them. */}}
{{- define "diptych.podLabels" -}}
app.kubernetes.io/part-of: diptych
{{- with .Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- define "diptych.routerSelector" -}}
{{ include "diptych.selectorLabels" . }}
app.kubernetes.io/component: router
{{- end }}

{{/* Of a pool's pods. Arguments: root, name, pool. */}}
{{- define "diptych.poolSelector" -}}
{{ include "diptych.selectorLabels" .root }}
app.kubernetes.io/component: {{ .pool.role }}
diptych.io/role: {{ .pool.role }}
diptych.io/pool: {{ .name | quote }}
{{- end }}

{{/* Selects the pods of every pool of the release. */}}
{{- define "diptych.anyWorkerSelector" -}}
matchLabels:
  {{- include "diptych.selectorLabels" . | nindent 2 }}
matchExpressions:
  - {key: diptych.io/role, operator: Exists}
{{- end }}

{{/* A pool with its defaults filled in, as JSON. Arguments: root, name. */}}
{{- define "diptych.pool" -}}
{{- $own := get .root.Values.pools .name -}}
{{- $pool := mergeOverwrite (deepCopy .root.Values.poolDefaults) (deepCopy $own) -}}
{{- $_ := set $pool "model" (mergeOverwrite (deepCopy .root.Values.model) (deepCopy $pool.model)) -}}
{{- if not $pool.tensorParallelSize -}}
{{- $_ := set $pool "tensorParallelSize" (mul (max 1 $pool.gpus) $pool.nodes) -}}
{{- end -}}
{{- toJson $pool -}}
{{- end }}

{{/* Arguments: root, image. */}}
{{- define "diptych.image" -}}
{{- $name := .image.repository -}}
{{- with .root.Values.image.registry }}{{ $name = printf "%s/%s" (trimSuffix "/" .) $name }}{{ end -}}
{{- if .image.digest -}}
{{ $name }}@{{ .image.digest }}
{{- else -}}
{{ $name }}:{{ .image.tag | default .root.Chart.AppVersion }}
{{- end -}}
{{- end }}

{{- define "diptych.routerAccount" -}}
{{- .Values.serviceAccount.routerName | default (.Values.serviceAccount.create | ternary (printf "%s-router" (include "diptych.fullname" .)) "default") -}}
{{- end }}

{{- define "diptych.workerAccount" -}}
{{- .Values.serviceAccount.workerName | default (.Values.serviceAccount.create | ternary (printf "%s-worker" (include "diptych.fullname" .)) "default") -}}
{{- end }}

{{- define "diptych.authSecret" -}}
{{- .Values.grpc.auth.existingSecret | default (printf "%s-grpc-token" (include "diptych.fullname" .)) -}}
{{- end }}

{{- define "diptych.authSecretKey" -}}
{{- if .Values.grpc.auth.existingSecret }}{{ .Values.grpc.auth.secretKey }}{{ else }}token{{ end -}}
{{- end }}

{{- define "diptych.tlsSecret" -}}
{{- .Values.grpc.tls.existingSecret | default (printf "%s-grpc-tls" (include "diptych.fullname" .)) -}}
{{- end }}

{{/* The name that the certificate of all workers bears. Clients check it instead of pods' addresses. */}}
{{- define "diptych.tlsServerName" -}}
workers.{{ include "diptych.fullname" . }}
{{- end }}

{{- define "diptych.httpTlsSecret" -}}
{{- .Values.router.tls.existingSecret | default (printf "%s-http-tls" (include "diptych.fullname" .)) -}}
{{- end }}

{{- define "diptych.apiKeysSecret" -}}
{{- .Values.router.apiKeys.existingSecret | default (printf "%s-api-keys" (include "diptych.fullname" .)) -}}
{{- end }}

{{/* Where one plain key is, for what must get in itself; empty if none is needed or known. */}}
{{- define "diptych.plainKeySecret" -}}
{{- if .Values.router.apiKeys.enabled -}}
{{- if .Values.router.apiKeys.existingSecret -}}
{{ .Values.router.apiKeys.plainKeySecret }}
{{- else -}}
{{ include "diptych.apiKeysSecret" . }}
{{- end -}}
{{- end -}}
{{- end }}

{{/* Of a pool's Deployment or LeaderWorkerSet. The controller of the latter makes a Service of its name,
which must not be the pool's own. Arguments: root, name, pool. */}}
{{- define "diptych.poolWorkload" -}}
{{ include "diptych.fullname" .root }}-{{ .name }}{{ if gt (int .pool.nodes) 1 }}-group{{ end }}
{{- end }}

{{/* Not empty if `diptych autoscale` scales a pool. */}}
{{- define "diptych.controlled" -}}
{{- range $name, $own := .Values.pools -}}
{{- if $own -}}
{{- $scaling := (include "diptych.pool" (dict "root" $ "name" $name) | fromJson).autoscaling -}}
{{- if and $scaling.enabled (eq $scaling.kind "controller") }}true{{ end -}}
{{- end -}}
{{- end -}}
{{- end }}
