/** One decoder's column: its knobs, its text, and its last run's figures. */

import { complete } from "./api.js";
import { summary } from "./costs.js";
import { NAMES, aboutOf, checks, fieldsOf, knobsOf, nameOf, ruleOf } from "./decoders.js";
import { Text } from "./text.js";
import { count, seconds } from "./units.js";

export class Pane {
  #text;

  constructor(number, decoder) {
    this.element = document.getElementById("pane").content.firstElementChild.cloneNode(true);
    this.parts = Object.fromEntries([...this.element.querySelectorAll("[data-part]")].map((part) => [part.dataset.part, part]));
    this.controls = Object.fromEntries([...this.element.querySelectorAll("[name]")].map((control) => [control.name, control]));
    const { text, inspector, strip } = this.parts;
    inspector.id = `inspector-${number}`;
    text.setAttribute("aria-describedby", inspector.id);
    this.#text = new Text(text, inspector, strip);
    this.controls.decoder.append(...NAMES.map((name) => new Option(name, name, name === decoder, name === decoder)));
    this.controls.decoder.addEventListener("change", () => this.#onDecoder());
    this.controls.rule.addEventListener("change", () => this.#showKnobs());
    this.#onDecoder();
  }

  /** Takes the served model; see `describe` in api.js. */
  offer({ block_size: block }) {
    if (block) this.controls.block_size.value = this.controls.block_size.max = block;
    this.#onDecoder();
  }

  set shown(shown) {
    this.element.hidden = !shown;
    for (const control of Object.values(this.controls)) control.disabled = !shown;
    if (shown) this.#showKnobs();
  }

  get shown() {
    return !this.element.hidden;
  }

  /**
   * Streams a completion into the column.
   *
   * Returns { name, checked, ids, seconds, usage, complete }; checked: whether drafts were verified. usage is null and
   * complete false for a run that was stopped. Shows an error in the column, then throws it.
   */
  async run(request, signal) {
    const { progress, problem } = this.parts;
    const fields = fieldsOf(this.#settings());
    const began = performance.now();
    const elapsed = () => (performance.now() - began) / 1000;
    const result = { name: nameOf(fields), checked: checks(fields.decoder), ids: [], seconds: 0, usage: null, complete: false };
    problem.textContent = "";
    this.#text.begin(request.prompt, result.checked);
    progress.textContent = "Waiting";
    try {
      for await (const { choices, usage } of complete({ ...request, ...fields, trace: true, patches: true }, signal)) {
        if (usage) result.usage = usage.fastblt;
        if (!choices.length) continue;
        this.#text.add(choices[0].trace, choices[0].patches);
        result.seconds = elapsed();
        result.ids = this.#text.ids;
        progress.textContent = `${count(result.ids.length, "byte")}, ${seconds(result.seconds)}`;
      }
      result.complete = true;
      progress.textContent = summary(result);
    } catch (error) {
      if (error.name !== "AbortError") {
        progress.textContent = "Failed";
        problem.textContent = error.message;
        throw error;
      }
      progress.textContent = `Stopped after ${count(result.ids.length, "byte")}`;
    } finally {
      this.#text.finish();
    }
    return result;
  }

  /** Clears the column. */
  clear() {
    this.#text.begin("", true);
    this.parts.progress.textContent = this.parts.problem.textContent = "";
  }

  #settings() {
    const settings = {};
    for (const [name, control] of Object.entries(this.controls)) {
      settings[name] = control.type === "number" ? control.valueAsNumber : control.value;
    }
    return settings;
  }

  #onDecoder() {
    const decoder = this.controls.decoder.value;
    this.controls.rule.value = ruleOf(decoder) ?? this.controls.rule.value;
    this.parts.about.textContent = aboutOf(decoder);
    this.parts.text.ariaLabel = `Text by ${decoder}`;
    this.#showKnobs();
  }

  #showKnobs() {
    const knobs = knobsOf(this.#settings());
    for (const label of this.element.querySelectorAll("[data-knob]")) {
      label.hidden = !knobs.includes(label.dataset.knob);
      // Hidden fields are not validated.
      label.control.disabled = label.hidden;
    }
  }
}
