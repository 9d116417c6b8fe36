// Shows the services and what they do now, asked every other second while the page can be seen.

import { get } from "/page/stream.js";

const PAUSE_MS = 2000;
const table = document.querySelector("#workers tbody");

/**
 * Asks for the services again and again.
 *
 * @param {() => string} token returns the token, empty where there is none
 * @param {(services: object) => void} onServices is given what was said, each time
 * @param {(error: Error) => void} onError is given why nothing was said, each time
 */
export async function followWorkers(token, onServices, onError) {
  for (;;) {
    if (!document.hidden) {
      try {
        const services = await get("/workers", token());
        table.replaceChildren(...services.prefill.flatMap(rows));
        onServices(services);
      } catch (error) {
        table.replaceChildren();
        onError(error);
      }
    }
    await new Promise((resolve) => setTimeout(resolve, PAUSE_MS));
  }
}

function rows(prefill) {
  if (!prefill.answers) return [row("prefill", prefill.address, prefill.error)];
  const { address, requests_running: running, requests_waiting: waiting } = prefill;
  return [row("prefill", address, "serving", running, waiting), ...prefill.decode_workers.map(decodeRow)];
}

function decodeRow(worker) {
  const { address, state, slots_total: total, slots_free: free } = worker;
  const used = total ? `${(total - free).toLocaleString("en")} of ${total.toLocaleString("en")}` : "";
  return row("decode", address, state, "", "", used);
}

function row(service, ...values) {
  const line = document.createElement("tr");
  const head = document.createElement("th");
  head.scope = "row";
  head.textContent = service;
  const cells = Array.from({ length: 5 }, (_, place) => {
    const cell = document.createElement("td");
    cell.textContent = values[place] ?? "";
    return cell;
  });
  line.append(head, ...cells);
  return line;
}
