// The page: a conversation on the left, the live state of the server on the right.

import { chat, health, json, metrics } from "/playground/api.js";
import { Plots } from "/playground/plots.js";

const EVERY_MS = 1000;
const at = (id) => document.getElementById(id);
const plots = new Plots(at("plots"));

let messages = []; // what the model is told, in OpenAI's form
let running = null; // AbortController of the answer that is being written

at("key").value = sessionStorage.getItem("key") ?? "";
at("key").addEventListener("change", () => {
  sessionStorage.setItem("key", at("key").value);
  describe();
});
const key = () => at("key").value.trim();

// -- conversation -----------------------------------------------------------------------------------------------

at("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const question = at("question").value.trim();
  if (!question || running) return;
  at("question").value = "";
  messages.push({ role: "user", content: question });
  show("user", question);
  answer();
});
at("question").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    at("ask").requestSubmit();
  }
});
document.addEventListener("keydown", (event) => event.key === "Escape" && running?.abort());
at("stop").addEventListener("click", () => running?.abort());
at("again").addEventListener("click", () => {
  running?.abort();
  messages = [];
  at("messages").replaceChildren();
  at("empty").hidden = false;
  at("question").focus();
});

async function answer() {
  const conversation = messages;
  const { item, text, facts } = show("assistant", "");
  const control = new AbortController();
  busy(control, item);
  const began = performance.now();
  let first = null;
  let usage = null;
  let ending = "";
  try {
    for await (const event of chat(body(), key(), control.signal)) {
      const choice = event.choices?.[0];
      if (choice?.delta?.content) {
        first ??= performance.now();
        append(text, choice.delta.content);
      }
      if (choice?.finish_reason === "length") ending = "cut at the limit";
      usage = event.usage ?? usage;
    }
  } catch (error) {
    if (error.name === "AbortError") ending = "stopped";
    else {
      facts.classList.add("failure");
      ending = error.message;
    }
  } finally {
    idle(control, item);
  }
  if (conversation === messages) {
    if (text.textContent) messages.push({ role: "assistant", content: text.textContent });
    else messages.pop(); // nothing was answered: the question may be asked again
  }
  facts.textContent = [...figures(began, first, usage), ending].filter(Boolean).join(" · ");
}

function body() {
  const system = at("system").value.trim();
  const limit = at("max_tokens").valueAsNumber;
  return {
    model: at("model").value,
    messages: system ? [{ role: "system", content: system }, ...messages] : messages,
    temperature: at("temperature").valueAsNumber || 0,
    ...(limit >= 1 ? { max_tokens: limit } : {}),
  };
}

function figures(began, first, usage) {
  if (!first || !usage) return [];
  const seconds = (performance.now() - first) / 1000;
  const rate = usage.completion_tokens > 1 ? `${((usage.completion_tokens - 1) / seconds).toFixed(1)} tokens/s` : "";
  return [`${usage.completion_tokens} tokens`, rate, `first after ${(first - began).toFixed(0)} ms`];
}

function show(role, content) {
  at("empty").hidden = true;
  const item = document.createElement("li");
  item.className = role;
  const text = document.createElement("div");
  text.className = "text";
  text.textContent = content;
  const facts = document.createElement("div");
  facts.className = "facts";
  item.append(text, facts);
  at("messages").append(item);
  at("talk").scrollTop = at("talk").scrollHeight;
  return { item, text, facts };
}

function append(text, more) {
  const talk = at("talk");
  const follows = talk.scrollHeight - talk.scrollTop - talk.clientHeight < 40; // unless somebody reads further up
  text.append(more);
  if (follows) talk.scrollTop = talk.scrollHeight;
}

function busy(control, item) {
  running = control;
  item.classList.add("writing");
  item.setAttribute("aria-busy", "true"); // read aloud when it is whole
  at("send").disabled = true;
  at("stop").hidden = false;
}

function idle(control, item) {
  item.classList.remove("writing");
  item.removeAttribute("aria-busy");
  if (running !== control) return;
  running = null;
  at("send").disabled = false;
  at("stop").hidden = true;
}

// -- server -----------------------------------------------------------------------------------------------------

async function watch() {
  let ready = false;
  for (;;) {
    const state = await health().catch(() => ({ ready: false, phase: "no connection" }));
    tell(state);
    if (state.ready && !ready) await describe();
    ready = state.ready;
    if (!document.hidden) await metrics(key()).then((now) => plots.add(now, performance.now() / 1000), () => {});
    await new Promise((resolve) => setTimeout(resolve, EVERY_MS));
  }
}

function tell({ ready, phase, progress }) {
  const place = at("phase");
  const done = phase === "loading" ? ` ${Math.round(100 * progress)} %` : "";
  const words = ready ? "ready" : phase === "ready" ? "the engine does not answer" : (phase ?? "not ready") + done;
  if (place.textContent !== words) place.textContent = words; // a screen reader hears changes only
  place.className = `phase ${ready ? "ready" : phase === "failed" ? "failed" : ""}`;
}

async function describe() {
  try {
    const { data } = await json("/v1/models", key());
    const chosen = at("model").value;
    at("model").replaceChildren(...data.map(({ id }) => new Option(id, id, false, id === chosen)));
    const metadata = await json("/v1/metadata", key()).catch(() => ({}));
    facts({
      version: metadata.version,
      profile: metadata.selectedModelProfileId,
      context: data[0]?.max_model_len && `${data[0].max_model_len} tokens`,
    });
  } catch (error) {
    facts({ models: error.message });
  }
}

function facts(pairs) {
  const rows = Object.entries(pairs).filter(([, value]) => value);
  at("facts").replaceChildren(
    ...rows.flatMap(([name, value]) => [element("dt", name), element("dd", value)]),
  );
}

function element(tag, text) {
  const made = document.createElement(tag);
  made.textContent = text;
  return made;
}

watch();
