// The frame: which view is shown, whether the router is ready, and the key.

import { KEY_WANTED, getJson, key } from "./api.js";
import { poll } from "./dom.js";
import { Fleet } from "./fleet.js";
import { Playground } from "./playground.js";
import { Requests } from "./requests.js";

const READY_EVERY_MS = 5000;

const main = document.getElementById("main");
const views = { playground: new Playground(), fleet: new Fleet(), requests: new Requests() };
let shown = null;

function route() {
  const [, name, ...rest] = location.hash.split("/");
  const view = views[name] ? name : "playground";
  const argument = rest.length ? decoded(rest.join("/")) : null;
  if (shown !== view) {
    views[shown]?.hide();
    main.replaceChildren(views[view].root);
    shown = view;
  }
  for (const link of document.querySelectorAll("nav a")) {
    if (link.hash === `#/${view}`) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  document.title = `${view[0].toUpperCase()}${view.slice(1)} · Diptych`;
  views[view].show(argument);
}

function decoded(text) {
  try {
    return decodeURIComponent(text);
  } catch {
    return text;
  }
}

function watchReadiness() {
  const state = document.getElementById("state");
  const say = (kind, text, title = "") => {
    state.className = `state ${kind}`;
    if (state.textContent !== text) state.textContent = text;
    state.title = title;
  };
  poll(async (signal) => {
    try {
      await getJson("ready", signal);
      say("ready", "ready");
    } catch (error) {
      if (!signal.aborted) say(error.status ? "waiting" : "lost", error.status ? "not ready" : "unreachable", error.message);
    }
  }, READY_EVERY_MS);
}

function keyDialog() {
  const dialog = document.getElementById("key-dialog");
  const input = document.getElementById("key-input");
  const button = document.getElementById("key-button");
  const mark = () => button.classList.toggle("set", Boolean(key.get()));
  const open = () => {
    if (dialog.open) return;
    input.value = key.get();
    dialog.returnValue = "";
    dialog.showModal();
    input.select();
  };
  // Enter takes the first submit button of a form, which forgets.
  input.addEventListener("keydown", (event) => {
    if (event.key !== "Enter") return;
    event.preventDefault();
    dialog.close("keep");
  });
  dialog.addEventListener("close", () => {
    if (dialog.returnValue === "keep") key.set(input.value.trim());
    if (dialog.returnValue === "forget") key.set("");
    input.value = "";
    mark();
    if (dialog.returnValue) views[shown].show(null);
  });
  button.addEventListener("click", open);
  let asked = false;
  window.addEventListener(KEY_WANTED, () => {
    if (!asked || key.get()) open();
    asked = true;
  });
  mark();
}

window.addEventListener("hashchange", route);
keyDialog();
route();
watchReadiness();
