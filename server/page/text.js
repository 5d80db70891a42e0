/** A completion as coloured bytes: where patches begin, which were drafted, which draft was rejected, and in which pass
 * of a block a byte was settled. Everything a model wrote goes in as text, never as HTML. */

const OFFSET = 4;
const SPECIALS = ["<boe>", "<s>", "</s>", "<pad>"];
/** Passes that have a colour; the last stands for all later ones. */
export const PASSES = 8;

export class Text {
  #element;
  #inspector;
  #bytes = [];
  #starts = new Set();
  #rounds = 0;
  #utf8;
  #cursor;
  #checked = true;

  /** element: where the bytes go; inspector: where the one that is pointed at is described. */
  constructor(element, inspector) {
    this.#element = element;
    this.#inspector = inspector;
    element.addEventListener("pointerover", (event) => this.#point(Number(event.target.dataset.place ?? NaN)));
    element.addEventListener("click", (event) => this.#point(Number(event.target.dataset.place ?? NaN)));
    element.addEventListener("keydown", (event) => this.#onKey(event));
  }

  /** The generated ids so far. */
  get ids() {
    return this.#bytes.map((byte) => byte.id);
  }

  /** checked: whether the model verifies what is drafted. */
  begin(prompt, checked) {
    this.#bytes = [];
    this.#checked = checked;
    this.#starts.clear();
    this.#rounds = 0;
    this.#utf8 = new TextDecoder("utf-8", { ignoreBOM: true });
    this.#cursor = undefined;
    this.#inspector.textContent = "";
    const start = document.createElement("span");
    start.className = "before";
    start.textContent = prompt;
    this.#element.replaceChildren(start);
  }

  /** Takes the trace of a chunk. */
  add(trace) {
    const atEnd = this.#element.scrollTop + this.#element.clientHeight >= this.#element.scrollHeight - 8;
    const fresh = document.createDocumentFragment();
    for (const round of trace.rounds) this.#addRound(round, fresh);
    for (const start of trace.patch_starts) {
      this.#starts.add(start);
      this.#bytes[start]?.element.classList.add("patch");
    }
    this.#element.append(fresh);
    if (atEnd) this.#element.scrollTop = this.#element.scrollHeight;
  }

  /** Nothing more comes: half a character is none. */
  finish() {
    const rest = this.#utf8.decode();
    if (rest) setText(this.#bytes.findLast((byte) => byte.id >= OFFSET).element, rest);
    if (this.#bytes.length) this.#inspector.textContent = "Point at a byte, or go through them with the arrow keys.";
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
      element.classList.toggle("patch", this.#starts.has(this.#bytes.length));
      this.#bytes.push({ id, kind, pass, element, round: this.#rounds });
      this.#write(id, element);
      fresh.append(element);
    });
  }

  /** A character stands with the last of its bytes; the others, and U+FFFD for what is no text, hold a place. */
  #write(id, element) {
    if (id < OFFSET) {
      element.dataset.glyph = SPECIALS[id];
      return;
    }
    const byte = id - OFFSET;
    const characters = [...this.#utf8.decode(Uint8Array.of(byte), { stream: true })];
    const leads = byte >= 0xc2 && byte <= 0xf4;
    const own = leads ? "" : (characters.pop() ?? "");
    if (characters.length) {
      const before = this.#bytes.findLast((other) => other.id >= OFFSET && other.element !== element);
      setText(before.element, characters.join(""));
    }
    setText(element, own);
  }

  #onKey(event) {
    const last = this.#bytes.length - 1;
    const line = this.#lineAbove.bind(this);
    const moves = {
      ArrowLeft: (at) => at - 1,
      ArrowRight: (at) => at + 1,
      ArrowUp: (at) => line(at, -1),
      ArrowDown: (at) => line(at, 1),
      Home: () => 0,
      End: () => last,
    };
    if (last < 0 || !(event.key in moves) || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    const place = this.#cursor === undefined ? 0 : moves[event.key](this.#cursor);
    this.#point(Math.max(0, Math.min(last, place)));
    this.#bytes[this.#cursor].element.scrollIntoView({ block: "nearest", inline: "nearest" });
  }

  /** The byte nearest to this one on the next line that has any. */
  #lineAbove(at, direction) {
    const box = (place) => this.#bytes[place].element.getBoundingClientRect();
    const here = box(at);
    let best = at;
    for (let place = at + direction; this.#bytes[place]; place += direction) {
      const other = box(place);
      if (Math.abs(other.bottom - here.bottom) < 4) continue;
      if (best !== at && Math.abs(other.bottom - box(best).bottom) > 4) break;
      if (best === at || Math.abs(other.left - here.left) < Math.abs(box(best).left - here.left)) best = place;
    }
    return best;
  }

  #point(place) {
    if (!this.#bytes[place]) return;
    this.#bytes[this.#cursor]?.element.classList.remove("cursor");
    this.#cursor = place;
    this.#bytes[place].element.classList.add("cursor");
    this.#inspector.textContent = this.#describe(place);
  }

  #describe(place) {
    const { id, kind, pass, round } = this.#bytes[place];
    const byte = id - OFFSET;
    const sign = byte > 0x20 && byte < 0x7f ? ` ${String.fromCharCode(byte)}` : "";
    const parts = [
      `byte ${place + 1}: ${id < OFFSET ? SPECIALS[id] : `0x${byte.toString(16).padStart(2, "0")}${sign}`}`,
      { own: "next byte", draft: "draft, accepted", block: "of a block" }[kind],
      ...(pass ? [`settled in pass ${pass}`] : []),
      `round ${round}`,
    ];
    if (this.#starts.has(place)) parts.push("begins a patch");
    return parts.join(" · ");
  }
}

function rejected(ids) {
  const element = document.createElement("span");
  element.dataset.kind = "rejected";
  element.ariaHidden = "true";
  const text = new TextDecoder().decode(Uint8Array.from(ids.filter((id) => id >= OFFSET), (id) => id - OFFSET));
  element.textContent = text.replace(/\n/g, "↵").replace(/\t/g, "→").replace(/\p{Cc}/gu, "·");
  return element;
}

/** Shows what would not be seen as a glyph beside it. */
function setText(element, text) {
  const code = text.charCodeAt(0);
  const control = (code < 0x20 && text !== "\t" && text !== "\n") || code === 0x7f;
  const picture = String.fromCharCode(code === 0x7f ? 0x2421 : 0x2400 + code);
  const glyph = text === "" ? "·" : text === "\n" ? "↵" : control ? picture : "";
  element.textContent = control ? "" : text;
  if (glyph) element.dataset.glyph = glyph;
  else delete element.dataset.glyph;
}
