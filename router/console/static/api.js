// Calls the router that served this page. The key, if one is given, lives in this tab's session.

const ROOT = new URL("..", import.meta.url);
const KEY = "diptych.key";

/** An answer that is no success: what the router said, with its status and code. */
export class ApiError extends Error {
  constructor(message, { status = 0, code = "", retryAfter = null } = {}) {
    super(message);
    this.status = status;
    this.code = code;
    this.retryAfter = retryAfter;
  }
}

export const key = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  set: (value) => (value ? sessionStorage.setItem(KEY, value) : sessionStorage.removeItem(KEY)),
};

/** Fired on `window` when the router asks for a key. */
export const KEY_WANTED = "diptych-key-wanted";

async function call(path, options = {}) {
  const headers = new Headers(options.headers);
  if (key.get()) headers.set("authorization", `Bearer ${key.get()}`);
  let response;
  try {
    response = await fetch(new URL(path, ROOT), { ...options, headers, credentials: "same-origin" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The router can't be reached.");
  }
  if (response.ok) return response;
  if (response.status === 401) window.dispatchEvent(new Event(KEY_WANTED));
  throw await errorOf(response);
}

async function errorOf(response) {
  const details = { status: response.status, retryAfter: response.headers.get("retry-after") };
  try {
    const { error } = await response.json();
    return new ApiError(error.message, { ...details, code: error.code });
  } catch {
    return new ApiError(`The router answered with status ${response.status}.`, details);
  }
}

export async function getJson(path, signal) {
  return (await call(path, { signal })).json();
}

/**
 * A streamed chat completion, event by event.
 *
 * Throws ApiError where the answer fails, before its first event or in the middle.
 */
export async function* chat(body, signal) {
  const response = await call("v1/chat/completions", {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
    signal,
  });
  for await (const data of eventData(response.body)) {
    if (data === "[DONE]") return;
    const event = JSON.parse(data);
    if (event.error) throw new ApiError(event.error.message, { code: event.error.code });
    yield event;
  }
  throw new ApiError("The answer broke off.");
}

async function* eventData(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const lines = (rest + value).split(/\r?\n/);
      rest = lines.pop();
      for (const line of lines) if (line.startsWith("data:")) yield line.slice(5).trim();
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
