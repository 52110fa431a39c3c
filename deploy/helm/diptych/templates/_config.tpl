{{/*
The YAML files that processes read with --config. What follows from the chart (ports, paths, deadlines)
stands first, settings of the user last; a setting that is in both is refused by validations.
*/}}

{{- define "diptych.tlsSettings" -}}
{{- if .Values.grpc.tls.enabled }}
tls_cert: /etc/diptych/tls/tls.crt
tls_key: /etc/diptych/tls/tls.key
tls_ca: /etc/diptych/tls/ca.crt
tls_server_name: {{ include "diptych.tlsServerName" . }}
{{- end }}
{{- end }}

{{- define "diptych.routerSettings" -}}
model: {{ include "diptych.modelPath" .Values.model | quote }}
{{- with .Values.model.servedName }}
served_model_name: {{ . | quote }}
{{- end }}
host: {{ .Values.router.config.host | default "0.0.0.0" | quote }}
port: 8000
metrics_port: 9101
{{- if include "diptych.discovers" . }}
discovery: kubernetes
kubernetes_namespace: {{ .Release.Namespace | quote }}
kubernetes_selector: "app.kubernetes.io/part-of=diptych,app.kubernetes.io/instance={{ .Release.Name }},diptych.io/role"
{{- end }}
{{- include "diptych.tlsSettings" . }}
{{- if .Values.router.tls.enabled }}
http_tls_cert: /etc/diptych/http-tls/tls.crt
http_tls_key: /etc/diptych/http-tls/tls.key
{{- end }}
{{- if .Values.router.apiKeys.enabled }}
api_keys: /etc/diptych/api-keys/keys.yaml
{{- end }}
shutdown_grace_s: {{ .Values.router.drainTimeoutSeconds }}
log_format: {{ .Values.router.config.log_format | default "json" }}
{{- with omit .Values.router.config "host" "log_format" }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{/* Empty if the user lists workers by hand, which needs no rights in the cluster. */}}
{{- define "diptych.discovers" -}}
{{- if ne (.Values.router.config.discovery | default "kubernetes") "static" }}true{{ end -}}
{{- end }}

{{/* Arguments: root, name, pool. */}}
{{- define "diptych.poolSettings" -}}
model: {{ include "diptych.modelPath" .pool.model | quote }}
{{- with .pool.model.servedName }}
served_model_name: {{ . | quote }}
{{- end }}
device: {{ .pool.config.device | default (ternary "cuda" "cpu" (gt (int .pool.gpus) 0)) }}
tensor_parallel_size: {{ .pool.tensorParallelSize }}
host: {{ .pool.config.host | default "0.0.0.0" | quote }}
port: 9001
metrics_port: 9101
{{- include "diptych.tlsSettings" .root }}
start_timeout_s: {{ .pool.startTimeoutSeconds }}
drain_timeout_s: {{ .pool.drainTimeoutSeconds }}
log_format: {{ .pool.config.log_format | default "json" }}
{{- with omit .pool.config "device" "host" "log_format" }}
{{ toYaml . }}
{{- end }}
{{- end }}
