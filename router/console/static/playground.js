// A chat with the served model, streamed, with what each answer cost.

import { ApiError, chat, getJson } from "./api.js";
import { h } from "./dom.js";
import { plural, rate, seconds } from "./format.js";

const SUGGESTIONS = [
  "What is the capital of France?",
  "Explain in two sentences how a sailing boat moves against the wind.",
  "Write a short poem about a door with two wings.",
];
const MODELS_AGAIN_MS = 2000;
const NEAR_END_PX = 80;

export class Playground {
  #messages = [];
  #running = null;
  #modelTimer = 0;

  constructor() {
    this.model = h("select", { id: "model", disabled: true });
    this.temperature = h("input", { id: "temperature", type: "number", min: 0, max: 2, step: 0.1, value: "0.7" });
    this.maxTokens = h("input", { id: "max-tokens", type: "number", min: 1, step: 1, value: "256" });
    this.system = h("textarea", { id: "system", rows: 2, placeholder: "None" });
    this.input = h("textarea", {
      id: "prompt",
      rows: 1,
      placeholder: "Ask something",
      "aria-label": "Message",
      oninput: () => this.#grow(),
      onkeydown: (event) => this.#keyPressed(event),
    });
    this.button = h("button", { type: "submit", class: "primary" }, "Send");
    this.clear = h("button", { type: "button", class: "quiet", onclick: () => this.#clear() }, "New chat");
    this.log = h("div", { class: "log", role: "log", "aria-label": "Conversation" });
    this.root = h(
      "section",
      { class: "playground" },
      h(
        "div",
        { class: "settings" },
        field("Model", this.model),
        field("Temperature", this.temperature),
        field("Max tokens", this.maxTokens),
        h("details", {}, h("summary", {}, "System prompt"), h("label", { class: "field wide", for: "system" }, this.system)),
        this.clear,
      ),
      this.log,
      h("form", { class: "composer", onsubmit: (event) => this.#submitted(event) }, this.input, this.button),
    );
    this.#empty();
  }

  show() {
    if (this.model.disabled) this.#loadModels();
    this.input.focus({ preventScroll: true });
  }

  hide() {
    clearTimeout(this.#modelTimer);
  }

  async #loadModels() {
    clearTimeout(this.#modelTimer);
    try {
      const { data } = await getJson("v1/models");
      this.model.replaceChildren(...data.map(({ id }) => h("option", { value: id }, id)));
      this.model.disabled = false;
    } catch (error) {
      this.model.replaceChildren(h("option", {}, error.status === 401 ? "key needed" : "waiting for a worker"));
      this.#modelTimer = setTimeout(() => this.#loadModels(), MODELS_AGAIN_MS);
    }
  }

  #empty() {
    const suggestion = (text) => h("button", { type: "button", class: "chip", onclick: () => this.#ask(text) }, text);
    this.log.replaceChildren(
      h("div", { class: "empty" }, h("p", {}, "Prefill reads your prompt, decode writes the answer."), SUGGESTIONS.map(suggestion)),
    );
  }

  #clear() {
    this.#running?.abort();
    this.#messages = [];
    this.#empty();
    this.input.focus();
  }

  #grow() {
    this.input.style.height = "auto";
    this.input.style.height = `${Math.min(this.input.scrollHeight + 2, 240)}px`;
  }

  #keyPressed(event) {
    if (event.key === "Escape" && this.#running) this.#running.abort();
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    if (!this.#running) this.#send();
  }

  #submitted(event) {
    event.preventDefault();
    if (this.#running) this.#running.abort();
    else this.#send();
  }

  #send() {
    const text = this.input.value.trim();
    if (!text) return;
    this.input.value = "";
    this.#grow();
    this.#ask(text);
  }

  async #ask(text) {
    if (this.#running) return;
    if (!this.#messages.length) this.log.replaceChildren();
    const asked = { role: "user", content: text };
    this.#messages.push(asked);
    this.log.append(turn("user", h("div", { class: "text" }, text)));
    const answer = new Answer();
    this.log.append(answer.root);
    answer.root.scrollIntoView({ block: "end" });

    const running = (this.#running = new AbortController());
    let frame = 0; // of the next drawing: tokens may come faster than a screen shows them
    this.button.textContent = "Stop";
    this.button.classList.add("stop");
    try {
      for await (const event of chat(this.#body(), running.signal)) {
        answer.take(event);
        frame ||= requestAnimationFrame(() => {
          frame = 0;
          const follow = this.#atEnd();
          answer.draw();
          if (follow) answer.root.scrollIntoView({ block: "end" });
        });
      }
      answer.end();
    } catch (error) {
      answer.end(running.signal.aborted ? null : error);
    }
    cancelAnimationFrame(frame);
    // Only turns that the model answered are part of the conversation.
    if (this.#messages.at(-1) === asked) {
      if (answer.content) this.#messages.push({ role: "assistant", content: answer.content });
      else this.#messages.pop();
    }
    if (this.#atEnd()) answer.root.scrollIntoView({ block: "end" });
    this.#running = null;
    this.button.textContent = "Send";
    this.button.classList.remove("stop");
  }

  #body() {
    const system = this.system.value.trim();
    const body = {
      model: this.model.disabled ? undefined : this.model.value,
      messages: [...(system ? [{ role: "system", content: system }] : []), ...this.#messages],
    };
    if (this.temperature.value !== "") body.temperature = Number(this.temperature.value);
    if (this.maxTokens.value !== "") body.max_tokens = Number(this.maxTokens.value);
    return body;
  }

  #atEnd() {
    const page = document.scrollingElement;
    return page.scrollHeight - page.scrollTop - page.clientHeight < NEAR_END_PX;
  }
}

/** One answer as it grows. Times are those of this browser: what a user feels. */
class Answer {
  content = "";
  #reasoning = "";
  #drawn = 0;
  #id = null;
  #usage = null;
  #finish = null;
  #askedAt = performance.now();
  #firstAt = null;
  #lastAt = null;

  constructor() {
    this.thought = h("div", { class: "text thought", hidden: true });
    this.text = h("div", { class: "text", "aria-live": "polite", "aria-busy": "true" });
    this.facts = h("div", { class: "facts" }, h("span", { class: "pulse" }, "prefill"));
    this.root = turn("assistant", this.thought, this.text, this.facts);
  }

  take(event) {
    this.#id ??= event.id;
    this.#usage = event.usage ?? this.#usage;
    const choice = event.choices?.[0];
    if (!choice) return;
    const { content, reasoning_content: reasoning } = choice.delta ?? {};
    if (content || reasoning) {
      this.#lastAt = performance.now();
      if (this.#firstAt === null) {
        this.#firstAt = this.#lastAt;
        this.facts.replaceChildren(h("span", { class: "pulse" }, "decode"), this.#ttft());
      }
    }
    this.#reasoning += reasoning ?? "";
    this.content += content ?? "";
    this.#finish = choice.finish_reason ?? this.#finish;
  }

  draw() {
    this.thought.textContent = this.#reasoning;
    this.thought.hidden = !this.#reasoning;
    this.text.append(this.content.slice(this.#drawn));
    this.#drawn = this.content.length;
  }

  end(error = undefined) {
    this.draw();
    this.text.setAttribute("aria-busy", "false");
    const tokens = this.#usage?.completion_tokens;
    const cached = this.#usage?.prompt_tokens_details?.cached_tokens;
    const writing = (this.#lastAt - this.#firstAt) / 1000;
    this.facts.replaceChildren(
      ...[
        this.#firstAt !== null && this.#ttft(),
        tokens > 1 && writing > 0 && fact(rate((tokens - 1) / writing), "Tokens per second after the first", "rate"),
        tokens && fact(plural(tokens, "token")),
        cached > 0 && fact(`${plural(cached, "token")} of the prompt from cache`),
        this.#finish === "length" && fact("cut at max tokens"),
        error === null && fact("stopped"),
        this.#id && h("a", { class: "timeline", href: `#/requests/${encodeURIComponent(this.#id)}` }, "timeline"),
      ].filter(Boolean),
    );
    if (error) this.root.append(problem(error));
  }

  #ttft() {
    return fact(`TTFT ${seconds((this.#firstAt - this.#askedAt) / 1000)}`, "Time to first token, seen from here", "ttft");
  }
}

const turn = (role, ...children) => h("article", { class: `turn ${role}`, "aria-label": role }, children);

const fact = (text, title = "", name = "") => h("span", { title, class: name }, text);

const field = (name, control) => h("label", { class: "field", for: control.id }, h("span", {}, name), control);

function problem(error) {
  const known = error instanceof ApiError;
  const later = known && error.retryAfter ? ` Try again in ${error.retryAfter} s.` : "";
  const code = known && error.code ? h("code", {}, error.code) : null;
  return h("p", { class: "problem", role: "alert" }, code, (known ? error.message : `This page failed: ${error.message}`) + later);
}
