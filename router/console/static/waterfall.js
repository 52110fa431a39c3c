// The stage ledger as bars on one time axis.

import { h } from "./dom.js";
import { seconds, words } from "./format.js";

/** Which panel a stage belongs to, and what happens in it. Stages that are not listed count as the router's. */
const STAGES = {
  tokenize: ["router", "Template and tokenizer, on the router"],
  queue: ["router", "Waiting for its turn in the router"],
  route: ["router", "Choosing the workers"],
  reroute: ["router", "Choosing again after a failed attempt, waiting included"],
  prefill_queue: ["prefill", "Waiting on the prefill worker"],
  prefill: ["prefill", "Computing the prompt, up to the first token"],
  prefill_rpc: ["router", "Messages to the prefill worker and back"],
  first_token: ["prefill", "Up to the first token; the worker gave no durations"],
  transfer: ["transfer", "KV blocks that were not yet there when the prompt was done"],
  decode_queue: ["decode", "Waiting on the decode worker"],
  first_decode: ["decode", "The first step on the decode worker"],
  handover: ["transfer", "First to second token; the worker gave no durations"],
  handover_rpc: ["router", "Messages of the hand-over"],
  decode: ["decode", "All further steps"],
  deliver: ["router", "Last token to the client"],
  failed_attempt: ["failed", "An attempt that came to nothing; tokens it had given are kept"],
  unfinished: ["failed", "Not done yet"],
};
const PANELS = { router: "router and messages", prefill: "prefill", transfer: "KV transfer", decode: "decode", failed: "failed or unfinished" };
const TICKS = 4;
const CROWDED = 0.6;

/** Bars for a sequence of /v1/requests/{id}/timeline, with a switch to look at the start alone. */
export function waterfall(sequence) {
  let at = 0;
  const stages = sequence.stages.map((stage) => {
    const begin = at;
    at += stage.seconds;
    return { ...stage, begin };
  });
  const whole = Math.max(sequence.end_to_end_s, at) || 1e-9;
  const decode = stages.findLast(({ name }) => name === "decode");
  const chart = h("div", { class: "waterfall" });
  const draw = (end) => chart.replaceChildren(axis(end), ...rows(stages, end, sequence.ttft_s));
  if (!decode || decode.seconds / whole < CROWDED || !decode.begin) {
    draw(whole);
    return h("div", {}, h("div", { class: "above" }, legend(stages)), chart);
  }
  const choices = [
    ["Up to decode", decode.begin * 1.04],
    ["Whole", whole],
  ].map(([name, end]) =>
    h("button", { type: "button", "aria-pressed": "false", onclick: (event) => choose(event.currentTarget, end) }, name),
  );
  const choose = (chosen, end) => {
    for (const choice of choices) choice.setAttribute("aria-pressed", String(choice === chosen));
    draw(end);
  };
  choose(choices[1], whole);
  const part = h("div", { class: "segmented", role: "group", "aria-label": "Part of the request" }, choices);
  return h("div", {}, h("div", { class: "above" }, part, legend(stages)), chart);
}

const panelOf = (stage) => STAGES[stage.name] ?? ["router", ""];

function legend(stages) {
  const used = new Set(stages.map((stage) => panelOf(stage)[0]));
  const entries = Object.entries(PANELS).filter(([panel]) => used.has(panel));
  return h("div", { class: "legend" }, entries.map(([panel, name]) => h("span", {}, h("i", { class: `span ${panel}` }), name)), h("span", {}, h("i", { class: "first" }), "first token"));
}

function rows(stages, end, ttft) {
  const place = (moment) => `${(100 * Math.min(moment, end)) / end}%`;
  const marker = () => (ttft !== null && ttft <= end ? h("i", { class: "first", style: { left: place(ttft) } }) : null);
  return stages.map((stage) => {
    const [panel, meaning] = panelOf(stage);
    const left = Math.min(stage.begin, end);
    const width = Math.min(stage.begin + stage.seconds, end) - left;
    const cut = stage.begin + stage.seconds > end;
    return h(
      "div",
      { class: "stage", title: meaning },
      h("span", { class: "name" }, words(stage.name), stage.attempt > 1 ? h("small", {}, ` attempt ${stage.attempt}`) : null),
      h(
        "span",
        { class: "lane", "aria-hidden": "true" },
        marker(),
        h("i", { class: `span ${panel}${cut ? " cut" : ""}`, style: { left: place(left), width: `${(100 * width) / end}%` } }),
      ),
      h("span", { class: "time" }, seconds(stage.seconds)),
    );
  });
}

function axis(end) {
  const step = roundStep(end / TICKS);
  const ticks = [];
  for (let moment = 0; moment <= end; moment += step) {
    ticks.push(h("span", { style: { left: `${(100 * moment) / end}%` } }, tick(moment, step)));
  }
  return h("div", { class: "stage axis", "aria-hidden": "true" }, h("span", {}), h("span", { class: "lane" }, ticks), h("span", {}));
}

/** A label with no more digits than the distance between ticks needs. */
function tick(moment, step) {
  if (!moment) return "0";
  const [scale, unit] = step >= 0.5 ? [1, "s"] : step >= 0.0005 ? [1e3, "ms"] : [1e6, "µs"];
  return `${Number((moment * scale).toPrecision(4))} ${unit}`;
}

function roundStep(least) {
  const power = 10 ** Math.floor(Math.log10(least));
  return power * [1, 2, 2.5, 5, 10].find((factor) => factor * power >= least * 0.999);
}
