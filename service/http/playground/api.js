// The server as this page sees it: the same routes that every other client has.

/** Headers of a request; the key is asked for by servers that have keys. */
function headers(key) {
  return key ? { authorization: `Bearer ${key}` } : {};
}

/** JSON of a route. Throws an Error with the server's own words. */
export async function json(path, key) {
  const response = await fetch(path, { headers: headers(key) });
  const body = await response.json().catch(() => ({}));
  if (!response.ok) throw new Error(body.error?.message ?? `${path}: ${response.status}`);
  return body;
}

/** Phase of the server and, while it loads, how far it is. */
export async function health() {
  const response = await fetch("/v1/health/ready");
  return { ready: response.ok, ...(await response.json().catch(() => ({}))) };
}

/** Samples of /metrics without labels, or summed over them, by name: what Prometheus reads. */
export async function metrics(key) {
  const response = await fetch("/metrics", { headers: headers(key) });
  if (!response.ok) throw new Error(`/metrics: ${response.status}`);
  const samples = {};
  for (const line of (await response.text()).split("\n")) {
    const match = /^(nemoserve_\w+)(?:\{[^}]*\})? (\S+)/.exec(line);
    if (match) samples[match[1]] = (samples[match[1]] ?? 0) + Number(match[2]);
  }
  return samples;
}

/** Events of a chat completion as they come. Ends with the stream; throws an Error in the server's words. */
export async function* chat(request, key, signal) {
  const response = await fetch("/v1/chat/completions", {
    method: "POST",
    headers: { "content-type": "application/json", ...headers(key) },
    body: JSON.stringify({ ...request, stream: true, stream_options: { include_usage: true } }),
    signal,
  });
  if (!response.ok) {
    const body = await response.json().catch(() => ({}));
    throw new Error(body.error?.message ?? `the server answered ${response.status}`);
  }
  for await (const data of events(response.body)) {
    if (data === "[DONE]") return;
    const event = JSON.parse(data);
    if (event.error) throw new Error(event.error.message);
    yield event;
  }
}

/** Payloads of server-sent events, whatever pieces the network makes of them. */
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split(/\r?\n/);
    rest = lines.pop();
    for (const line of lines) if (line.startsWith("data:")) yield line.slice(5).trimStart();
  }
}
