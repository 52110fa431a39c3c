// Recent requests, and for one of them where its time went and why it went to which workers.

import { getJson } from "./api.js";
import { h, keyed, poll } from "./dom.js";
import { ago, bytes, bytesPerSecond, count, plural, seconds, words } from "./format.js";
import { waterfall } from "./waterfall.js";

const REFRESH_MS = 2000;
const LISTED = 100;
const FINE = new Set(["running", "stop", "length", "cancelled", "aborted"]);

export class Requests {
  #stop = null;
  #shown = null;

  constructor() {
    this.input = h("input", { id: "request-id", type: "search", placeholder: "Any request id", "aria-label": "Request id", spellcheck: false, autocomplete: "off" });
    this.list = h("ol", { class: "recent" });
    this.none = h("p", { class: "notice" }, "No request yet.");
    this.detail = h("div", { class: "detail", tabIndex: -1 });
    this.root = h(
      "section",
      { class: "requests" },
      h("h1", { class: "visually-hidden" }, "Requests"),
      h(
        "div",
        { class: "side" },
        h("form", { class: "row", onsubmit: (event) => this.#submitted(event) }, this.input, h("button", { type: "submit" }, "Show")),
        this.none,
        this.list,
      ),
      this.detail,
    );
  }

  show(id) {
    this.hide();
    if (id !== null || !this.#shown) this.#shown = id;
    this.detail.replaceChildren(
      h("p", { class: "notice" }, this.#shown ? "Loading…" : "Choose a request, or give the id of an answer or its x-request-id."),
    );
    this.root.classList.toggle("chosen", Boolean(this.#shown));
    this.#stop = poll((signal) => Promise.all([this.#refreshList(signal), this.#refreshDetail(signal)]), REFRESH_MS);
  }

  hide() {
    this.#stop?.();
    this.#stop = null;
    this.settled = null;
  }

  #submitted(event) {
    event.preventDefault();
    const id = this.input.value.trim();
    if (id) location.hash = `#/requests/${encodeURIComponent(id)}`;
  }

  async #refreshList(signal) {
    try {
      const { data } = await getJson(`v1/requests?limit=${LISTED}`, signal);
      this.none.hidden = data.length > 0;
      keyed(this.list, data, (request) => request.request_id, () => h("li"), (row, request) => this.#drawRow(row, request));
    } catch (error) {
      if (signal.aborted) return;
      this.none.hidden = false;
      this.none.textContent = error.message;
    }
  }

  #drawRow(row, request) {
    const link = row.firstElementChild ?? h("a", { href: `#/requests/${encodeURIComponent(request.request_id)}` });
    if (request.request_id === this.#shown) link.setAttribute("aria-current", "true");
    else link.removeAttribute("aria-current");
    link.replaceChildren(
      h("span", { class: "id" }, h("span", { class: `dot ${tone(request.outcome)}`, "aria-hidden": "true" }), request.request_id),
      h("span", { class: "muted" }, ago(request.age_s)),
      h(
        "span",
        { class: "muted line" },
        `${words(request.outcome)} · ${count(request.prompt_tokens)} in, ${count(request.output_tokens)} out · ${seconds(request.end_to_end_s)}`,
        request.attempts > 1 ? ` · ${plural(request.attempts, "attempt")}` : "",
      ),
    );
    if (!link.isConnected) row.replaceChildren(link);
  }

  async #refreshDetail(signal) {
    const id = this.#shown;
    if (!id || this.settled === id) return;
    try {
      const timeline = await getJson(`v1/requests/${encodeURIComponent(id)}/timeline`, signal);
      this.detail.replaceChildren(...drawTimeline(timeline));
      if (timeline.sequences.every(({ outcome }) => outcome !== "running")) this.settled = id;
    } catch (error) {
      if (!signal.aborted) this.detail.replaceChildren(h("h2", { class: "id" }, id), h("p", { class: "problem", role: "alert" }, error.message));
    }
  }
}

const tone = (outcome) => (outcome === "running" ? "busy" : FINE.has(outcome) ? "ready" : "lost");

function drawTimeline({ id, sequences }) {
  return [
    h("a", { class: "back", href: "#/requests" }, "← Requests"),
    h("h2", { class: "id" }, id),
    ...sequences.flatMap((sequence, index) => [
      sequences.length > 1 ? h("h3", {}, `Choice ${index}`) : null,
      summary(sequence),
      sequence.error ? h("p", { class: "problem" }, sequence.error) : null,
      waterfall(sequence),
      sequence.unattributed_s > 1e-6 ? h("p", { class: "muted" }, `${seconds(sequence.unattributed_s)} of it can't be attributed: a worker's durations are missing.`) : null,
      ...sequence.attempts.map((attempt) => drawAttempt(attempt, sequence.attempts.length)),
    ]),
  ].filter(Boolean);
}

const summary = (sequence) =>
  facts([
    ["outcome", words(sequence.outcome)],
    ["TTFT", seconds(sequence.ttft_s)],
    ["end to end", seconds(sequence.end_to_end_s)],
    ["prompt", plural(sequence.prompt_tokens, "token")],
    ["cached", plural(sequence.cached_tokens, "token")],
    ["output", plural(sequence.output_tokens, "token")],
    ["mode", words(sequence.mode)],
  ]);

const facts = (pairs) => h("dl", { class: "figures wide" }, pairs.map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, value))));

function drawAttempt(attempt, attempts) {
  const { decision, workers } = attempt;
  const rate = (name, speed) => (speed ? [[`${name}, ${speed.measured ? "measured" : "assumed"}`, bytesPerSecond(speed.bytes_per_s)]] : []);
  return h(
    "section",
    { class: "attempt" },
    h("h3", {}, attempts > 1 ? `Attempt ${attempt.attempt}` : "Decision"),
    attempt.failure ? h("p", { class: "problem" }, h("code", {}, attempt.failure.code), attempt.failure.message) : null,
    decision.why ? h("p", {}, decision.why) : null,
    facts([
      ...Object.entries(workers).reverse().map(([part, worker]) => [part, worker]),
      ["cached, predicted", plural(decision.predicted_cached_tokens, "token")],
      ["cached, found", attempt.cached_tokens === null ? "–" : plural(attempt.cached_tokens, "token")],
      ["KV moved", bytes(attempt.kv_bytes)],
      ...rate("link", decision.transfer_rate),
      ...rate("from host memory", decision.host_copy_rate),
    ]),
    decision.candidates.length ? candidates(decision) : null,
    decision.refused.length ? h("details", {}, h("summary", {}, `${plural(decision.refused.length, "refusal")}`), h("ul", {}, decision.refused.map((refusal) => h("li", {}, refusal)))) : null,
  );
}

function candidates({ candidates: list, prefill, decode }) {
  const known = new Set(["worker", "part", "cached_tokens", "host_tokens", "cost_s"]);
  const terms = [...new Set(list.flatMap((candidate) => Object.keys(candidate)))].filter((name) => !known.has(name));
  const chosen = ({ worker, part }) => worker === (part === "prefill" ? prefill : decode) && (part !== "local" || prefill === null);
  return h(
    "div",
    { class: "scroll", tabIndex: 0, role: "region", "aria-label": "Candidates" },
    h(
      "table",
      {},
      h("thead", {}, h("tr", {}, ["candidate", "part", "cached", "cost", ...terms.map((term) => words(term.replace(/_s$/, "")))].map((name) => h("th", { scope: "col" }, name)))),
      h(
        "tbody",
        {},
        list.map((candidate) =>
          h(
            "tr",
            { class: chosen(candidate) ? "chosen" : "" },
            h("th", { scope: "row" }, candidate.worker, chosen(candidate) ? h("small", {}, " chosen") : null),
            h("td", {}, candidate.part),
            h("td", {}, count(candidate.cached_tokens), candidate.host_tokens ? h("small", {}, ` ${count(candidate.host_tokens)} in host memory`) : null),
            h("td", {}, seconds(candidate.cost_s)),
            terms.map((term) => h("td", {}, seconds(candidate[term]))),
          ),
        ),
      ),
    ),
  );
}
