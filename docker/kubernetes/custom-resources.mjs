// Checks the kinds that operators add against their published schemas. Usage: node custom-resources.mjs RESOURCES.json
// The packages lie beside a copy of this file: `make lint-kubernetes`.
import { readFileSync } from "node:fs";
import * as certManager from "@kubernetes-models/cert-manager/cert-manager.io/v1";
import * as keda from "@kubernetes-models/keda/keda.sh/v1alpha1";
import * as prometheus from "@kubernetes-models/prometheus-operator/monitoring.coreos.com/v1";

const kinds = {
  "cert-manager.io/v1": certManager,
  "keda.sh/v1alpha1": keda,
  "monitoring.coreos.com/v1": prometheus,
};
let checked = 0;
for (const resource of JSON.parse(readFileSync(process.argv[2], "utf8"))) {
  const models = kinds[resource.apiVersion];
  if (models) {
    try {
      new models[resource.kind](resource).validate();
    } catch (error) {
      console.error(`${resource.kind} ${resource.metadata.name}: ${error.message}`);
      process.exitCode = 1;
    }
    checked += 1;
  }
}
console.log(`${checked} resources of operators checked`);
