/** Puts the page together. */

import { ServerError, describe, keepKey } from "./api.js";
import { showCosts, verdict } from "./costs.js";
import { Pane } from "./pane.js";
import { Live } from "./live.js";
import { PASSES } from "./text.js";
import { seconds, count } from "./units.js";

const MOST_BYTES = 4096;
const PROMPT = "class Stack:\n    def __init__(self, ";

const $ = (id) => document.getElementById(id);
const panes = [new Pane(1, "blt"), new Pane(2, "blt-s")];
let model;
let stop;

/** Fetches the served model. Returns whether that worked, and shows the reason if not. */
async function connect() {
  try {
    const served = await describe();
    $("model").textContent = `${served.name} · ${(served.parameters / 1e6).toLocaleString("en", { maximumSignificantDigits: 3 })} million parameters`;
    $("max-tokens").max = Math.min(MOST_BYTES, served.max_length - 1);
    for (const pane of panes) pane.offer(served);
    model = served.name;
    $("problem").textContent = "";
  } catch (error) {
    complain(error);
  }
  return Boolean(model);
}

function complain(error) {
  if (!(error instanceof ServerError)) throw error;
  if (error.status === 401) $("key-form").hidden = false;
  $("problem").textContent = error.message;
}

async function run() {
  if (stop || !(model || (await connect()))) return;
  stop = new AbortController();
  $("run").ariaDisabled = "true";
  $("stop").ariaDisabled = "false";
  const request = {
    model,
    prompt: $("prompt").value,
    max_tokens: $("max-tokens").valueAsNumber,
    temperature: $("temperature").valueAsNumber,
    seed: $("seed").valueAsNumber,
  };
  const shown = panes.filter((pane) => pane.shown);
  const runs = [];
  $("problem").textContent = "";
  for (const pane of shown) pane.clear();
  try {
    // One after the other, so that neither slows the other.
    for (const pane of shown) {
      $("status").textContent = `Running ${pane.controls.decoder.value}`;
      runs.push(await pane.run(request, stop.signal));
      if (stop.signal.aborted) break;
    }
    $("status").textContent = stop.signal.aborted
      ? "Stopped"
      : [...runs.map((done) => `${done.name}: ${count(done.ids.length, "byte")} in ${seconds(done.seconds)}`), verdict(runs)].join(". ");
  } catch (error) {
    if (!(error instanceof ServerError)) throw error;
    // The column shows the error.
    if (error.status === 401) $("key-form").hidden = false;
    $("status").textContent = "Failed";
  } finally {
    $("results").hidden = !runs.length;
    $("verdict").textContent = verdict(runs);
    showCosts($("costs"), runs);
    stop = undefined;
    $("run").ariaDisabled = "false";
    $("stop").ariaDisabled = "true";
  }
}

function showLanes() {
  panes[1].shown = $("compare").checked;
  $("panes").classList.toggle("two", $("compare").checked);
}

for (let pass = 1; pass <= PASSES; pass += 1) {
  const sample = document.createElement("span");
  Object.assign(sample.dataset, { kind: "block", pass });
  sample.textContent = pass < PASSES ? pass : `${pass}+`;
  $("passes").append(sample);
}
$("panes").append(...panes.map((pane) => pane.element));
$("prompt").value = PROMPT;
$("compare").addEventListener("change", showLanes);
$("rejected").addEventListener("change", () => $("panes").classList.toggle("no-rejected", !$("rejected").checked));
$("request").addEventListener("submit", (event) => {
  event.preventDefault();
  run();
});
$("key-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  keepKey($("key").value);
  model = undefined;
  $("key-form").hidden = await connect();
  if (model) $("prompt").focus();
});
$("stop").addEventListener("click", () => stop?.abort());
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") stop?.abort();
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("request").requestSubmit();
});
showLanes();
new Live().start();
connect();
