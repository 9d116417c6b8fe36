// Shows a prompt, each token in the colour of the precision that its KV was sent at.

/** From so many bits per element on a token has the level of this place; client/kv_map.py has the same. */
export const LEVELS = [
  { least: 0, name: "not sent" },
  { least: 1e-6, name: "under 1 bit" },
  { least: 1, name: "1 to 2 bits" },
  { least: 2, name: "2 to 3 bits" },
  { least: 3, name: "3 to 4 bits" },
  { least: 4, name: "4 to 5 bits" },
  { least: 5, name: "5 to 6 bits" },
  { least: 6, name: "6 to 7 bits" },
  { least: 7, name: "7 to 8 bits" },
  { least: 8, name: "8 to 12 bits" },
  { least: 12, name: "12 bits and more" },
];

/** Returns the place of a number of bits in LEVELS. */
export function levelOf(bits) {
  return LEVELS.findLastIndex((level) => bits >= level.least);
}

/** Returns a token's text so that its end of line and its spaces can be seen where they are all of it. */
function shown(text) {
  return text.replaceAll("\n", "↵\n");
}

/** Shows the map of one answer in its part of the page. */
export class PromptMap {
  /**
   * @param {Element} side the part of the page
   * @param {{texts: string[], bits: number[], layers?: number[][]}} map what the server sent
   */
  constructor(side, map) {
    this.map = map;
    this.list = side.querySelector(".map");
    this.legend = side.querySelector(".legend");
    this.reading = side.querySelector(".reading");
    this.slider = side.querySelector(".layer");
    this.sliderName = side.querySelector(".layer-name");
    this.options = map.texts.map((text, place) => this.#option(text, place));
    this.list.replaceChildren(...this.options);
    this.list.addEventListener("keydown", (event) => this.#move(event));
    this.list.addEventListener("pointerover", (event) => this.#select(this.options.indexOf(event.target)));
    side.querySelector(".layer-row").hidden = !map.layers;
    if (map.layers) {
      this.slider.max = map.layers.length;
      this.slider.addEventListener("input", () => this.#show());
    }
    this.#show();
  }

  #option(text, place) {
    const option = document.createElement("span");
    option.role = "option";
    option.id = `${this.list.parentElement.parentElement.id}-token-${place}`;
    option.textContent = shown(text);
    return option;
  }

  /** The bits of each token in the layer that the slider names; 0 is the mean of all layers. */
  get bits() {
    const chosen = Number(this.slider.value);
    return chosen === 0 || !this.map.layers ? this.map.bits : this.map.layers[chosen - 1];
  }

  #show() {
    const chosen = Number(this.slider.value);
    const name = chosen === 0 ? "mean of all layers" : `layer ${chosen - 1}`;
    this.sliderName.textContent = name;
    this.slider.setAttribute("aria-valuetext", name);
    const counted = LEVELS.map(() => 0);
    this.bits.forEach((bits, place) => {
      const level = levelOf(bits);
      counted[level] += 1;
      this.options[place].className = `level-${level}`;
      this.options[place].setAttribute("aria-label", this.#describe(place));
    });
    this.legend.replaceChildren(...counted.flatMap((tokens, level) => (tokens ? [entry(level, tokens)] : [])));
    if (this.selected !== undefined) this.#select(this.selected);
  }

  #describe(place) {
    return `token ${place + 1}, “${this.map.texts[place].replaceAll("\n", "↵")}”, ${this.bits[place].toFixed(2)} bits`;
  }

  #move(event) {
    const steps = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1, Home: -Infinity, End: Infinity };
    if (!(event.key in steps)) return;
    event.preventDefault();
    const last = this.options.length - 1;
    this.#select(Math.min(last, Math.max(0, (this.selected ?? -1) + steps[event.key])));
    this.options[this.selected].scrollIntoView({ block: "nearest" });
  }

  #select(place) {
    if (place < 0) return;
    this.options[this.selected]?.removeAttribute("aria-selected");
    this.selected = place;
    this.options[place].setAttribute("aria-selected", "true");
    this.list.setAttribute("aria-activedescendant", this.options[place].id);
    this.reading.textContent = this.#describe(place);
  }
}

function entry(level, tokens) {
  const item = document.createElement("li");
  item.className = `level-${level}`;
  item.textContent = `${LEVELS[level].name}: ${tokens.toLocaleString("en")}`;
  return item;
}
