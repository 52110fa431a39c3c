// Both pools, and the links between them, as the router sees them now.

import { getJson } from "./api.js";
import { h, keyed, poll } from "./dom.js";
import { bytes, bytesPerSecond, count, percent, plural, rate, seconds } from "./format.js";

const REFRESH_MS = 1000;
const ROLES = { prefill: "Prefill", decode: "Decode" };

export class Fleet {
  #stop = null;

  constructor() {
    this.problem = h("p", { class: "problem", role: "alert", hidden: true });
    this.panels = Object.fromEntries(Object.entries(ROLES).map(([role, name]) => [role, panel(role, name)]));
    this.links = h("div", { class: "scroll", tabIndex: 0, role: "region", "aria-labelledby": "links-title" });
    this.root = h(
      "section",
      { class: "fleet" },
      h("h1", { class: "visually-hidden" }, "Fleet"),
      this.problem,
      h("div", { class: "panels" }, Object.values(this.panels).map(({ root }) => root)),
      h("h2", { id: "links-title" }, "Links ", h("small", {}, "how KV comes from each prefill to each decode worker")),
      this.links,
    );
  }

  show() {
    this.hide();
    this.#stop = poll((signal) => this.#refresh(signal), REFRESH_MS);
  }

  hide() {
    this.#stop?.();
    this.#stop = null;
  }

  async #refresh(signal) {
    try {
      const fleet = await getJson("v1/fleet", signal);
      this.problem.hidden = true;
      this.#draw(fleet);
    } catch (error) {
      if (signal.aborted) return;
      this.problem.hidden = false;
      this.problem.textContent = error.message;
    }
    this.root.classList.toggle("old", !this.problem.hidden);
  }

  #draw({ workers, links }) {
    for (const [role, { count: label, list }] of Object.entries(this.panels)) {
      const mine = workers.filter((worker) => worker.role === role);
      const ready = mine.filter((worker) => worker.state === "ready").length;
      label.textContent = mine.length ? `${ready} of ${mine.length} ready` : "none configured";
      keyed(list, mine, (worker) => worker.address, () => h("li", { class: "worker" }), drawWorker);
    }
    this.links.replaceChildren(links.length ? linkTable(links) : h("p", { class: "notice" }, "A link needs a prefill and a decode worker."));
  }
}

function panel(role, name) {
  const label = h("span", { class: "muted" });
  const list = h("ul", { class: "workers" });
  return { count: label, list, root: h("section", { class: `panel ${role}` }, h("h2", {}, name, " ", label), list) };
}

function drawWorker(element, worker) {
  const head = h(
    "div",
    { class: "worker-head" },
    h("span", { class: `dot ${worker.state}`, "aria-hidden": "true" }),
    h("strong", {}, worker.worker_id ?? worker.address),
    h("span", { class: "muted" }, worker.state),
  );
  if (!worker.kv) {
    element.replaceChildren(head, h("p", { class: "muted cause" }, worker.cause ?? ""));
    return;
  }
  const { kv, cache_hit: hit } = worker;
  element.title = `${worker.model} at ${worker.address}`;
  element.replaceChildren(
    head,
    h(
      "dl",
      { class: "figures" },
      figure("running", count(worker.running), `of at most ${count(worker.max_num_seqs)}`),
      figure("waiting", count(worker.waiting), `${plural(worker.backlog_tokens, "prompt token")} yet to compute`),
      figure("cache hit", percent(hit.cached_tokens, hit.prompt_tokens), hit.requests ? `of the prompts of its latest ${plural(hit.requests, "request")}` : "no request yet"),
      worker.role === "decode"
        ? figure("step", seconds(worker.decode_step_s), "one token for every running sequence")
        : figure("prefill", rate(worker.prefill_tokens_per_s), "prompt tokens computed per second"),
    ),
    occupancy(kv),
  );
}

const figure = (name, value, title) => h("div", { title }, h("dt", {}, name), h("dd", {}, value));

function occupancy({ num_blocks: total, held_blocks: held, cached_blocks: cached, block_bytes: size, leases }) {
  const share = (blocks) => ({ width: `${total ? (100 * blocks) / total : 0}%` });
  const words = `KV ${percent(held, total)} held, ${percent(cached, total)} cached`;
  return h(
    "div",
    { class: "kv", title: `${count(total)} blocks of ${bytes(size)}: ${count(held)} held, ${count(cached)} cached, ${plural(leases, "lease")}` },
    h("div", { class: "bar", role: "img", "aria-label": words }, h("span", { class: "held", style: share(held) }), h("span", { class: "cached", style: share(cached) })),
    h("span", { class: "muted" }, `${words} of ${bytes(total * size)}`),
  );
}

function linkTable(links) {
  const names = (role) => [...new Set(links.map((link) => link[role]))];
  const sources = names("prefill");
  const targets = names("decode");
  const of = new Map(links.map((link) => [`${link.prefill}\n${link.decode}`, link]));
  const fastest = Math.max(...links.map((link) => link.bytes_per_s ?? 0));
  return h(
    "table",
    { class: "links" },
    h("thead", {}, h("tr", {}, h("td", {}), targets.map((name) => h("th", { scope: "col" }, "→ ", name)))),
    h(
      "tbody",
      {},
      sources.map((source) =>
        h("tr", {}, h("th", { scope: "row" }, source), targets.map((target) => linkCell(of.get(`${source}\n${target}`), fastest))),
      ),
    ),
  );
}

function linkCell(link, fastest) {
  if (!link?.bytes_per_s) return h("td", { class: "muted" }, "not measured", h("small", {}, link?.transport ?? ""));
  const strength = 0.35 + (0.65 * link.bytes_per_s) / fastest;
  return h(
    "td",
    {},
    h("span", { class: "speed", style: { opacity: strength.toFixed(2) } }, bytesPerSecond(link.bytes_per_s)),
    h("small", { title: "Least time that a READ of one KV block took" }, `${link.transport ?? ""} · ${seconds(link.latency_s)}`),
  );
}
