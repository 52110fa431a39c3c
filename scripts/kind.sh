#!/usr/bin/env bash
# Brings the whole system up in a kind cluster, without GPUs, and has it answer: `make kind`.
# KIND_CLUSTER, RELEASE and NAMESPACE name what is made; running it again upgrades what is there.
set -euo pipefail
cd "$(dirname "$0")/.."

cluster=${KIND_CLUSTER:-diptych}
release=${RELEASE:-llm}
namespace=${NAMESPACE:-llm}
version=$(sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
context=kind-$cluster

for program in docker kind kubectl helm; do
    command -v "$program" >/dev/null || { echo "$program is not on PATH." >&2; exit 1; }
done

make --no-print-directory images IMAGES="router worker-cpu"
kind get clusters 2>/dev/null | grep -qx "$cluster" || kind create cluster --name "$cluster" --wait 120s
for image in router worker-cpu; do
    kind load docker-image --name "$cluster" "diptych/$image:$version"
done
helm upgrade --install "$release" deploy/helm/diptych --kube-context "$context" \
    --namespace "$namespace" --create-namespace --values deploy/helm/diptych/profiles/cpu.yaml \
    --timeout 10m --wait "$@"
helm test "$release" --kube-context "$context" --namespace "$namespace"
service=$(kubectl --context "$context" --namespace "$namespace" get service --output name \
    --selector "app.kubernetes.io/instance=$release,app.kubernetes.io/component=router" | head -n 1)
echo "Reach it at http://127.0.0.1:8000/v1 with:"
echo "  kubectl --context $context --namespace $namespace port-forward $service 8000:8000"
