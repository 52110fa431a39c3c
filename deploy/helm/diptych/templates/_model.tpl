{{/* Where the model comes from, and how it gets into a pod. Argument of all but the last two: model. */}}

{{- define "diptych.modelPath" -}}
{{- if eq .source "demo" -}}
demo
{{- else if eq .source "pvc" -}}
{{ trimSuffix "/" (printf "/models/%s" (trimPrefix "/" .pvc.path)) }}
{{- else if eq .source "image" -}}
{{ trimSuffix "/" (printf "/models/%s" (trimPrefix "/" .image.path)) }}
{{- else -}}
/models/{{ base .huggingface.repo }}
{{- end -}}
{{- end }}

{{- define "diptych.modelMount" -}}
{{- if ne .source "demo" -}}
- name: model
  mountPath: /models
  readOnly: true
{{- end -}}
{{- end }}

{{- define "diptych.modelVolume" -}}
{{- if eq .source "pvc" -}}
- name: model
  persistentVolumeClaim: {claimName: {{ .pvc.claimName | quote }}, readOnly: true}
{{- else if eq .source "image" -}}
- name: model
  image: {reference: {{ .image.reference | quote }}}
{{- else if eq .source "huggingface" -}}
- name: model
  {{- if .huggingface.existingClaim }}
  persistentVolumeClaim: {claimName: {{ .huggingface.existingClaim | quote }}}
  {{- else if .huggingface.sizeLimit }}
  emptyDir: {sizeLimit: {{ .huggingface.sizeLimit | quote }}}
  {{- else }}
  emptyDir: {}
  {{- end }}
{{- end -}}
{{- end }}

{{/* Downloads a model with the client that every image of ours has. Arguments: root, model, image,
resources, exclude (more patterns). */}}
{{- define "diptych.modelDownload" -}}
{{- if eq .model.source "huggingface" -}}
- name: download-model
  image: {{ include "diptych.image" (dict "root" .root "image" .image) }}
  imagePullPolicy: {{ .root.Values.image.pullPolicy }}
  command:
    - hf
    - download
    - {{ .model.huggingface.repo | quote }}
    - {{ printf "--revision=%s" .model.huggingface.revision | quote }}
    - {{ printf "--local-dir=%s" (include "diptych.modelPath" .model) | quote }}
    {{- range concat .model.huggingface.exclude .exclude }}
    - {{ printf "--exclude=%s" . | quote }}
    {{- end }}
  env:
    {{- include "diptych.homeEnv" . | nindent 4 }}
    {{- with .model.huggingface.existingSecret }}
    - name: HF_TOKEN
      valueFrom: {secretKeyRef: {name: {{ . | quote }}, key: {{ $.model.huggingface.secretKey | quote }}}}
    {{- end }}
    {{- with .model.huggingface.extraEnv }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  securityContext:
    {{- include "diptych.containerSecurity" (dict) | nindent 4 }}
  {{- with .resources }}
  resources:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  volumeMounts:
    - {name: model, mountPath: /models}
    - {name: cache, mountPath: /cache}
    - {name: tmp, mountPath: /tmp}
{{- end -}}
{{- end }}
