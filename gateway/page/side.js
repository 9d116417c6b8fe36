// One of the two settings: asks for its answer, and shows the answer and what its KV took.

import { PromptMap } from "/page/map.js";
import { events } from "/page/stream.js";

const duration = (seconds) => (seconds < 1 ? `${(1000 * seconds).toFixed(1)} ms` : `${seconds.toFixed(2)} s`);
const percent = (share) => `${(100 * share).toLocaleString("en", { maximumFractionDigits: 1 })} %`;
const whole = (number) => number.toLocaleString("en", { maximumFractionDigits: 0 });

/** Shows one answer. */
export class Side {
  /**
   * @param {string} name "left" or "right"
   * @param {string} title of the part of the page
   */
  constructor(name, title) {
    const template = document.getElementById("side");
    this.root = template.content.cloneNode(true).firstElementChild;
    this.root.id = `answer-${name}`;
    this.root.querySelector("h2").textContent = title;
    this.answer = this.root.querySelector(".answer");
  }

  /**
   * Asks for the answer and shows it as it comes.
   *
   * @returns {Promise<{text: string, kv: object}>} the answer, and what its KV took
   */
  async ask(path, body, token, signal) {
    this.answer.ariaBusy = "true";
    let kv;
    try {
      for await (const event of events(path, body, token, signal)) {
        const choice = event.choices[0];
        if (choice) this.answer.append(choice.delta ? (choice.delta.content ?? "") : choice.text);
        kv = event.usage?.kv ?? kv;
      }
    } finally {
      this.answer.ariaBusy = "false";
    }
    this.#showSent(kv);
    return { text: this.answer.textContent, kv };
  }

  /** Says why there is no answer. */
  fail(message) {
    const problem = this.root.querySelector(".problem");
    problem.hidden = false;
    problem.textContent = message;
  }

  #showSent(kv) {
    const figures = [
      ["first token", duration(kv.ttft_seconds)],
      ["hand-off", kv.handoff_seconds ? duration(kv.handoff_seconds) : "–"],
      ["bytes sent", whole(kv.kv_bytes_sent)],
      ["of FP16", percent(kv.budget_counted)],
      ["codec", kv.codec],
    ];
    this.root.querySelector(".figures").replaceChildren(...figures.map(figure));
    this.#showBytes(kv);
    new PromptMap(this.root, kv.map);
    this.root.querySelector(".sent").hidden = false;
  }

  #showBytes(kv) {
    const rows = Object.entries(kv.tiers).map(([tier, one]) => ({ tier, ...one }));
    const coded = rows.reduce((sum, row) => sum + row.bytes, 0);
    rows.push({ tier: "framing", bytes: kv.kv_bytes_sent - coded });
    const most = Math.max(kv.kv_fp16_bytes, kv.kv_bytes_sent);
    const bar = this.root.querySelector(".bar");
    bar.replaceChildren(...rows.map((row) => stretch(row, most)));
    bar.title = `${whole(kv.kv_bytes_sent)} of ${whole(kv.kv_fp16_bytes)} bytes`;
    this.root.querySelector(".tiers tbody").replaceChildren(...rows.map((row) => tableRow(row, kv.kv_fp16_bytes)));
  }
}

function figure([name, value]) {
  const group = document.createElement("div");
  const term = document.createElement("dt");
  const said = document.createElement("dd");
  term.textContent = name;
  said.textContent = value;
  group.append(term, said);
  return group;
}

function stretch(row, most) {
  const part = document.createElement("span");
  part.className = `tier-${row.tier}`;
  part.style.width = `${(100 * row.bytes) / most}%`;
  return part;
}

function tableRow(row, fp16Bytes) {
  const line = document.createElement("tr");
  const head = document.createElement("th");
  head.scope = "row";
  const swatch = document.createElement("span");
  swatch.className = `swatch tier-${row.tier}`;
  head.append(swatch, row.tier);
  const tokens = row.tokens === undefined ? "" : row.tokens.toLocaleString("en", { maximumFractionDigits: 1 });
  const cells = [tokens, whole(row.bytes), percent(row.bytes / fp16Bytes)].map((text) => {
    const cell = document.createElement("td");
    cell.textContent = text;
    return cell;
  });
  line.append(head, ...cells);
  return line;
}
