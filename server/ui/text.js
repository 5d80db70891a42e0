/** A completion as coloured bytes: where patches begin, which were drafted, which draft was rejected, and in which pass
 * of a block a byte was settled; before it the prompt, a patch each. Everything a model wrote goes in as text, never as
 * HTML. */

import { Strip } from "./strip.js";

const OFFSET = 4;
const isByte = (id) => id >= OFFSET && id < OFFSET + 256;
const SPECIALS = ["<boe>", "<s>", "</s>", "<pad>"];
/** Name of an id that is not a byte. */
const nameOf = (id) => SPECIALS[id] ?? `<${id}>`;
/** Passes that have a colour; the last stands for all later ones. */
export const PASSES = 8;
/** Index of the prompt's first byte: before it is the begin-of-sequence id, which is a patch but no text. */
const FIRST = 1;
/** Most bytes named for a patch of the prompt. */
const NAMED = 24;

export class Text {
  #element;
  #inspector;
  #strip;
  #before;
  #prompt = new Uint8Array();
  #promptPatches = [];
  #bytes = [];
  #patches;
  #starts = new Set();
  #rounds = 0;
  #utf8;
  #cursor;
  #checked = true;

  /** element: where the bytes go; inspector: where the byte under the pointer is described; strip: an SVG for the
   * entropies. */
  constructor(element, inspector, strip) {
    this.#element = element;
    this.#inspector = inspector;
    this.#strip = new Strip(strip);
    for (const kind of ["pointerover", "click"]) {
      element.addEventListener(kind, ({ target }) => this.#point(Number(target.dataset.place ?? target.dataset.patch ?? NaN)));
    }
    element.addEventListener("keydown", (event) => this.#onKey(event));
  }

  /** The generated ids so far. */
  get ids() {
    return this.#bytes.map((byte) => byte.id);
  }

  /** checked: whether the model verifies what is drafted. */
  begin(prompt, checked) {
    this.#prompt = new TextEncoder().encode(prompt);
    this.#promptPatches = [];
    this.#bytes = [];
    this.#checked = checked;
    this.#patches = undefined;
    this.#starts.clear();
    this.#strip.clear();
    this.#rounds = 0;
    this.#utf8 = new TextDecoder("utf-8", { ignoreBOM: true });
    this.#cursor = undefined;
    this.#inspector.textContent = "";
    this.#before = document.createElement("span");
    this.#before.className = "before";
    this.#before.textContent = prompt;
    this.#element.replaceChildren(this.#before);
  }

  /** Takes the trace and the patches of a chunk. */
  add(trace, patches) {
    const atEnd = this.#element.scrollTop + this.#element.clientHeight >= this.#element.scrollHeight - 8;
    const fresh = document.createDocumentFragment();
    for (const round of trace.rounds) this.#addRound(round, fresh);
    this.#addPatches(patches);
    this.#element.append(fresh);
    if (atEnd) this.#element.scrollTop = this.#element.scrollHeight;
  }

  /** Ends the text: an incomplete character is shown as U+FFFD. */
  finish() {
    const rest = this.#utf8.decode();
    if (rest) setText(this.#bytes.findLast((byte) => isByte(byte.id)).element, rest);
    if (this.#bytes.length) this.#inspector.textContent = "Point at a byte, or go through them with the arrow keys.";
  }

  #addPatches(patches) {
    const first = !this.#patches?.entropies.length;
    if (this.#patches) for (const entropy of patches.entropies) this.#patches.entropies.push(entropy);
    else this.#patches = patches;
    for (const start of patches.starts) {
      this.#starts.add(start);
      this.#bytes[start - patches.output_start]?.element.classList.add("patch");
    }
    // The prompt's patches come first, all at once.
    if (first && patches.entropies.length) this.#splitPrompt(patches.output_start);
    if (patches.entropies.length) this.#strip.show(this.#patches);
  }

  /** Puts the prompt into spans, one per patch. A character is shown at the last of its bytes. */
  #splitPrompt(end) {
    if (end !== FIRST + this.#prompt.length) return;
    const starts = [...this.#starts].filter((start) => FIRST <= start && start < end);
    const utf8 = new TextDecoder("utf-8", { ignoreBOM: true });
    this.#promptPatches = starts.map((start, number) => {
      const next = starts[number + 1] ?? end;
      const element = document.createElement("span");
      element.className = "patch";
      element.dataset.patch = number - starts.length;
      element.textContent = utf8.decode(this.#prompt.subarray(start - FIRST, next - FIRST), { stream: true });
      if (!element.textContent) element.dataset.glyph = "·";
      return { element, start, end: next };
    });
    this.#before.replaceChildren(...this.#promptPatches.map(({ element }) => element));
  }

  #addRound({ ids, drafts, accepted, passes }, fresh) {
    this.#rounds += 1;
    const several = passes.some((pass) => pass !== passes[0]);
    ids.forEach((id, place) => {
      if (place === accepted && accepted < drafts.length) fresh.append(rejected(drafts.slice(accepted)));
      const pass = place < accepted && passes.length ? passes[place] + 1 : 0;
      const kind = place >= accepted ? "own" : this.#checked ? "draft" : "block";
      const element = document.createElement("span");
      element.dataset.kind = kind;
      element.dataset.place = this.#bytes.length;
      if (pass) {
        element.dataset.pass = Math.min(pass, PASSES);
        if (several && passes[place - 1] !== passes[place]) element.dataset.mark = pass;
      }
      this.#bytes.push({ id, kind, pass, element, round: this.#rounds });
      this.#write(id, element);
      fresh.append(element);
    });
  }

  /** A character is shown at the last of its bytes; the others get a placeholder, and invalid bytes U+FFFD. */
  #write(id, element) {
    if (!isByte(id)) {
      element.dataset.glyph = nameOf(id);
      return;
    }
    const byte = id - OFFSET;
    const characters = [...this.#utf8.decode(Uint8Array.of(byte), { stream: true })];
    const leads = byte >= 0xc2 && byte <= 0xf4;
    const own = leads ? "" : (characters.pop() ?? "");
    if (characters.length) {
      const before = this.#bytes.findLast((other) => isByte(other.id) && other.element !== element);
      setText(before.element, characters.join(""));
    }
    setText(element, own);
  }

  #onKey(event) {
    const first = -this.#promptPatches.length;
    const last = this.#bytes.length - 1;
    const line = this.#lineAbove.bind(this);
    const moves = {
      ArrowLeft: (at) => at - 1,
      ArrowRight: (at) => at + 1,
      ArrowUp: (at) => line(at, -1),
      ArrowDown: (at) => line(at, 1),
      Home: () => first,
      End: () => last,
    };
    if (last < first || !(event.key in moves) || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    const place = this.#cursor === undefined ? 0 : moves[event.key](this.#cursor);
    this.#point(Math.max(first, Math.min(last, place)));
    this.#at(this.#cursor).element.scrollIntoView({ block: "nearest", inline: "nearest" });
  }

  /** The element at a cursor position: from 0 the output's bytes; -1 is the prompt's last patch, and so on back. */
  #at(place) {
    return place < 0 ? this.#promptPatches.at(place) : this.#bytes[place];
  }

  /** The byte nearest to this one on the next line that has any. */
  #lineAbove(at, direction) {
    const box = (place) => this.#at(place).element.getBoundingClientRect();
    const here = box(at);
    let best = at;
    for (let place = at + direction; this.#at(place); place += direction) {
      const other = box(place);
      if (Math.abs(other.bottom - here.bottom) < 4) continue;
      if (best !== at && Math.abs(other.bottom - box(best).bottom) > 4) break;
      if (best === at || Math.abs(other.left - here.left) < Math.abs(box(best).left - here.left)) best = place;
    }
    return best;
  }

  #point(place) {
    if (!this.#at(place)) return;
    this.#at(this.#cursor)?.element.classList.remove("cursor");
    this.#cursor = place;
    this.#at(place).element.classList.add("cursor");
    this.#inspector.textContent = place < 0 ? this.#describePatch(place) : this.#describe(place);
    this.#strip.mark(place < 0 ? this.#at(place).start : place + (this.#patches?.output_start ?? 0));
  }

  /** A patch of the prompt. */
  #describePatch(place) {
    const { start, end } = this.#at(place);
    const bytes = this.#prompt.subarray(start - FIRST, end - FIRST);
    const named = Array.from(bytes.subarray(0, NAMED), hex).join(" ");
    const numbers = bytes.length === 1 ? `byte ${start}` : `bytes ${start} to ${end - 1}`;
    return [`prompt, ${numbers}: ${named}${bytes.length > NAMED ? " …" : ""}`, ...this.#why(start)].join(" · ");
  }

  /** For a byte of prompt or output: its entropy, and whether it begins a patch. */
  #why(at) {
    if (!this.#patches) return [];
    const { entropies, threshold, max_patch_length: most } = this.#patches;
    const entropy = entropies[at - 1];
    const parts = entropy === undefined ? [] : [`entropy ${entropy.toFixed(2)} nats`];
    if (this.#starts.has(at)) {
      const full = most !== null && Array.from({ length: most - 1 }, (_, n) => at - 1 - n).every((place) => !this.#starts.has(place));
      const above = threshold !== null && entropy > threshold;
      parts.push(`begins a patch${above ? `, above ${threshold.toFixed(2)}` : full ? `, as the one before has ${most} bytes` : ""}`);
    }
    return parts;
  }

  #describe(place) {
    const { id, kind, pass, round } = this.#bytes[place];
    const byte = id - OFFSET;
    const sign = byte > 0x20 && byte < 0x7f ? ` ${String.fromCharCode(byte)}` : "";
    const parts = [
      `byte ${place + 1}: ${!isByte(id) ? nameOf(id) : `0x${hex(byte)}${sign}`}`,
      { own: "next byte", draft: "draft, accepted", block: "of a block" }[kind],
      ...(pass ? [`settled in pass ${pass}`] : []),
      `round ${round}`,
    ];
    return [...parts, ...this.#why(place + (this.#patches?.output_start ?? 0))].join(" · ");
  }
}

function rejected(ids) {
  const element = document.createElement("span");
  element.dataset.kind = "rejected";
  element.ariaHidden = "true";
  const text = new TextDecoder().decode(Uint8Array.from(ids.filter(isByte), (id) => id - OFFSET));
  element.textContent = text.replace(/\n/g, "↵").replace(/\t/g, "→").replace(/\p{Cc}/gu, "·");
  return element;
}

function hex(byte) {
  return byte.toString(16).padStart(2, "0");
}

/** Adds a visible glyph to an invisible character. */
function setText(element, text) {
  const code = text.charCodeAt(0);
  const control = (code < 0x20 && text !== "\t" && text !== "\n") || code === 0x7f;
  const picture = String.fromCharCode(code === 0x7f ? 0x2421 : 0x2400 + code);
  const glyph = text === "" ? "·" : text === "\n" ? "↵" : control ? picture : "";
  element.textContent = control ? "" : text;
  if (glyph) element.dataset.glyph = glyph;
  else delete element.dataset.glyph;
}
