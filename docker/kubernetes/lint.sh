#!/usr/bin/env bash
# Build each overlay with kustomize and check what comes out; check the dashboard. Usage: lint.sh DIRECTORY, where
# `make lint-kubernetes` put the tools.
set -euo pipefail
tools=$1
cd "$(dirname "$0")"

"$tools/bin/python" ../grafana/schema.py
for overlay in overlays/*/; do
  name=$(basename "$overlay")
  built="$tools/$name.yaml"
  "$tools/bin/kubectl" kustomize "$overlay" > "$built"
  echo "$name: $(grep -c '^kind:' "$built") resources"
  # 1.30 is the oldest release whose kubelet knows the pause before SIGTERM.
  for release in 1.30.0 1.37.0; do
    "$tools/bin/kubernetes-validate" --strict --quiet --no-warn --kubernetes-version "$release" "$built"
  done
  # What is skipped says why in an annotation of its own.
  "$tools/bin/checkov" --file "$built" --framework kubernetes --skip-download --compact --quiet
  if [ -d "$tools/node_modules/@kubernetes-models" ]; then
    "$tools/bin/python" -c 'import json, sys, yaml; json.dump(list(yaml.safe_load_all(sys.stdin)), sys.stdout)' \
      < "$built" > "$tools/$name.json"
    cp custom-resources.mjs "$tools"
    node "$tools/custom-resources.mjs" "$tools/$name.json"
  else
    echo "npm is not on PATH, or fetched nothing: kinds that operators add were not checked"
  fi
done
