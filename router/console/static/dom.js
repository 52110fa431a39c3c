// Builds elements. Strings become text nodes and nothing else: no value can turn into markup.

/** An element with properties, attributes (`aria-…`, `role`, `data-…`), listeners (`onclick`) and children. */
export function h(tag, props = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (name === "class") element.className = value;
    else if (name === "style") Object.entries(value).forEach(([k, v]) => element.style.setProperty(k, v));
    else if (name.includes("-") || name === "role" || name === "for") element.setAttribute(name, value);
    else element[name] = value;
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

/** Makes `parent` show `items`, keeping the element of each key so that focus and scroll stay. */
export function keyed(parent, items, key, create, update) {
  const old = new Map([...parent.children].map((child) => [child.dataset.key, child]));
  const wanted = items.map((item) => {
    const name = key(item);
    const element = old.get(name) ?? create(item);
    element.dataset.key = name;
    update(element, item);
    return element;
  });
  wanted.forEach((element, index) => {
    if (parent.children[index] !== element) parent.insertBefore(element, parent.children[index] ?? null);
  });
  while (parent.children.length > wanted.length) parent.lastElementChild.remove();
}

/** Calls `work` now and again `everyMs` after it has ended, while the page is visible. Returns how to stop it. */
export function poll(work, everyMs) {
  const ended = new AbortController();
  let timer = 0;
  const turn = async () => {
    timer = 0;
    if (document.visibilityState === "visible") await work(ended.signal);
    if (!ended.signal.aborted) timer = setTimeout(turn, everyMs);
  };
  document.addEventListener(
    "visibilitychange",
    () => {
      if (document.visibilityState === "visible" && timer) {
        clearTimeout(timer);
        turn();
      }
    },
    { signal: ended.signal },
  );
  turn();
  return () => {
    clearTimeout(timer);
    ended.abort();
  };
}
