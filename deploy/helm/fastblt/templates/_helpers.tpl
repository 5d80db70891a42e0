{{- define "fastblt.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 63 | trimSuffix "-" -}}
{{- else if contains .Chart.Name .Release.Name -}}
{{- .Release.Name | trunc 63 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name .Chart.Name | trunc 63 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "fastblt.selectorLabels" -}}
app.kubernetes.io/name: fastblt
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "fastblt.labels" -}}
{{ include "fastblt.selectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end -}}

{{- define "fastblt.serviceAccount" -}}
{{- .Values.serviceAccount.name | default (ternary (include "fastblt.fullname" .) "default" .Values.serviceAccount.create) -}}
{{- end -}}
