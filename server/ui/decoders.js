/** The decoders: what they are, which knobs they have, and what a request with these says. */

export const DECODERS = {
  "blt": { about: "One byte after another, each through the model.", knobs: [] },
  "blt-s": { about: "Drafts with the small decoder, verified by the model. Same text as blt.", knobs: ["draft_length"] },
  "blt-d": { about: "Masked blocks, unmasked in passes and not checked. A text of its own.", knobs: ["block_size", "unmask"] },
  "blt-dv": { about: "Blocks as drafts, verified by the model. Same text as blt.", knobs: ["block_size", "unmask"] },
  "auto": { about: "Whichever of blt, blt-s and blt-dv promises to be fastest. Same text as blt.", knobs: [] },
};

export const DEFAULT_RULE = { "blt-d": "confidence", "blt-dv": "one_step" };

const RULE_KNOBS = { confidence: ["alpha"], entropy: ["gamma"], one_step: [] };

/** Whether the model verifies what is drafted. */
export function checks(decoder) {
  return decoder !== "blt-d";
}

/** The names of the knobs that mean something, given { decoder, rule }. */
export function knobsOf({ decoder, rule }) {
  const { knobs } = DECODERS[decoder];
  return knobs.includes("unmask") ? [...knobs, ...RULE_KNOBS[rule]] : knobs;
}

/** The fields of a request for settings of all knobs. */
export function fieldsOf(settings) {
  const fields = { decoder: settings.decoder };
  const { knobs } = DECODERS[settings.decoder];
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
