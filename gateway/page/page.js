// The form: which prompt is sent at which two settings, one after the other, so that neither slows the other down.

import { Side } from "/page/side.js";
import { followWorkers } from "/page/workers.js";

const NAMES = ["left", "right"];
// What is compared where the server has these policies: 16 bits, and the server's own default at this budget.
const EXACT = { policy: "fp16", budget: 1 };
const BUDGET = 0.3;

const element = (id) => document.getElementById(id);
const policyOf = (name) => element(`policy-${name}`);
const budgetOf = (name) => element(`budget-${name}`);

let policies;
let running;

/** Fills in what the first answer of a prefill service says that one can choose. */
function offer(services) {
  const prefill = services.prefill.find((one) => one.answers);
  element("token-row").hidden ||= !element("token").value;
  if (policies || !prefill) return;
  policies = new Map(prefill.policies.map((one) => [one.name, one]));
  element("about").textContent = `${prefill.model}, ${prefill.layers} layers, on ${prefill.device}; version ${prefill.version}.`;
  element("chat").checked = prefill.has_chat_template;
  element("chat").disabled = !prefill.has_chat_template;
  const { min_budget: least, max_budget: most } = policies.get(prefill.defaults.policy);
  const chosen = { policy: prefill.defaults.policy, budget: Math.min(most, Math.max(least, BUDGET)) };
  choose("left", policies.has(EXACT.policy) ? EXACT : chosen);
  choose("right", chosen);
}

function choose(name, setting) {
  policyOf(name).replaceChildren(...[...policies.keys()].map((one) => new Option(one, one)));
  policyOf(name).value = setting.policy;
  budgetOf(name).value = setting.budget;
  limit(name);
}

/** Says which budgets the chosen policy takes. */
function limit(name) {
  const { min_budget: least, max_budget: most, budget_kind: kind } = policies.get(policyOf(name).value);
  const budget = budgetOf(name);
  budget.min = least;
  budget.max = most;
  budget.value = Math.min(most, Math.max(least, Number(budget.value)));
  const meaning = kind === "bytes" ? "all bytes sent ÷ FP16" : "mean tier cost of a token";
  element(`range-${name}`).textContent = least === most ? `always ${least}` : `${least} to ${most}: ${meaning}`;
}

function settingOf(name) {
  const budget = Number(budgetOf(name).value);
  return { policy: policyOf(name).value, budget, map: element("by-layer").checked ? "layers" : true };
}

function requestOf(name) {
  const prompt = element("prompt").value;
  const chat = element("chat").checked;
  const what = chat ? { messages: [{ role: "user", content: prompt }] } : { prompt };
  const body = {
    ...what,
    max_tokens: Number(element("max-tokens").value),
    temperature: 0,
    stream: true,
    stream_options: { include_usage: true },
    kv: settingOf(name),
  };
  return { path: chat ? "/v1/chat/completions" : "/v1/completions", body };
}

async function send() {
  running = new AbortController();
  element("send").disabled = true;
  element("stop").disabled = false;
  const sides = NAMES.map((name) => new Side(name, `${policyOf(name).value}, budget ${budgetOf(name).value}`));
  element("answers").replaceChildren(...sides.map((side) => side.root));
  const requests = NAMES.map(requestOf);
  const results = [];
  for (const [place, side] of sides.entries()) {
    say(`waiting for the ${NAMES[place]} answer …`);
    const { path, body } = requests[place];
    try {
      results.push(await side.ask(path, body, element("token").value, running.signal));
    } catch (error) {
      side.fail(running.signal.aborted ? "stopped" : error.message);
      noteError(error);
    }
    if (running.signal.aborted) break;
  }
  say(results.length === NAMES.length ? compared(...results) : "");
  element("send").disabled = false;
  element("stop").disabled = true;
}

function compared(left, right) {
  const share = (right.kv.kv_bytes_sent / left.kv.kv_bytes_sent).toFixed(2);
  const same = left.text === right.text ? "The answers are the same" : "The answers differ";
  return `${same}; the right one’s KV took ${share} times the bytes of the left one’s.`;
}

function say(text) {
  element("status").textContent = text;
}

/** Shows the field for a token where the server asks for one. */
function noteError(error) {
  if (error.status === 401) element("token-row").hidden = false;
}

element("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
element("stop").addEventListener("click", () => running.abort());
for (const name of NAMES) policyOf(name).addEventListener("change", () => limit(name));
followWorkers(() => element("token").value, offer, noteError);
