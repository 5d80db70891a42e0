/** The decoders that the server offers: what they are, which knobs they have, and what a request with these says. */

import { DECODERS } from "./table.js";

export const NAMES = Object.keys(DECODERS);

/** Options that the page has knobs for. */
const KNOBS = ["draft_length", "block_size", "unmask"];
const RULE_KNOBS = { confidence: ["alpha"], entropy: ["gamma"], one_step: [] };

/** Sentences for people. */
export function aboutOf(decoder) {
  const { about, exact } = DECODERS[decoder];
  if (decoder === "blt") return about;
  return `${about} ${exact ? "Same text as blt." : "A text of its own."}`;
}

/** How it unmasks blocks by default, if it has any. */
export function ruleOf(decoder) {
  return DECODERS[decoder].rule;
}

/** Whether the model verifies what is drafted. */
export function checks(decoder) {
  return DECODERS[decoder].exact;
}

/** The names of the knobs that mean something, given { decoder, rule }. */
export function knobsOf({ decoder, rule }) {
  const knobs = optionsOf(decoder);
  return knobs.includes("unmask") ? [...knobs, ...RULE_KNOBS[rule]] : knobs;
}

function optionsOf(decoder) {
  return KNOBS.filter((knob) => DECODERS[decoder].options.includes(knob));
}

/** The fields of a request for settings of all knobs. */
export function fieldsOf(settings) {
  const fields = { decoder: settings.decoder };
  const knobs = optionsOf(settings.decoder);
  for (const knob of knobs.filter((name) => name !== "unmask")) fields[knob] = settings[knob];
  if (knobs.includes("unmask")) {
    fields.unmask = { rule: settings.rule };
    for (const knob of RULE_KNOBS[settings.rule]) fields.unmask[knob] = settings[knob];
  }
  return fields;
}

/** Such fields in a few words: "blt-d, blocks of 8, confidence 0.7". */
export function nameOf({ decoder, draft_length: drafts, block_size: block, unmask }) {
  const parts = [decoder];
  if (drafts) parts.push(`drafts of ${drafts}`);
  if (block) parts.push(`blocks of ${block}`);
  if (unmask) parts.push([unmask.rule.replace("_", " "), unmask.alpha ?? unmask.gamma ?? ""].join(" ").trim());
  return parts.join(", ");
}
